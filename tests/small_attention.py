"""Small inputs of deformable attention, and what a path of it makes of them."""

import pytest
import torch
from hypothesis import strategies as st

from deform_attn_cuda import KERNEL_TYPES, deform_attn, deform_attn_pytorch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
LEVELS = [(6, 9), (3, 5), (1, 1)]
ALIGNMENTS = [(32, 0), (32, 1), (33, 0), (136, 0)]  # channels, and by how many numbers memory is shifted
# Rounding of sums of up to 300 terms: 2^-53 and 2^-24 times some tens. Results of sixteen bits are rounded once, to 8
# (11) bits, from sums in float32; gradients of references multiply by sizes of up to 9 cells.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}

problems = st.fixed_dictionaries(
    {
        "level_shapes": st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
        "B": st.integers(1, 3),
        "Q": st.integers(1, 9),
        "h": st.integers(1, 4),
        "P": st.integers(1, 18),
        "boxes": st.booleans(),
        "c": st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 31, 32, 40, 64, 67, 72]),
        "seed": st.integers(0, 1000),
    }
)


def inputs(level_shapes=LEVELS, B=2, Q=7, h=3, c=5, P=2, boxes=False, dtype=torch.float64, device="cpu", seed=0):
    """Value, reference, offsets and logits. Points lie on a grid of 1/8 cell, up to two cells outside of the level, so
    on borders and centres of cells as well.

    There the gradient by the offset jumps, and one rounding more or less decides for one side or the other. So where
    locations are rounded, in sizes that are no power of two and in boxes, points keep 1/16 cell away.
    """
    random = torch.Generator().manual_seed(seed)
    reference = (torch.rand(*((B, Q, 4) if boxes else (Q, 2)), generator=random).double() * 32).floor() / 32
    offsets = []
    for H, W in level_shapes:
        size = torch.tensor([W, H])
        steps = (torch.rand(B, Q, h, P, 2, generator=random) * (8 * (size + 4))).floor() - 16
        cells = steps.double() / 8 + torch.where((size & (size - 1) == 0) & (not boxes), 0, 1 / 16)
        unit = 1 / size
        if boxes:
            reference[..., 2:].clamp_(min=1 / 32)
            unit = reference[:, :, None, None, 2:] * 0.5 / P
        centre = reference[:, :, None, None, :2] if boxes else reference[:, None, None]
        offsets.append(((cells + 0.5) / size - centre) / unit)
    tokens = sum(H * W for H, W in level_shapes)
    value = torch.randn(B, tokens, h, c, generator=random)
    logits = torch.randn(B, Q, h, len(level_shapes), P, generator=random)
    precise = torch.promote_types(dtype, torch.float32)
    return (
        value.to(device, dtype).requires_grad_(),
        reference.to(device, precise).requires_grad_(),
        torch.stack(offsets, 3).to(device, precise).requires_grad_(),
        logits.to(device, precise).requires_grad_(),
    )


def many_queries(c, shift, dtype, device):
    """More queries than a block of threads takes, in tensors that begin `shift` numbers after an aligned address."""
    return [
        torch.cat((x.new_zeros(shift), x.detach().flatten()))[shift:].view(x.shape).requires_grad_()
        for x in inputs(B=1, Q=70, c=c, P=3, dtype=dtype, device=device)
    ]


def upstream_of(output):
    """The gradient that comes from above in all these tests."""
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)


def outputs(path, level_shapes, tensors, upstream_of=upstream_of):
    """The output of a path and its four gradients."""
    output = path(tensors[0], level_shapes, *tensors[1:])
    return output, *torch.autograd.grad(output, tensors, upstream_of(output))


def assert_close(actual, expected, tolerance):
    """Relative to the largest element, as sums of terms of either sign have no relative accuracy of their own."""
    names = "output", "grad_value", "grad_reference", "grad_offsets", "grad_logits"
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        atol = tolerance * max(b.abs().max().item() if b.numel() else 0, 1)
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_agrees(path, level_shapes, tensors):
    """With the fallback on the same numbers. Results of sixteen bits are compared with its sums before these are
    rounded: two roundings, of sums that differ a little, might fall to either side."""
    value, *others = tensors
    wide = value.detach().to(others[0].dtype).requires_grad_()
    exact = outputs(
        deform_attn_pytorch, level_shapes, (wide, *others), lambda x: upstream_of(x.to(value.dtype)).to(x.dtype)
    )
    actual = outputs(path, level_shapes, tensors)
    assert [x.dtype for x in actual] == [value.dtype, *(x.dtype for x in tensors)]
    assert_close([x.to(y.dtype) for x, y in zip(actual, exact, strict=True)], exact, TOLERANCES[value.dtype])
    assert torch.equal(deform_attn_pytorch(value, level_shapes, *others), exact[0].to(value.dtype))


if __name__ == "__main__":
    for dtype in KERNEL_TYPES["cpu"]:
        for c, shift in ALIGNMENTS:
            assert_agrees(deform_attn, LEVELS, many_queries(c, shift, dtype, "cpu"))
