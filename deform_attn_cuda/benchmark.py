"""Time `deform_attn` on this machine, kernel against fallback: `python -m deform_attn_cuda.benchmark`.

Shapes are those of an 800x1216 image: an encoder with a query for each of the 20,197 tokens, and a decoder of 300
queries. Offsets are `local`, a ring of growing radius around each query with noise of one cell, as the initialised
model samples, or `random`, anywhere in the image, the worst for caches. Both paths run in turn; medians are printed.
"""

import argparse
import math
import statistics
import time

import torch

from . import deform_attn, deform_attn_pytorch, status

LEVELS = [(100, 152), (50, 76), (25, 38), (13, 19)]
HEADS = 8
CHANNELS = 32
POINTS = 4
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(queries, pattern, dtype, device):
    """Value, reference points, offsets and logits of one image; `queries` None: one for each token, at its place."""
    generator = torch.Generator().manual_seed(0)
    if queries is None:
        grids = [torch.cartesian_prod((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W) for H, W in LEVELS]
        reference = torch.cat(grids).flip(-1)
    else:
        reference = torch.rand(queries, 2, generator=generator)
    shape = 1, len(reference), HEADS, len(LEVELS), POINTS
    if pattern == "local":
        angle = torch.arange(HEADS) * 2 * math.pi / HEADS
        ring = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
        offsets = ring + torch.randn(*shape, 2, generator=generator)
    else:
        locations = torch.rand(*shape, 2, generator=generator)
        offsets = (locations - reference[:, None, None, None]) * torch.tensor(LEVELS).flip(-1)[:, None]
    value = torch.randn(1, sum(H * W for H, W in LEVELS), HEADS, CHANNELS, generator=generator)
    logits = torch.randn(shape, generator=generator)
    return value.to(device, dtype), reference.to(device), offsets.to(device), logits.to(device)


def forward(path, value, reference, offsets, logits):
    with torch.no_grad():
        path(value, LEVELS, reference, offsets, logits)


def forward_and_backward(path, value, reference, offsets, logits):
    leaves = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
    path(leaves[0], LEVELS, reference, *leaves[1:]).sum().backward()


def milliseconds(step, path, tensors):
    """Of one call. A GPU gets 20 at once, as Python takes longer to launch a small one than the GPU to run it."""
    device = getattr(torch, tensors[0].device.type)
    calls = 20 if device is torch.cuda else 1
    device.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step(path, *tensors)
    device.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES, help="types of the value")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is printed (default 5)")
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {args.device}, {machine}; {status(args.device)}")
    print(f"{'milliseconds of a call':44} {'fallback':>9} {'kernel':>9}")
    for name in args.types:
        kernel = status(args.device, TYPES[name]).endswith("kernel")
        paths = [deform_attn_pytorch, deform_attn] if kernel else [deform_attn_pytorch]
        for queries, pattern in ((None, "local"), (None, "random"), (300, "local")):
            tensors = inputs(queries, pattern, TYPES[name], args.device)
            for step in (forward, forward_and_backward):
                case = f"{'encoder' if queries is None else 'decoder'}, {pattern}, {name}, {step.__name__}"
                times = [[milliseconds(step, path, tensors) for path in paths] for _ in range(args.repeats + 1)]
                row = " ".join(f"{statistics.median(column):9.2f}" for column in zip(*times[1:]))  # without the warm-up
                print(f"{case.replace('_', ' '):44} {row}", flush=True)


if __name__ == "__main__":
    main()
