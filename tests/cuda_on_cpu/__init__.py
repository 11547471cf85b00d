"""The CUDA kernels on a CPU: the source of deform_attn_cuda, compiled with a warp that takes turns, as a path."""

import ctypes
import functools
import subprocess
from pathlib import Path

import torch

import deform_attn_cuda

SOURCE = Path(__file__).parent / "cuda_on_cpu.cpp"


def compile_path(nvcc, library, adds):
    """A function like `deform_attn` from the CUDA source: as for sm_90, which adds FOUR numbers at once, or adds ONE."""
    flags = ["-O1", "-std=c++20", "-shared", "-Xcompiler=-fPIC,-w", f"-I{deform_attn_cuda.HERE}", f"-DADD_{adds}"]
    subprocess.run([nvcc, *flags, "-o", library, SOURCE], check=True)
    return functools.partial(CudaSource.apply, ctypes.CDLL(str(library)))


class CudaSource(torch.autograd.Function):
    """Runs the library's kernels on tensors of a CPU."""

    @staticmethod
    def call(library, backward, level_shapes, value, reference, offsets, logits, *others):
        (B, N, h, c), (Q, L, P) = value.shape, (logits.shape[dim] for dim in (1, 3, 4))
        sizes = [B, N, h, c, Q, L, P, reference.dim() == 3, backward, *(x for shape in level_shapes for x in shape)]
        data = [x.data_ptr() for x in (value, reference, offsets, logits, *others)]
        arrays = (ctypes.c_int * len(sizes))(*sizes), (ctypes.c_void_p * len(data))(*data)
        library.run(str(value.dtype).encode(), *arrays)

    @staticmethod
    def forward(context, library, value, level_shapes, *others):
        context.library_and_levels = library, level_shapes
        context.save_for_backward(value, *others)
        B, _, h, c = value.shape
        output = value.new_full((B, others[1].shape[1], h * c), torch.nan)  # what is to be written whole
        CudaSource.call(library, False, level_shapes, value, *others, output)
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
        library, level_shapes = context.library_and_levels
        CudaSource.call(library, True, level_shapes, *tensors, grad_output.contiguous(), *grads)
        return None, grads[0].to(value.dtype), None, *grads[1:]
