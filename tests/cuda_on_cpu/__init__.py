"""The CUDA kernels on a CPU: the source of deform_attn_cuda, compiled for a simulated warp, as a path."""

import ctypes
import functools
import subprocess
from pathlib import Path

import torch

import deform_attn_cuda

SOURCE = Path(__file__).parent / "cuda_on_cpu.cpp"


def compile_path(nvcc, library):
    """A function like `deform_attn` from the CUDA source, as sm_90 runs it."""
    flags = ["-O1", "-std=c++20", "-shared", "-Xcompiler=-fPIC,-w", f"-I{deform_attn_cuda.HERE}"]
    subprocess.run([nvcc, *flags, "-o", library, SOURCE], check=True)
    return functools.partial(CudaSource.apply, ctypes.CDLL(str(library)).run)


class CudaSource(torch.autograd.Function):
    """Runs the library's kernels on tensors of a CPU."""

    @staticmethod
    def call(run, level_shapes, value, reference, offsets, logits, output, *grads):
        sizes = [*value.shape, *logits.shape[1::2], logits.shape[4], reference.dim() == 3]  # B N h c Q L P boxes
        start = 0
        for H, W in level_shapes:
            sizes += W, H, start
            start += H * W
        data = [x.data_ptr() for x in (value, reference, offsets, logits, output, *grads)]
        run(str(value.dtype).encode(), (ctypes.c_int * len(sizes))(*sizes), (ctypes.c_void_p * 9)(*data))

    @staticmethod
    def forward(context, run, value, level_shapes, *others):
        context.run = run
        context.level_shapes = level_shapes
        context.save_for_backward(value, *others)
        B, _, h, c = value.shape
        output = value.new_full((B, others[1].shape[1], h * c), torch.nan)  # what is to be written whole
        CudaSource.call(run, level_shapes, value, *others, output)
        return output

    @staticmethod
    def backward(context, grad_output):
        value, reference, offsets, logits = tensors = context.saved_tensors
        grads = [
            torch.zeros_like(value, dtype=logits.dtype),
            torch.zeros_like(reference),
            torch.full_like(offsets, torch.nan),
            torch.full_like(logits, torch.nan),
        ]
        CudaSource.call(context.run, context.level_shapes, *tensors, grad_output.contiguous(), *grads)
        return None, grads[0].to(value.dtype), None, *grads[1:]
