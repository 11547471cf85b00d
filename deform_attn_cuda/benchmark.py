"""Time every path of `deform_attn` on this machine: `python -m deform_attn_cuda.benchmark`.

Shapes are those of a 800x1216 image: an encoder whose 20,197 tokens all ask, and a decoder of 300 queries. Locations
are `local`, a ring of growing radius around each query with noise of one pixel, as the initialised model samples, or
`random`, uniform over the image, the worst for caches. Paths are timed in turn in one process; medians are printed.
With --check, the tests and on a GPU compute-sanitizer run before.
"""

import argparse
import ctypes
import functools
import importlib.util
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as nnf

from . import HERE, KERNEL_TYPES, deform_attn, deform_attn_pytorch, locate, status

LEVELS = [(100, 152), (50, 76), (25, 38), (13, 19)]
HEADS, CHANNELS, POINTS = 8, 32, 4
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def grid_sample(value, level_shapes, reference, offsets, logits):
    """The classic formulation of DETR repositories: one `grid_sample` for each level, all samples kept."""
    B, _, h, c = value.shape
    _, Q, _, L, P, _ = offsets.shape
    locations, weights = locate(level_shapes, reference, offsets), logits.flatten(3).softmax(-1)
    sampled = []
    for level, tokens in enumerate(value.split([H * W for H, W in level_shapes], 1)):
        image = tokens.permute(0, 2, 3, 1).reshape(B * h, c, *level_shapes[level])
        grid = (2 * locations[:, :, :, level] - 1).transpose(1, 2).reshape(B * h, Q, P, 2).to(value.dtype)
        sampled.append(nnf.grid_sample(image, grid, padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).reshape(B * h, 1, Q, L * P).to(value.dtype)
    return (torch.cat(sampled, -1) * weights).sum(-1).view(B, h * c, Q).transpose(1, 2)


@functools.cache
def shapes_and_starts(device):
    shapes = torch.tensor(LEVELS, device=device)
    return shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)


def kernel_of_2020(value, level_shapes, reference, offsets, logits):
    """The kernel that came with Deformable DETR, as the package torch-ms-deform-attn distributes it."""
    from torch_ms_deform_attn import ms_deform_attn

    shapes, starts = shapes_and_starts(value.device)
    locations, weights = locate(level_shapes, reference, offsets), logits.flatten(3).softmax(-1).view(logits.shape)
    return ms_deform_attn(value, shapes, starts, locations.to(value.dtype), weights.to(value.dtype))


def inputs(batch, queries, pattern, dtype, device):
    """Inputs of one call; `queries` None: one for each token, at its place."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(H * W for H, W in LEVELS)
    centres = (
        torch.cat(
            [torch.cartesian_prod((torch.arange(H) + 0.5) / H, (torch.arange(W) + 0.5) / W).flip(-1) for H, W in LEVELS]
        )
        if queries is None
        else torch.rand(queries, 2, generator=generator)
    )
    shape = batch, len(centres), HEADS, len(LEVELS), POINTS
    if pattern == "local":
        angle = torch.arange(HEADS) * 2 * math.pi / HEADS
        ring = torch.stack([angle.cos(), angle.sin()], -1)[:, None, None] * torch.arange(1, POINTS + 1)[:, None]
        offsets = ring + torch.randn(*shape, 2, generator=generator)
    else:
        locations = torch.rand(*shape, 2, generator=generator)
        offsets = (locations - centres[:, None, None, None]) * torch.tensor(LEVELS).flip(-1)[:, None]
    value = torch.randn(batch, tokens, HEADS, CHANNELS, generator=generator)
    logits = torch.randn(shape, generator=generator)
    return value.to(device, dtype), centres.to(device), offsets.to(device), logits.to(device)


def compulsory_and_gathered(batch, queries, dtype):
    """Bytes a forward must move to and from memory at least, and bytes of the corner rows it reads."""
    tokens = sum(H * W for H, W in LEVELS)
    queries = queries or tokens
    points = batch * queries * HEADS * len(LEVELS) * POINTS
    row = CHANNELS * dtype.itemsize
    return batch * (tokens + queries) * HEADS * row + points * 3 * 4, points * 4 * row


def bounds(compulsory, gathered):
    """Milliseconds below which this GPU cannot be, if its memory, L2 or L1 were all that limits it.

    Rates are 128 bytes a clock and multiprocessor from L1, where all rows are found there, and 3400 bytes a clock from
    L2, where none is: two thirds of what the data sheets of A100 and H100 name, as it is what is reached.
    """
    gpu = torch.cuda.get_device_properties()
    memory = 2e3 * gpu.memory_clock_rate * gpu.memory_bus_width / 8
    return {
        "memory": 1e3 * compulsory / memory,
        "L2": gathered / (3400 * gpu.clock_rate),
        "L1": gathered / (128 * gpu.multi_processor_count * gpu.clock_rate),
    }


def stopwatch(function, device, calls=10, cold=False):
    """Returns a function that measures the milliseconds of a call.

    On a GPU that is the time of a graph of so many calls, as Python would take longer than a small call; `cold`
    overwrites L2 before.
    """
    if device == "cpu":

        def measured():
            start = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - start)

        return measured

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measured():
        if cold:
            torch.zeros(torch.cuda.get_device_properties().L2_cache_size, device=device)  # float32: four times L2
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / calls

    return measured


def peak_megabytes(function, device):
    """Memory that a call needs beyond what was there before; NaN where that cannot be measured."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    reset, process = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return math.nan

    def megabytes(field):
        return int(next(line for line in process.read_text().splitlines() if line.startswith(field)).split()[1]) / 1e3

    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that its next use is seen
    reset.write_text("5")  # forget the peak of resident memory
    before = megabytes("VmRSS")
    function()
    return megabytes("VmHWM") - before


def measure(batch, queries, pattern, dtype, device, repeats):
    """Rows of the table for one case: one for each path."""
    value, centres, *others = inputs(batch, queries, pattern, dtype, device)
    paths = {"grid_sample": grid_sample, "PyTorch fallback": deform_attn_pytorch}
    if dtype in KERNEL_TYPES.get(device, ()) and "fallback" not in status(device, dtype):
        paths[f"{device.upper()} kernel"] = deform_attn
    if device == "cuda" and importlib.util.find_spec("torch_ms_deform_attn"):
        paths["kernel of 2020"] = kernel_of_2020
    leaves = [tensor.clone().requires_grad_() for tensor in (value, *others)]
    grad = torch.randn_like(grid_sample(value, LEVELS, centres, *others))

    def forward(path):
        with torch.no_grad():
            return path(value, LEVELS, centres, *others)

    def forward_backward(path):
        output = path(leaves[0], LEVELS, centres, *leaves[1:])
        return torch.autograd.grad(output, leaves, grad)

    calls = {
        (name, step): functools.partial(step, path)
        for name, path in paths.items()
        for step in (forward, forward_backward)
    }
    memory = {key: peak_megabytes(call, device) for key, call in calls.items()}  # and warm up
    watches = {key: stopwatch(call, device) for key, call in calls.items()}
    if device == "cuda":
        watches |= {(name, "cold"): stopwatch(calls[name, forward], device, calls=1, cold=True) for name in paths}
    samples = {key: [] for key in watches}
    for _ in range(repeats):
        for key, watch in watches.items():
            samples[key].append(watch())
    times = {key: statistics.median(sample) for key, sample in samples.items()}

    compulsory, gathered = compulsory_and_gathered(batch, queries, dtype)
    limits = bounds(compulsory, gathered) if device == "cuda" else None
    rows = [
        {
            "case": f"{'encoder' if queries is None else 'decoder'} batch {batch} {pattern}",
            "type": str(dtype).removeprefix("torch."),
            "path": name,
            "forward_ms": times[name, forward],
            "forward_backward_ms": times[name, forward_backward],
            "forward_cold_ms": times.get((name, "cold")),
            "bounds_ms": limits,
            "forward_mb": memory[name, forward],
            "forward_backward_mb": memory[name, forward_backward],
            "compulsory_gb_per_s": compulsory / times[name, forward] / 1e6,
            "gathered_gb_per_s": gathered / times[name, forward] / 1e6,
        }
        for name in paths
    ]
    for row in rows:
        row["forward_speedup"] = rows[0]["forward_ms"] / row["forward_ms"]
        row["forward_backward_speedup"] = rows[0]["forward_backward_ms"] / row["forward_backward_ms"]
    return rows


HEADER = (
    f"{'case':24} {'type':9} {'path':17} {'fwd ms':>9} {'x':>6} {'fwd+bwd ms':>11} {'x':>6} {'peak MB':>8} "
    f"{'peak MB':>8} {'gather GB/s':>11}"
)


def text(row):
    return (
        f"{row['case']:24} {row['type']:9} {row['path']:17} {row['forward_ms']:9.2f} {row['forward_speedup']:6.1f} "
        f"{row['forward_backward_ms']:11.2f} {row['forward_backward_speedup']:6.1f} {row['forward_mb']:8.0f} "
        f"{row['forward_backward_mb']:8.0f} {row['gathered_gb_per_s']:11.1f}"
    )


def check():
    """Run the tests, and on a GPU some of them under compute-sanitizer. Returns whether all passed."""
    test = [sys.executable, "-m", "pytest", "-q", str(HERE.parent / "tests/test_deform_attn.py")]
    commands = [test]
    if torch.cuda.is_available():
        places = os.environ["PATH"], "/usr/local/cuda/bin", Path(torch.__file__).parents[1] / "nvidia/cu13/bin"
        sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, places)))
        if sanitizer is None:
            print("compute-sanitizer not found: pip install nvidia-cuda-sanitizer-api")
        commands += [
            [
                sanitizer or "compute-sanitizer",
                "--tool",
                tool,
                "--error-exitcode",
                "1",
                *test,
                "-k",
                "(kernel_and_fallback_agree or many_queries) and cuda",
            ]
            for tool in ("memcheck", "racecheck", "synccheck")
        ]
    passed = True
    for command in commands:
        print(*command, flush=True)
        # With each tensor in memory of its own, memcheck sees what lies outside of it.
        own_memory = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if "--tool" in command else {}
        there = shutil.which(command[0]) is not None
        passed &= there and subprocess.run(command, env=os.environ | own_memory).returncode == 0
    return passed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--types", nargs="+", default=["fp32", "bf16"], choices=TYPES, help="types of the value")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5, help="the median of so many is printed")
    parser.add_argument("--json", type=Path, help="write all figures to this file as well")
    parser.add_argument("--check", action="store_true", help="run the tests and compute-sanitizer before")
    arguments = parser.parse_args()
    passed = not arguments.check or check()
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"PyTorch {torch.__version__}, {arguments.device}, {machine}; {status(arguments.device)}")
    print(HEADER)
    rows = []
    for dtype in (TYPES[name] for name in arguments.types):
        for batch in arguments.batches:
            for queries, pattern in ((None, "local"), (None, "random"), (300, "local")):
                case = measure(batch, queries, pattern, dtype, arguments.device, arguments.repeats)
                rows += case
                print(*map(text, case), sep="\n", flush=True)
                if arguments.device == "cuda":
                    limits = [f"{limit} {ms:.3f} ms" for limit, ms in case[0]["bounds_ms"].items()]
                    cold = [f"{row['path']} {row['forward_cold_ms']:.3f} ms" for row in case]
                    print("  bounds of the forward:", *limits, "; with L2 cold:", *cold)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
