"""Time `deform_attn` on this machine, kernel against fallback: `python -m deform_attn_cuda.benchmark`.

Shapes are those of a 800x1216 image: an encoder whose 20,197 tokens all ask, and a decoder of 300 queries. Offsets are
`local`, a ring of growing radius around each query with noise of one cell, as the initialised model samples, or
`random`, anywhere in the image, the worst for caches. Both paths are timed in turn in one process; medians are printed.
"""

import argparse
import functools
import math
import statistics
import time

import torch

from . import KERNEL_TYPES, deform_attn, deform_attn_pytorch, status

LEVELS = [(100, 152), (50, 76), (25, 38), (13, 19)]
HEADS = 8
CHANNELS = 32
POINTS = 4
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(queries, pattern, dtype, device):
    """Value, reference, offsets and logits of one image; `queries` None: one for each token, at its place."""
    generator = torch.Generator().manual_seed(0)
    if queries is None:
        grids = [torch.cartesian_prod((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W) for H, W in LEVELS]
        centres = torch.cat(grids).flip(-1)
    else:
        centres = torch.rand(queries, 2, generator=generator)
    shape = 1, len(centres), HEADS, len(LEVELS), POINTS
    if pattern == "local":
        angle = torch.arange(HEADS) * 2 * math.pi / HEADS
        ring = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
        offsets = ring + torch.randn(*shape, 2, generator=generator)
    else:
        locations = torch.rand(*shape, 2, generator=generator)
        offsets = (locations - centres[:, None, None, None]) * torch.tensor(LEVELS).flip(-1)[:, None]
    value = torch.randn(1, sum(H * W for H, W in LEVELS), HEADS, CHANNELS, generator=generator)
    logits = torch.randn(shape, generator=generator)
    return value.to(device, dtype), centres.to(device), offsets.to(device), logits.to(device)


def forward(path, value, centres, offsets, logits):
    with torch.no_grad():
        path(value, LEVELS, centres, offsets, logits)


def forward_and_backward(path, value, centres, offsets, logits):
    leaves = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
    path(leaves[0], LEVELS, centres, *leaves[1:]).sum().backward()


def milliseconds(call, device, calls):
    """Of one call, by the clock. A GPU is given several at once, as Python would take longer than a small one."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


def medians(calls, device, repeats):
    """Median milliseconds of each of the calls, which run in turn."""
    for call in calls.values():
        call()
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            times[name].append(milliseconds(call, device, 20 if device == "cuda" else 1))
    return {name: statistics.median(samples) for name, samples in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--types", nargs="+", default=list(TYPES), choices=TYPES, help="types of the value")
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is printed (default 5)")
    arguments = parser.parse_args()
    device = arguments.device
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {device}, {machine}; {status(device)}")
    print(f"{'milliseconds of a call':44} {'fallback':>9} {'kernel':>9}")
    for name in arguments.types:
        for queries, pattern in ((None, "local"), (None, "random"), (300, "local")):
            tensors = inputs(queries, pattern, TYPES[name], device)
            for step in (forward, forward_and_backward):
                paths = {"fallback": deform_attn_pytorch}
                if TYPES[name] in KERNEL_TYPES[device] and "fallback" not in status(device, TYPES[name]):
                    paths["kernel"] = deform_attn
                calls = {key: functools.partial(step, path, *tensors) for key, path in paths.items()}
                times = medians(calls, device, arguments.repeats)
                case = f"{'encoder' if queries is None else 'decoder'}, {pattern}, {name}, {step.__name__}"
                row = " ".join(f"{milliseconds:9.2f}" for milliseconds in times.values())
                print(f"{case.replace('_', ' '):44} {row}", flush=True)


if __name__ == "__main__":
    main()
