"""What the CUDA kernels cost, read from their machine code: `python -m deform_attn_cuda.sass`. It needs no GPU.

Prints for each kernel its registers, shared memory and spills, and the instructions that its warps issue at the shape
of the encoder of a 800x1216 image: 20,197 queries, 8 heads, 32 channels, 16 points; warps that a tile has beyond its
level are left out. Beside them stand the microseconds an H100 needs to issue these instructions, and to read the
corners' rows from L1.
"""

import argparse
import importlib.util
import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import HERE
from .build import find_nvcc

LEVELS, HEADS, CHANNELS, POINTS = [(100, 152), (50, 76), (25, 38), (13, 19)], 8, 32, 16
QUERIES = sum(H * W for H, W in LEVELS)
# How often, in a step, a warp of the backward enters the loop over lists of corners, and that over the corners of a
# list, by the channels of a thread; at the benchmark's local offsets, where a list has 8 corners on average if a warp
# has 8 pairs. A warp sums as many lists at a time as it has pairs and waits for the longest.
LISTS = {8: (3.4, 61.7), 4: (4.6, 47.4), 1: (20.6, 57.2)}
BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
MANGLED = {"f": "float32", "d": "float64", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
KERNEL = re.compile(r"(forward|backward)I(f|d|6__half|13__nv_bfloat16)[fd]Li(\d)E")
MULTIPROCESSORS, MEGAHERTZ = 132, 1755  # of an H100; each issues four instructions and reads 128 bytes of L1 a clock


def kernel_of(name):
    """(direction, type of the value, channels of a thread) of a mangled name that holds a kernel's, else None."""
    match = KERNEL.search(name)
    return match and (match[1], MANGLED[match[2]], int(match[3]))


def compile_kernels(nvcc, architecture, folder):
    """Returns the file of machine code, and for each kernel its (registers, bytes of shared memory, spilled bytes)."""
    cubin = Path(folder) / f"sm_{architecture}.cubin"
    done = subprocess.run(
        [
            nvcc,
            "-O3",
            "-std=c++17",
            f"-arch=sm_{architecture}",
            "-cubin",
            "-Xptxas=-v",
            "-o",
            cubin,
            HERE / "cuda_kernel.cu",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    resources = {}
    for part in done.stderr.split("Compiling entry function")[1:]:
        spilled, registers, shared = (
            re.search(pattern, part)
            for pattern in (r"(\d+) bytes spill stores", r"Used (\d+) registers", r"(\d+) bytes smem")
        )
        resources[kernel_of(part)] = int(registers[1]), int(shared[1]), int(spilled[1])
    return cubin, resources


def find_nvdisasm(nvcc):
    """NVIDIA's disassembler: the system's, CUDA's, or that of Triton, which comes with PyTorch; else None."""
    triton = importlib.util.find_spec("triton")
    places = [
        shutil.which("nvdisasm"),
        Path(nvcc).with_name("nvdisasm"),
        triton and Path(triton.origin).with_name("backends") / "nvidia/bin/nvdisasm",
    ]
    return next((str(place) for place in places if place and Path(place).is_file()), None)


def instructions_of_kernels(nvdisasm, cubin):
    """For each kernel its instructions, and its loops as (index of the first, of the last instruction)."""
    text = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in text.split("\n.text.")[1:]:
        instructions, labels = [], {}
        for line in part.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(instructions)
            if instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                instructions.append(instruction[1])
        jumps = (
            (labels[jump[1]], i)
            for i, text in enumerate(instructions)
            if (jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", text))
        )
        end = 1 + max(i for i, text in enumerate(instructions) if "EXIT" in text)  # what follows is padding
        kernels[kernel_of(part.split(":")[0])] = instructions[:end], [(to, i) for to, i in jumps if to < i < end]
    return kernels


def warp_instructions(instructions, loops, dtype, width):
    """How many instructions all warps issue. Code that a warp may jump over counts as if it did not."""

    def trips(loop):
        """One loop goes through the points of a step, that around it through the steps, and so on. Others sum lists of
        corners, or find a corner's list, mostly at once, or go through the points of one thread."""
        if loads(loop) >= 4:
            depth = sum(within(loop, other) and loads(other) >= 4 for other in loops)
            return (min(step, POINTS), math.ceil(POINTS / step), math.ceil(CHANNELS / 32))[depth]
        if has(loop, "RED"):
            return LISTS[width][0]
        if any(within(other, loop) and has(other, "RED") and loads(other) < 4 for other in loops):
            return LISTS[width][1] / LISTS[width][0]
        return 1 if has(loop, "ATOMS.CAS") else math.ceil(POINTS * width / 32)

    def within(outer, inner):
        return outer[0] <= inner[0] and inner[1] < outer[1]

    def has(loop, what):
        return any(what in text for text in instructions[loop[0] : loop[1] + 1])

    def loads(loop):
        return sum("LDG" in text for text in instructions[loop[0] : loop[1] + 1])

    step = (32 if dtype == "float64" else 64) // width
    warps = HEADS * sum(H * math.ceil(W / width) for H, W in LEVELS)
    return warps * sum(
        math.prod(trips(loop) for loop in loops if loop[0] <= i <= loop[1]) for i in range(len(instructions))
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", help="compute capability without its dot (default 90)")
    architecture = parser.parse_args().arch
    nvcc, reason = find_nvcc()
    nvdisasm = nvcc and find_nvdisasm(nvcc)
    if nvdisasm is None:
        print(f"deform_attn: {reason or 'no nvdisasm found: pip install nvidia-cuda-nvdisasm'}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        cubin, resources = compile_kernels(nvcc, architecture, folder)
        code = instructions_of_kernels(nvdisasm, cubin)
    print(
        f"sm_{architecture}: {QUERIES} queries, {HEADS} heads, {CHANNELS} channels, {POINTS} points\n"
        f"{'kernel':26} {'registers':>9} {'shared B':>8} {'spilled B':>9} {'million instructions':>20} "
        f"{'issue us':>8} {'L1 us':>6}"
    )
    for kernel in sorted(code, key=lambda kernel: (-kernel[2], kernel)):
        direction, dtype, width = kernel
        count = warp_instructions(*code[kernel], dtype, width) / 1e6
        rows = QUERIES * HEADS * POINTS * 4 * CHANNELS * BYTES[dtype] / 128
        registers, shared, spilled = resources[kernel]
        print(
            f"{f'{direction} {dtype} by {width}':26} {registers:9} {shared:8} {spilled:9} {count:20.1f} "
            f"{1e6 * count / (4 * MULTIPROCESSORS * MEGAHERTZ):8.0f} {rows / (MULTIPROCESSORS * MEGAHERTZ):6.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
