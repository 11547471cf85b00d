"""What `deform_attn` promises, on every device and path of this machine."""

import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import deform_attn_cuda
from deform_attn_cuda import build, deform_attn, deform_attn_pytorch, locate, sass, status
from deform_attn_cuda.benchmark import grid_sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
LEVELS = [(6, 9), (3, 5), (1, 1)]
INPUTS = "value", "reference", "offsets", "logits"


def needs_kernel(device, dtype=torch.float32):
    if "fallback" in status(device, dtype):
        pytest.skip(status(device, dtype))


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


def upstream_of(output):
    """The gradient that comes from above in all these tests."""
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view(output.shape)


def outputs(path, level_shapes, tensors, upstream_of=upstream_of):
    """The output of a path and its four gradients."""
    output = path(tensors[0], level_shapes, *tensors[1:])
    return output, *torch.autograd.grad(output, tensors, upstream_of(output))


def misaligned(tensor):
    """The same, one element away from where 16 bytes begin."""
    return torch.cat((tensor.new_zeros(1), tensor.detach().flatten()))[1:].view(tensor.shape).requires_grad_()


def assert_close(actual, expected, tolerance):
    """Relative to the largest element, as sums of terms of either sign have no relative accuracy of their own."""
    names = "output", "grad_value", "grad_reference", "grad_offsets", "grad_logits"
    for name, a, b in zip(names, actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        scale = b.abs().max().item() if b.numel() else 0
        torch.testing.assert_close(
            a, b, rtol=0, atol=tolerance * max(scale, 1), msg=lambda text, name=name: f"{name}: {text}"
        )


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

# ---- What is computed


def test_an_offset_is_in_cells_of_its_level_from_a_centre():
    centre, offsets = torch.tensor([[0.5, 0.25]]), torch.tensor([[1.0, -2.0], [1.0, -2.0]]).view(1, 1, 1, 2, 1, 2)
    locations = locate([(8, 10), (4, 5)], centre, offsets).view(2, 2)
    torch.testing.assert_close(locations, torch.tensor([[0.5 + 1 / 10, 0.25 - 2 / 8], [0.5 + 1 / 5, 0.25 - 2 / 4]]))


def test_an_offset_of_as_many_as_there_are_points_reaches_the_border_of_a_box():
    box, offsets = torch.tensor([[[0.5, 0.25, 0.4, 0.2]]]), torch.tensor([[3.0, -3.0]]).expand(1, 1, 1, 1, 3, 2)
    torch.testing.assert_close(locate([(8, 10)], box, offsets)[..., 0, :].flatten(), torch.tensor([0.7, 0.15]))


@settings(deadline=None, max_examples=30)
@given(problem=problems)
def test_the_fallback_is_the_classic_formulation_with_grid_sample(problem):
    tensors = inputs(**problem)
    classic = outputs(grid_sample, problem["level_shapes"], tensors)
    assert_close(outputs(deform_attn_pytorch, problem["level_shapes"], tensors), classic, 1e-12)  # float64 rounding


# Rounding of sums of up to 300 terms: 2^-53 and 2^-24 times some tens. Results of sixteen bits are rounded once, to 8
# (11) bits, from sums in float32; gradients of references multiply by sizes of up to 9 cells.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def assert_agrees(actual, level_shapes, tensors):
    """With the fallback on the same numbers. Results of sixteen bits are compared with its sums before these are
    rounded: two roundings, of sums that differ a little, might fall to either side."""
    value, *others = tensors
    wide = value.detach().to(others[0].dtype).requires_grad_()
    exact = outputs(
        deform_attn_pytorch, level_shapes, (wide, *others), lambda x: upstream_of(x.to(value.dtype)).to(x.dtype)
    )
    assert [x.dtype for x in actual] == [value.dtype, *(x.dtype for x in tensors)]
    assert_close([x.to(y.dtype) for x, y in zip(actual, exact, strict=True)], exact, TOLERANCES[value.dtype])
    assert torch.equal(deform_attn_pytorch(value, level_shapes, *others), exact[0].to(value.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(deadline=None, max_examples=40)
@given(problem=problems)
def test_kernel_and_fallback_agree(device, dtype, problem):
    needs_kernel(device, dtype)
    tensors = inputs(**problem, dtype=dtype, device=device)
    assert_agrees(outputs(deform_attn, problem["level_shapes"], tensors), problem["level_shapes"], tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_many_queries_and_tensors_that_begin_anywhere(device, dtype):
    needs_kernel(device, dtype)
    tensors = [misaligned(tensor) for tensor in inputs(Q=300, c=32, P=4, dtype=dtype, device=device)]
    assert_agrees(outputs(deform_attn, LEVELS, tensors), LEVELS, tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
@pytest.mark.parametrize("boxes", [False, True])
def test_gradients_are_those_of_finite_differences(boxes, path, device):
    tensors = inputs([(3, 5), (3, 3)], B=2, Q=2, h=2, c=3, boxes=boxes, device=device)
    assert torch.autograd.gradcheck(lambda value, *rest: path(value, [(3, 5), (3, 3)], *rest), tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
@pytest.mark.parametrize("boxes", [False, True])
def test_infinity_is_outside_and_not_a_number_stays_visible(boxes, path, device):
    value, reference, offsets, logits = (
        t.detach() for t in inputs([(3, 4)], B=1, Q=4, h=1, c=8, P=1, boxes=boxes, device=device)
    )
    for query, place in enumerate([float("inf"), float("-inf"), 1e30, float("nan")]):
        offsets[0, query, ..., 0] = place
    output = path(value, [(3, 4)], reference, offsets, logits)
    assert (output[0, :3] == 0).all() and output[0, 3].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
def test_a_logit_that_is_not_finite_stays_visible_outside_too(path, device):
    value, reference, offsets, logits = inputs([(3, 4)], B=1, Q=2, h=1, c=8, P=2, dtype=torch.float32, device=device)
    logits.data[0, :, 0, 0, 0] = torch.tensor([float("nan"), float("inf")])
    assert path(value, [(3, 4)], reference + 5, offsets, logits).isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
def test_a_logit_of_minus_infinity_leaves_its_sample_out(path, device):
    value, reference, offsets, logits = inputs([(4, 4)], B=1, P=4, dtype=torch.float32, device=device)
    logits.data[..., 1:3] = -float("inf")
    expected = path(value, [(4, 4)], reference, offsets[..., ::3, :], logits[..., ::3])
    torch.testing.assert_close(path(value, [(4, 4)], reference, offsets, logits), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
@pytest.mark.parametrize("empty", [{"B": 0}, {"Q": 0}], ids=str)
def test_batches_and_queries_may_be_none_at_all(path, empty, device):
    tensors = inputs(**empty, device=device)
    results = outputs(path, LEVELS, tensors)
    assert [t.shape for t in results[1:]] == [t.shape for t in tensors]
    assert all((t == 0).all() for t in results)


def test_the_same_bits_come_out_of_any_number_of_threads():
    needs_kernel("cpu")
    shapes = [(40, 60), (20, 30)]
    tensors = inputs(shapes, Q=3000, h=4, c=16, P=4, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(outputs(deform_attn, shapes, tensors))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors_get_the_same_results(capability):
    """A process for each set of instructions, as PyTorch chooses once."""
    needs_kernel("cpu")
    code = (
        "import torch; from tests.test_deform_attn import *\n"
        "for dtype in deform_attn_cuda.KERNEL_TYPES['cpu']:\n"
        "    for c in (7, 32):\n"
        "        tensors = inputs(c=c, P=5, dtype=dtype)\n"
        "        assert_agrees(outputs(deform_attn, LEVELS, tensors), LEVELS, tensors)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
    )


# ---- How it behaves in PyTorch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["dense", "permuted", "empty"])
@pytest.mark.parametrize("boxes", [False, True])
def test_the_operators_pass_opcheck(boxes, kind, device):
    needs_kernel(device)
    value, *others = inputs(Q=0 if kind == "empty" else 7, boxes=boxes, dtype=torch.float32, device=device)
    if kind == "permuted":
        value = value.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0).requires_grad_()
        others = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in others]
    sizes = [size for shape in LEVELS for size in shape]
    torch.library.opcheck(torch.ops.deform_attn.forward.default, (value, sizes, *others))
    grad = torch.ones(2, others[1].shape[1], 15, device=device)
    plain = [t.detach() for t in (value, *others)]
    for reference_asks in (False, True):
        arguments = grad, plain[0], sizes, *plain[1:], reference_asks
        torch.library.opcheck(torch.ops.deform_attn.backward.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
def test_second_derivatives_are_an_error_and_not_zero(device):
    needs_kernel(device)
    value, *others = inputs(dtype=torch.float32, device=device)
    output = deform_attn(value, LEVELS, *others)
    (gradient,) = torch.autograd.grad(output.sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="deform_attn::backward is not implemented"):
        gradient.sum().backward()


class Sample(torch.nn.Module):
    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, value, *others):
        return self.path(value, LEVELS, *others)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("path, backend", [(deform_attn, "inductor"), (deform_attn_pytorch, "aot_eager")])
def test_compiled_graphs_hold_it_whole(path, backend, device):
    tensors = inputs(dtype=torch.float32, device=device)
    compiled = torch.compile(Sample(path), fullgraph=True, backend=backend)
    assert_close(
        outputs(lambda value, shapes, *rest: compiled(value, *rest), LEVELS, tensors),
        outputs(path, LEVELS, tensors),
        1e-6,
    )  # fused float32 arithmetic rounds elsewhere


@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
def test_exported_programs_take_any_batch(path):
    batch = {0: torch.export.Dim("B")}
    tensors = inputs(boxes=True, dtype=torch.float32)
    program = torch.export.export(Sample(path), tensors, dynamic_shapes=(batch, (batch, batch, batch)))
    tensors = inputs(B=5, boxes=True, dtype=torch.float32)
    torch.testing.assert_close(program.module()(*tensors), path(tensors[0], LEVELS, *tensors[1:]))


class Pyramid(torch.nn.Module):
    """Two levels whose sizes are those of an image, every token a query."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def forward(self, image):
        levels = [image, image[:, :, ::2, ::2]]
        value = torch.cat([level.flatten(2) for level in levels], -1).transpose(1, 2)[:, :, None]
        offsets = value[..., None, None, :2].expand(-1, -1, -1, 2, -1, -1)
        boxes = value[:, :, 0, :4].sigmoid()
        return self.path(value, [tuple(level.shape[-2:]) for level in levels], boxes, offsets, offsets[..., 0])


@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
def test_one_compiled_graph_serves_images_of_all_sizes(path):
    torch.compiler.reset()
    compiled = torch.compile(Pyramid(path), dynamic=True, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        for height, width in [(12, 10), (8, 14), (6, 20), (16, 18)]:
            image = torch.rand(2, 8, height, width, dtype=torch.float64, requires_grad=True)
            output, expected = compiled(image), Pyramid(path)(image)
            torch.testing.assert_close(output, expected)
            gradients = (torch.autograd.grad(result.sum(), image) for result in (output, expected))
            torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
def test_exported_programs_take_images_of_any_size(path):
    sizes = {2: 2 * torch.export.Dim("H", min=2, max=50), 3: 2 * torch.export.Dim("W", min=2, max=50)}
    program = torch.export.export(Pyramid(path), (torch.randn(2, 8, 12, 10),), dynamic_shapes=(sizes,)).module()
    for height, width in [(8, 14), (30, 20)]:
        image = torch.randn(2, 8, height, width)
        torch.testing.assert_close(program(image), Pyramid(path)(image))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_lowers_the_value_and_keeps_the_locations(device):
    value, reference, offsets, logits = inputs(dtype=torch.float32, device=device)
    with torch.autocast(device, torch.bfloat16):
        output = deform_attn(value, LEVELS, reference, offsets, logits.bfloat16())
    expected = deform_attn_pytorch(value.bfloat16(), LEVELS, reference, offsets, logits.bfloat16().float())
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected, rtol=2**-7, atol=2**-8)  # one rounding to bfloat16, to either side


@pytest.mark.parametrize(
    "change, named",
    [
        ({"value": torch.zeros(2, 70, 15)}, "value must be"),
        ({"value": torch.zeros(2, 71, 3, 5)}, "level_shapes"),
        ({"value": torch.zeros(2, 70, 3, 5, dtype=torch.int32)}, "value must be of a float type"),
        ({"level_shapes": [(70, 1)]}, "offsets must be"),
        ({"level_shapes": [(70, 1), (1, 0), (0, 1)]}, "level_shapes"),
        ({"offsets": torch.zeros(2, 7, 3, 3, 2)}, "offsets must be"),
        ({"offsets": torch.zeros(3, 7, 3, 3, 2, 2)}, "offsets must be"),
        ({"logits": torch.zeros(2, 7, 3, 3, 1)}, "logits must be"),
        ({"logits": torch.zeros(2, 7, 3, 3, 2, device="meta")}, "logits is on meta"),
        ({"logits": torch.zeros(2, 7, 3, 3, 2, dtype=torch.int)}, "logits must be of a float type"),
        ({"reference": torch.zeros(2, 7, 2)}, "reference must be"),
        ({"reference": torch.zeros(7, 4)}, "reference must be"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_are_named(change, named):
    arguments = dict(zip(INPUTS, inputs(dtype=torch.float32), strict=True), level_shapes=LEVELS) | change
    with pytest.raises(ValueError, match=f"deform_attn: {named}"):
        deform_attn(**arguments)


@pytest.mark.parametrize("sizes", [[6, 9, 3, 5], [6, 9, 3, 5, 1, 2], [6, 9, 3, 5, -1, -1]], ids=str)
def test_the_operator_itself_refuses_what_it_could_not_read(sizes):
    needs_kernel("cpu")
    value, *others = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match="level_shapes"):
        torch.ops.deform_attn.forward(value, sizes, *others)


@pytest.mark.parametrize("reference", [(7, 4), (2, 7, 2), (2, 6, 4), (1, 7, 4)], ids=str)
def test_the_operator_itself_refuses_a_reference_that_it_could_not_read(reference):
    needs_kernel("cpu")
    value, _, *others = inputs(dtype=torch.float32)
    sizes = [size for shape in LEVELS for size in shape]
    with pytest.raises(ValueError, match="reference"):
        torch.ops.deform_attn.forward(value, sizes, torch.zeros(reference), *others)


# ---- The CUDA kernels without a GPU


@pytest.fixture(scope="module")
def nvcc():
    path, reason = build.find_nvcc()
    if path is None:
        pytest.skip(reason)
    return path


BLOCK_OF_64 = r"""
#include "cuda_on_cpu.h"

struct Tile { float number[64]; };

template <typename Barrier>
void reverse(float* to, Barrier barrier, unsigned writers) {
  SHARED(Tile, tile);
  for (int round = 0; round < 8; ++round) {
    if (threadIdx.x < writers) tile.number[threadIdx.x] = round;
    barrier();
    to[64 * round + threadIdx.x] = tile.number[63 - threadIdx.x];
    barrier();
  }
}

extern "C" bool run(const char* what, float* to) {
  const std::string name = what;
  const auto nothing = [] {};
  const auto half = [] { if (threadIdx.x < 32) __syncthreads(); };
  if (name == "block") return launch(dim3(1), 64, [&] { reverse(to, __syncthreads, 64); });
  if (name == "warp") return launch(dim3(1), 64, [&] { reverse(to, __syncwarp, 64); });
  if (name == "no barrier") return launch(dim3(1), 64, [&] { reverse(to, nothing, 64); });
  if (name == "half") return launch(dim3(1), 64, [&] { reverse(to, half, 64); });
  if (name == "unwritten") return launch(dim3(2), 64, [&] { reverse(to, __syncthreads, blockIdx.x == 0 ? 64 : 63); });
  return false;
}
"""


@pytest.fixture(scope="module")
def block_of_64(nvcc, tmp_path_factory):
    """Runs a kernel of 64 threads that reverses eight rows of 64 numbers, each equal to the row's index, through shared
    memory. Returns whether it ended, and the rows."""
    folder = tmp_path_factory.mktemp("block")
    (folder / "block.cpp").write_text(BLOCK_OF_64)
    flags = ["-std=c++17", "-shared", "-Xcompiler=-fPIC,-w", f"-I{Path(__file__).parent / 'cuda_on_cpu'}"]
    subprocess.run([nvcc, *flags, "-o", folder / "block.so", folder / "block.cpp"], check=True)
    library = ctypes.CDLL(str(folder / "block.so"))
    library.run.restype = ctypes.c_bool

    def run(what):
        rows = torch.full((8, 64), -1.0)
        return library.run(what.encode(), ctypes.c_void_p(rows.data_ptr())), rows

    return run


EXPECTED_ROWS = torch.arange(8.0)[:, None].expand(8, 64)


def test_the_simulated_block_waits_at_its_barriers(block_of_64):
    ended, rows = block_of_64("block")
    assert ended and torch.equal(rows, EXPECTED_ROWS)


@pytest.mark.parametrize("what", ["no barrier", "warp"])
def test_the_simulated_block_shows_a_missing_barrier(block_of_64, what):
    ended, rows = block_of_64(what)
    assert ended and not torch.equal(rows, EXPECTED_ROWS)


def test_the_simulated_block_shows_what_nobody_wrote_to_shared_memory_though_an_earlier_block_did(block_of_64):
    ended, rows = block_of_64("unwritten")
    assert ended and rows[:, 0].isnan().all() and torch.equal(rows[:, 1:], EXPECTED_ROWS[:, 1:])


def test_the_simulated_block_ends_where_threads_wait_for_others_that_never_come(block_of_64):
    assert not block_of_64("half")[0]


@pytest.fixture(scope="module", params=["false", "true"], ids=["sm_80", "sm_90"])
def cuda_on_cpu(nvcc, request, tmp_path_factory):
    """The CUDA kernels compiled for this CPU, as a path: as for sm_80, and with sm_90's additions of four at once."""
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "library.so"
    subprocess.run(
        [
            nvcc,
            "-O1",
            "-std=c++17",
            "-shared",
            "-Xcompiler=-fPIC,-w",
            f"-I{deform_attn_cuda.HERE}",
            f"-DVECTOR_REDUCTION={request.param}",
            "-o",
            library,
            Path(__file__).parent / "cuda_on_cpu/cuda_on_cpu.cpp",
        ],
        check=True,
    )
    run = ctypes.CDLL(str(library)).forward_and_backward
    run.restype = ctypes.c_longlong

    def path(level_shapes, tensors, upstream_of=upstream_of):
        value, reference, offsets, logits = (tensor.detach() for tensor in tensors)
        (B, N, h, c), (Q, L, P) = value.shape, (logits.shape[dim] for dim in (1, 3, 4))
        output = torch.full((B, Q, h * c), torch.nan, dtype=value.dtype)  # what is to be written whole
        upstream = upstream_of(output)
        grads = [
            torch.zeros_like(value, dtype=logits.dtype),
            torch.zeros_like(reference),
            torch.full_like(offsets, torch.nan),
            torch.full_like(logits, torch.nan),
        ]
        sizes = [B, N, h, c, Q, L, P, reference.dim() == 3, *(size for shape in level_shapes for size in shape)]
        data = [tensor.data_ptr() for tensor in (value, reference, offsets, logits, output, upstream, *grads)]
        sizes, data = (ctypes.c_int * len(sizes))(*sizes), (ctypes.c_void_p * len(data))(*data)
        path.numbers_added = run(str(value.dtype).encode(), sizes, data)
        assert path.numbers_added >= 0, "some threads wait for ever"
        return output, grads[0].to(value.dtype), *grads[1:]

    return path


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems)
def test_the_cuda_source_run_block_by_block_agrees_with_the_fallback(cuda_on_cpu, dtype, problem):
    tensors = inputs(**problem, dtype=dtype)
    assert_agrees(cuda_on_cpu(problem["level_shapes"], tensors), problem["level_shapes"], tensors)


@pytest.mark.parametrize("broken", INPUTS)
def test_the_cuda_source_shows_what_is_not_a_number_where_the_fallback_does(cuda_on_cpu, broken):
    tensors = dict(zip(INPUTS, inputs(P=4, dtype=torch.float32), strict=True))
    tensors[broken].data.view(-1)[::41] = torch.nan
    expected = deform_attn_pytorch(tensors["value"], LEVELS, *list(tensors.values())[1:])
    assert 0 < expected.isnan().sum() < expected.numel()
    output, *_ = cuda_on_cpu(LEVELS, tuple(tensors.values()))
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("broken", [*INPUTS, "upstream"])
@pytest.mark.parametrize("what", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("boxes", [False, True])
def test_the_cuda_source_and_the_cpu_kernel_show_what_is_not_finite_in_the_same_gradients(
    cuda_on_cpu, boxes, what, broken
):
    needs_kernel("cpu")
    tensors = dict(zip(INPUTS, inputs(P=4, Q=40, c=8, boxes=boxes, dtype=torch.float32), strict=True))
    tensors["offsets"].data[:, ::3] += 1000  # all outside
    upstream = upstream_of(torch.empty(2, 40, 24)).clone()
    (tensors | {"upstream": upstream})[broken].data.view(-1)[::41] = what
    expected = outputs(deform_attn, LEVELS, tuple(tensors.values()), lambda _: upstream)
    for a, b in zip(cuda_on_cpu(LEVELS, tuple(tensors.values()), lambda _: upstream), expected, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("c, shift", [(32, False), (32, True), (33, False), (72, True)], ids=str)
def test_the_cuda_source_takes_many_blocks_of_queries_and_tensors_of_any_alignment(cuda_on_cpu, dtype, c, shift):
    tensors = inputs(Q=150, c=c, P=3, dtype=dtype)
    if shift:
        tensors = [misaligned(tensor) for tensor in tensors]
    assert_agrees(cuda_on_cpu(LEVELS, tensors), LEVELS, tensors)


@pytest.mark.parametrize("shapes", [[(19, 21), (5, 9), (1, 1)], [(1, 30), (30, 1)], [(8, 8)]], ids=str)
@pytest.mark.parametrize("c", [4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_cuda_source_serves_every_token_of_every_level_in_tiles(cuda_on_cpu, dtype, c, shapes):
    tensors = inputs(shapes, Q=sum(H * W for H, W in shapes), h=2, c=c, dtype=dtype)
    assert_agrees(cuda_on_cpu(shapes, tensors), shapes, tensors)


@pytest.mark.parametrize("c", [136, 264])
def test_the_cuda_source_takes_more_channels_than_a_warp_holds_at_once(cuda_on_cpu, c):
    tensors = inputs(c=c, P=11, dtype=torch.float32)
    assert_close(cuda_on_cpu(LEVELS, tensors), outputs(deform_attn_pytorch, LEVELS, tensors), 1e-5)


def test_what_a_block_of_queries_adds_to_a_token_it_adds_once(cuda_on_cpu):
    level_shapes, middle = [(8, 8)], 3.25 / 8  # weights of 1/4 and 3/4, upstream in whole numbers: sums are exact
    value, reference, offsets, logits = inputs(level_shapes, B=1, Q=128, h=1, c=32, P=1, dtype=torch.float32)
    reference.data.fill_(middle)
    offsets.data.zero_()
    tensors = value, reference, offsets, logits
    upstream = torch.arange(128.0 * 32).remainder(13).sub(6).view(1, 128, 32)
    actual = cuda_on_cpu(level_shapes, tensors, lambda _: upstream)
    expected = outputs(deform_attn_pytorch, level_shapes, tensors, lambda _: upstream)
    assert_close(actual, expected, 1e-5)
    assert torch.equal(actual[1], expected[1])
    blocks, corners, of_references = 128 // 64, 4, 128 * 2
    assert cuda_on_cpu.numbers_added == blocks * corners * 32 + of_references


@pytest.fixture(scope="module")
def compiled_for(nvcc, tmp_path_factory):
    """A function: compute capability without its dot -> the file of machine code, and what each kernel takes."""
    return functools.cache(lambda capability: sass.compile_kernels(nvcc, capability, tmp_path_factory.mktemp("cubin")))


@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_the_cuda_kernels_compile_without_spills(compiled_for, architecture):
    _, resources = compiled_for(architecture)
    assert len(resources) == 16  # 4 types, 2 widths, 2 directions
    assert not any(spilled for registers, shared, spilled in resources.values())


@pytest.fixture(scope="module")
def machine_code(nvcc, compiled_for):
    """Kernel -> its instructions and loops, for sm_90."""
    nvdisasm = sass.find_nvdisasm(nvcc)
    if nvdisasm is None:
        pytest.skip("no nvdisasm")
    return sass.instructions_of_kernels(nvdisasm, compiled_for(90)[0])


@pytest.mark.parametrize(
    "direction, dtype, width, millions",
    [
        ("forward", "float32", 4, 36),
        ("forward", "float16", 8, 36),
        ("forward", "bfloat16", 8, 36),
        ("backward", "float32", 8, 120),
        ("backward", "float16", 8, 120),
        ("backward", "bfloat16", 8, 120),
    ],
)
def test_the_encoder_costs_few_instructions(machine_code, direction, dtype, width, millions):
    assert sass.warp_instructions(*machine_code[direction, dtype, width], dtype, width) <= 1e6 * millions


@pytest.mark.parametrize("architecture", [80, 90])
def test_additions_to_memory_wait_for_nothing(nvcc, compiled_for, architecture):
    """A generic atomic asks first where its address lies, and branches on the answer."""
    nvdisasm = sass.find_nvdisasm(nvcc)
    if nvdisasm is None:
        pytest.skip("no nvdisasm")
    for kernel, (instructions, _) in sass.instructions_of_kernels(nvdisasm, compiled_for(architecture)[0]).items():
        assert not any("QSPC" in text or "ATOM.E" in text or "ATOMG" in text for text in instructions), kernel
        assert any("RED" in text for text in instructions) == (kernel[0] == "backward"), kernel


@pytest.mark.parametrize("dtype", sass.BYTES)
def test_the_cuda_kernels_move_16_bytes_at_once(machine_code, dtype):
    instructions, _ = machine_code["forward", dtype, 16 // sass.BYTES[dtype]]
    for move in ("LDG.E.128", "LDS.128", "STS.128", "STG.E.128"):
        assert any(move in text for text in instructions), move
    instructions, _ = machine_code["backward", dtype, 4 if dtype == "float64" else 8]
    assert ("REDG.E.ADD.F32x4" in " ".join(instructions)) == (dtype != "float64")


# ---- The CUDA kernels on a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@needs_gpu
def test_where_there_are_a_gpu_and_its_nvcc_the_kernel_runs(nvcc):
    """Others would skip, or pass with the fallback."""
    assert status("cuda") == "deform_attn: CUDA kernel"


@needs_gpu
def test_a_cuda_graph_replays_it_on_new_inputs():
    needs_kernel("cuda")
    tensors = inputs(dtype=torch.float32, device="cuda")
    static = [tensor.detach().clone() for tensor in tensors]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        deform_attn(static[0], LEVELS, *static[1:])
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = deform_attn(static[0], LEVELS, *static[1:])
    static[0].mul_(-2)
    graph.replay()
    torch.testing.assert_close(output, -2 * deform_attn_pytorch(tensors[0], LEVELS, *tensors[1:]))


@needs_gpu
def test_it_runs_on_the_current_stream():
    needs_kernel("cuda")
    value, *others = (tensor.detach() for tensor in inputs(dtype=torch.float32, device="cuda"))
    expected = deform_attn(value, LEVELS, *others)
    late = torch.zeros_like(value)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # so that another stream would read zeros
        late.copy_(value)
        output = deform_attn(late, LEVELS, *others)
    stream.synchronize()
    assert torch.equal(output, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
def test_it_runs_on_the_device_of_its_tensors():
    needs_kernel("cuda")
    tensors = inputs(dtype=torch.float32, device="cuda:1")
    assert_close(outputs(deform_attn, LEVELS, tensors), outputs(deform_attn_pytorch, LEVELS, tensors), 1e-5)


@needs_gpu
def test_more_than_2_to_the_31_elements_are_addressed():
    needs_kernel("cuda", torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 30e9:
        pytest.skip("less than 30 GB of GPU memory are free")
    B, shapes = 2100, [(64, 64)]  # 2100 * 4096 * 8 * 32 = 2.2e9 elements
    value = torch.zeros(B, 4096, 8, 32, dtype=torch.bfloat16, device="cuda").requires_grad_()
    centre, offsets = torch.full((1, 2), 63.5 / 64, device="cuda"), torch.zeros(B, 1, 8, 1, 1, 2, device="cuda")
    with torch.no_grad():
        value[-1, -1] = 1
    output = deform_attn(value, shapes, centre, offsets, offsets[..., 0])
    assert (output[-1] == 1).all() and (output[:-1] == 0).all()
    output.backward(torch.ones_like(output))
    assert (value.grad[:, -1] == 1).all() and value.grad.sum(dtype=torch.float64) == B * 8 * 32


@needs_gpu
def test_deterministic_algorithms_are_asked_for_in_vain():
    needs_kernel("cuda")
    tensors = inputs(dtype=torch.float32, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            outputs(deform_attn, LEVELS, tensors)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- Build and dispatch


def test_the_first_use_says_once_which_path_runs(capsys, monkeypatch):
    monkeypatch.setattr(deform_attn_cuda, "_paths", {})
    monkeypatch.setattr(deform_attn_cuda, "SAID", set())
    value, *others = inputs(dtype=torch.float32)
    for _ in range(2):
        deform_attn(value, LEVELS, *others)
    assert capsys.readouterr().err == status("cpu") + "\n"


@pytest.mark.parametrize(
    "stamp, reason",
    [
        (None, "not built: run make build"),
        ({"torch": "1.0"}, "built for PyTorch 1.0, this is"),
        ({"torch": torch.__version__, "sources": "0"}, "its sources have changed: run make build"),
        ({"torch": torch.__version__, "sources": None, "library": "gone.so"}, "cannot be loaded, run make build: "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_library_that_cannot_serve_is_named_and_the_fallback_runs(stamp, reason, tmp_path, monkeypatch):
    if stamp:
        stamp = {"sources": deform_attn_cuda.sources_digest()} | {k: v for k, v in stamp.items() if v}
        (tmp_path / "stamp.json").write_text(json.dumps(stamp))
    monkeypatch.setattr(deform_attn_cuda, "STAMP", tmp_path / "stamp.json")
    monkeypatch.setattr(deform_attn_cuda, "_missing", deform_attn_cuda._load())
    monkeypatch.setattr(deform_attn_cuda, "_paths", {})
    assert status("cpu").startswith(f"deform_attn: PyTorch fallback ({reason}")
    value, *others = inputs(dtype=torch.float32)
    expected = deform_attn_pytorch(value, LEVELS, *others)
    assert torch.equal(deform_attn(value, LEVELS, *others), expected)


def test_a_type_without_a_kernel_is_named():
    assert "float16" in status("cpu", torch.float16)


def built_files():
    return {path: path.stat().st_mtime_ns for path in build.BUILD.glob("*")}


def test_building_again_does_nothing(capsys):
    needs_kernel("cpu")
    before = built_files()
    assert build.main() == 0 and "up to date" in capsys.readouterr().out and built_files() == before


def test_without_a_compiler_one_line_says_what_to_install(capsys, monkeypatch):
    before = built_files()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main() == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "apt install g++" in out and built_files() == before


def test_a_build_that_fails_leaves_what_was_there(capsys, monkeypatch):
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    before = built_files()
    monkeypatch.setenv("CXXFLAGS", "--no-such-flag")
    assert build.main() == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no-such-flag" in error and built_files() == before


@pytest.mark.parametrize("text", ["", '{"library": "deform', "null", "{}"])
def test_a_stamp_that_is_not_whole_is_as_good_as_none(text, tmp_path, monkeypatch):
    (tmp_path / "stamp.json").write_text(text)
    monkeypatch.setattr(deform_attn_cuda, "STAMP", tmp_path / "stamp.json")
    assert set(deform_attn_cuda._load().values()) == {"not built: run make build"}


def test_a_changed_source_ages_the_library(tmp_path, monkeypatch):
    for path in deform_attn_cuda.HERE.glob("*.[ch]*"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(deform_attn_cuda, "HERE", tmp_path)
    before = deform_attn_cuda.sources_digest()
    (tmp_path / "operator.cpp").write_text("")
    assert deform_attn_cuda.sources_digest() != before


@pytest.fixture
def toolchain(tmp_path):
    """Starts builds of a copy of the package by a compiler and an nvcc that only take their time."""
    without = shutil.ignore_patterns("build", "__pycache__")
    shutil.copytree(deform_attn_cuda.HERE, tmp_path / "deform_attn_cuda", ignore=without)
    (tmp_path / "bin").mkdir()
    for name in ("c++", "nvcc"):
        (tmp_path / "bin" / name).write_text(
            f"#!/bin/sh\ncase $1 in --*) echo {name} release {torch.version.cuda}; exit;; esac\n"
            'sleep 0.5; for output; do :; done; echo "$*" > "$output"\n'
        )
        (tmp_path / "bin" / name).chmod(0o755)

    def start(**environment):
        environment = {"CXX": str(tmp_path / "bin/c++"), "CUDA_HOME": str(tmp_path)} | environment
        return subprocess.Popen(
            [sys.executable, "-m", "deform_attn_cuda.build"],
            cwd=tmp_path,
            text=True,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA")
def test_two_builds_at_once_in_one_folder_both_end_well_and_keep_gpu_support(toolchain, tmp_path):
    builds = [toolchain(CXXFLAGS=flags) for flags in ("-DFIRST", "-DSECOND")]
    for process in builds:
        assert "built the CPU and CUDA kernels" in process.communicate()[0] and process.returncode == 0
    folder = tmp_path / "deform_attn_cuda/build"
    stamp = json.loads((folder / "stamp.json").read_text())
    assert stamp["cuda"] == "" and (folder / stamp["library"]).exists()
    assert len(list(folder.glob("*.so"))) == 2 and not [path for path in folder.iterdir() if path.is_dir()]


@pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is built without CUDA")
def test_a_build_removes_what_is_older_than_a_day(toolchain, tmp_path):
    old, recent = (tmp_path / f"deform_attn_cuda/build/{name}.o" for name in ("old", "recent"))
    old.parent.mkdir()
    for path in (old, recent):
        path.write_text("")
    os.utime(old, (0, 0))
    assert toolchain().wait() == 0
    assert recent.exists() and not old.exists()


@pytest.mark.parametrize("cxx", ["g++ -m64", "ccache g++ -m64", "/usr/bin/ccache /usr/bin/g++ -m64"])
def test_cxx_may_hold_a_launcher_and_options(cxx):
    plan, link, libraries = build.commands(cxx.split(), "nvcc")
    assert " ".join(link).startswith(cxx) and not any(word.endswith(".o") for word in link)
    assert plan["operator_cuda"][1:4] == ["-ccbin", cxx.split()[-2], "-Xcompiler=-m64"]


def test_flags_of_distributions_keep_standard_speed_and_gpu_support(nvcc, monkeypatch, tmp_path):
    compiler = build.find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setenv("CXXFLAGS", "-std=c++17 -march=nocona -O2 -Wp,-D_FORTIFY_SOURCE=2 -DA=1,2")
    plan, *_ = build.commands(compiler, nvcc)
    assert all("-std=c++17" not in command for stem, command in plan.items() if stem != "cuda_kernel")
    for stem, command in plan.items():
        if stem.startswith("cpu"):
            assert command.index("-O2") < command.index("-O3")
            assert [flag for flag in command if flag.startswith("-march")][1:] == build.INSTRUCTION_SETS[stem[4:]][:1]
    (tmp_path / "empty.cpp").write_text("int numbers[] = {A};\n#ifndef _FORTIFY_SOURCE\n#error\n#endif\n")
    flags = [word for word in plan["operator_cuda"] if word.startswith("-Xcompiler")]
    build.run([nvcc, *flags, "-c", str(tmp_path / "empty.cpp")], tmp_path / "empty.o")


def test_an_nvcc_of_the_working_directory_is_not_run(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\ntouch ran\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    build.find_nvcc()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("release, says", [("12.9", "is of CUDA 12, PyTorch of CUDA"), (None, "no nvcc found")])
def test_an_nvcc_that_does_not_fit_is_named_before_anything_is_compiled(release, says, tmp_path, monkeypatch):
    if release:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.86\n")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build.Path, "is_file", lambda path: tmp_path in path.parents)
    path, reason = build.find_nvcc()
    assert path is None and says in reason and "nvidia-cuda-nvcc==99.0.*" in reason


def test_architectures_are_those_asked_for(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;9.0a+PTX")
    assert build.architectures("nvcc") == [
        "-gencode=arch=compute_86,code=[sm_86]",
        "-gencode=arch=compute_90a,code=[sm_90a,compute_90a]",
    ]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="names Hopper"):
        build.architectures("nvcc")


@pytest.mark.parametrize("gpus, compiled", [([(9, 0), (5, 0)], ["90"]), ([(5, 0)], ["80", "90"]), ([], ["80", "90"])])
def test_a_gpu_that_nvcc_does_not_know_does_not_stop_the_build(nvcc, gpus, compiled, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    assert re.findall(r"arch=compute_(\d+)", " ".join(build.architectures(nvcc))) == compiled


def test_where_there_is_a_compiler_there_is_a_kernel():
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert status("cpu") == "deform_attn: CPU kernel"
