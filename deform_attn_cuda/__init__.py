"""Multi-scale deformable attention (Zhu et al., Deformable DETR, 2021, Eq. 2) for CPUs and GPUs.

    output[b, q, head] = sum over levels and points of weight * bilinear(value[b, level, head], location)

Weights are the softmax of logits, and locations lie around each query's reference point; both are computed inside.

`deform_attn` picks the compiled operator where there is one for the device and type (`make build` makes it),
else `deform_attn_pytorch`, its readable specification. One line at first use says which path runs and why.
"""

import functools
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

HERE = Path(__file__).parent
STAMP = HERE / "build/stamp.json"  # written by build.py: the library's name, and what it was built for and from
KERNEL_TYPES = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16),
    "cuda": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}


def deform_attn(value, level_shapes, reference, offsets, logits):
    """Sample `value` around each query and sum what was sampled by its weights.

    value         [B N h c]      tokens of all levels, each level row by row, N = sum of H * W; any float type
    level_shapes  [(H, W), ...]  integers, one pair for each of the L levels
    reference     [Q 2]          reference points (x, y): an offset of 1 is one cell of its level
                  or [B Q 4]     reference boxes (cx, cy, w, h): an offset of P reaches from the centre to the border.
                                 In units of the level: (0, 0) is the top left, (1, 1) the bottom right corner,
                                 (i + 0.5) / W the centre of cell i
    offsets       [B Q h L P 2]  (x, y). Outside of the level there are zeros (`grid_sample` with
                                 align_corners=False). Infinity is outside, NaN gives NaN.
    logits        [B Q h L P]    their softmax over all L * P points of a head weighs the samples
    returns       [B Q h*c]      in the type of `value`

    Sums are kept in float32 (float64 for float64), to which all but `value` are cast. Under autocast `value` is cast
    to autocast's type. ValueError names the argument whose shape, type or device is wrong. On a GPU, call it once
    before a graph is captured, as PyTorch asks of all that is captured: the first call checks the kernel. Kernels take
    up to 64 levels, the CUDA kernel up to 65,535 images and heads, and say so beyond.
    """
    _check(value, level_shapes, reference, offsets, logits)
    device = value.device
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        value = value.to(torch.get_autocast_dtype(device.type))
    precise = torch.float64 if value.dtype == torch.float64 else torch.float32
    reference = reference.to(precise)
    offsets = offsets.to(precise)
    logits = logits.to(precise)
    if _compiled(device, value.dtype):
        sizes = [size for shape in level_shapes for size in shape]
        return torch.ops.deform_attn.forward(value, sizes, reference, offsets, logits)
    return deform_attn_pytorch(value, level_shapes, reference, offsets, logits)


def deform_attn_pytorch(value, level_shapes, reference, offsets, logits):
    """The specification of `deform_attn`; all but the value are already in the type of the sums."""
    B, _, h, c = value.shape
    Q = offsets.shape[1]
    L = len(level_shapes)
    P = offsets.shape[4]
    locations = locate(level_shapes, reference, offsets).clamp(-1, 2)  # all of that is outside, infinity too
    levels = value.to(logits.dtype).split([H * W for H, W in level_shapes], 1)
    samples = []
    for level, (H, W) in enumerate(level_shapes):
        image = levels[level].permute(0, 2, 3, 1).reshape(B * h, c, H, W)
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(B * h, Q, P, 2)
        samples.append(nnf.grid_sample(image, grid, align_corners=False))
    weights = logits.flatten(3).softmax(-1).transpose(1, 2).reshape(B * h, 1, Q, L * P)
    output = (torch.cat(samples, -1) * weights).sum(-1)  # [B*h c Q]
    return output.view(B, h * c, Q).transpose(1, 2).to(value.dtype)


def locate(level_shapes, reference, offsets):
    """The sampling locations [B Q h L P 2] of reference points and offsets."""
    if reference.shape[-1] == 2:
        sides = [offsets.new_full((1,), side) for H, W in level_shapes for side in (W, H)]  # no copy: graphs forbid it
        return reference[:, None, None, None] + offsets / torch.cat(sides).view(-1, 1, 2)
    center, size = reference[:, :, None, None, None].chunk(2, -1)
    return center + offsets * size * (0.5 / offsets.shape[4])


def status(device=None, dtype=torch.float32):
    """The line that says which path runs for a device (None: a GPU if there is one) and type, and why."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if dtype in KERNEL_TYPES.get(device.type, ()):
        problem = _missing[device.type] or _self_check(device)
    else:
        problem = f"no kernel for {dtype} on {device.type}"
    return f"deform_attn: PyTorch fallback ({problem})" if problem else f"deform_attn: {device.type.upper()} kernel"


@functools.cache
def _self_check(device):
    """What is wrong with a tiny call on this device, or an empty string: a GPU may not be one of those compiled for."""
    with _disable_current_modes(), torch.inference_mode(False):
        try:
            value, reference, offsets, logits = (
                torch.linspace(-0.2, 1.2, math.prod(shape), device=device, dtype=torch.float32).view(shape)
                for shape in ((1, 15, 1, 8), (4, 2), (1, 4, 1, 1, 2, 2), (1, 4, 1, 1, 2))
            )
            output = torch.ops.deform_attn.forward(value, [3, 5], reference, offsets, logits)
            expected = deform_attn_pytorch(value, [(3, 5)], reference, offsets, logits)
            return "" if torch.allclose(output, expected, atol=1e-5) else "its first call gave wrong results"
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return f"its first call failed: {str(error).splitlines()[0]}"


@torch.compiler.assume_constant_result
def _compiled(device, dtype):
    """Whether the compiled operator is used. Prints `status` at the first call."""
    if (device, dtype) not in _paths:
        line = status(device, dtype)
        _paths[device, dtype] = line.endswith("kernel")
        if line not in SAID:
            SAID.add(line)
            print(line, file=sys.stderr)
    return _paths[device, dtype]


_paths = {}  # whether the compiled operator is used, by device and type
SAID = set()  # lines of `status` that need not be said again


def sources_digest():
    """Hash of the library's source files."""
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".cu", ".h"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def read_stamp():
    """What build.py wrote, or an empty dict if that is missing or broken."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def _load():
    """Load the compiled operator. Returns for each device why there is no kernel for it, or an empty string."""
    stamp = read_stamp()
    problem = ""
    if not stamp:
        problem = "not built: run make build"
    elif stamp["torch"] != torch.__version__:
        problem = f"built for PyTorch {stamp['torch']}, this is {torch.__version__}: run make build"
    elif stamp["sources"] != sources_digest():
        problem = "its sources have changed: run make build"
    else:
        try:
            torch.ops.load_library(STAMP.parent / stamp["library"])
        except OSError as error:
            problem = f"cannot be loaded, run make build: {error}"
    if problem:
        return {"cpu": problem, "cuda": problem}
    _register()
    return {"cpu": "", "cuda": stamp["cuda"]}


def _register():
    """Tell PyTorch how to trace and differentiate the operators, and what they cost."""

    @torch.library.register_fake("deform_attn::forward")
    def _(value, level_shapes, reference, offsets, logits):
        B, _, h, c = value.shape
        return value.new_empty(B, offsets.shape[1], h * c)

    @torch.library.register_fake("deform_attn::backward")
    def _(grad_output, value, level_shapes, reference, offsets, logits, reference_requires_grad):
        return tuple(x.new_empty(x.shape) for x in (value, reference, offsets, logits))

    def setup_context(ctx, inputs, output):
        value, ctx.level_shapes, *others = inputs
        ctx.save_for_backward(value, *others)

    def backward(ctx, grad_output):
        value, *others = ctx.saved_tensors
        grad_value, *grad_others = torch.ops.deform_attn.backward(
            grad_output, value, ctx.level_shapes, *others, ctx.needs_input_grad[2]
        )
        return grad_value, None, *grad_others

    torch.library.register_autograd("deform_attn::forward", backward, setup_context=setup_context)

    @register_flop_formula(torch.ops.deform_attn.forward)
    def _(value, level_shapes, reference, offsets, *_, **__):  # a sample reads four corners
        return 4 * 2 * value[-1] * math.prod(offsets[:-1])

    @register_flop_formula(torch.ops.deform_attn.backward)
    def _(grad_output, value, level_shapes, reference, offsets, *_, **__):  # two products with each corner
        return 4 * 4 * value[-1] * math.prod(offsets[:-1])


def _check(value, level_shapes, reference, offsets, logits):
    """Raise ValueError if an argument's shape, type or device is wrong."""
    B, N, h, _ = value.shape if value.dim() == 4 else (0, -1, 0, 0)
    Q, P = offsets.shape[1:5:3] if offsets.dim() == 6 else (0, 0)
    L = len(level_shapes)
    tokens = sum(H * W for H, W in level_shapes)
    if tokens != N:
        raise ValueError(f"deform_attn: value must be [B {tokens} h c], not {list(value.shape)}")
    if offsets.shape != (B, Q, h, L, P, 2):
        raise ValueError(f"deform_attn: offsets must be [{B} Q {h} {L} P 2], not {list(offsets.shape)}")
    if logits.shape != (B, Q, h, L, P):
        raise ValueError(f"deform_attn: logits must be {[B, Q, h, L, P]}, not {list(logits.shape)}")
    if reference.shape != ((Q, 2) if reference.dim() == 2 else (B, Q, 4)):
        raise ValueError(f"deform_attn: reference must be {[Q, 2]} or {[B, Q, 4]}, not {list(reference.shape)}")
    for name, tensor in (("value", value), ("reference", reference), ("offsets", offsets), ("logits", logits)):
        if not tensor.is_floating_point():
            raise ValueError(f"deform_attn: {name} must be of a float type, not {tensor.dtype}")
        if tensor.device != value.device:
            raise ValueError(f"deform_attn: {name} is on {tensor.device}, value on {value.device}")


_missing = _load()
