"""What `deform_attn` promises, on every device and path of this machine."""

import concurrent.futures
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch.utils.flop_counter import FlopCounterMode

import deform_attn_cuda
from deform_attn_cuda import build, deform_attn, deform_attn_pytorch, locate, status
from small_attention import (
    DEVICES,
    LEVELS,
    TOLERANCES,
    assert_agrees,
    assert_close,
    inputs,
    outputs,
    problems,
    upstream_of,
)

CUDA_ON_CPU = Path(__file__).parent / "cuda_on_cpu/cuda_on_cpu.cpp"
SIZES = [size for shape in LEVELS for size in shape]
every_type = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
both_paths = pytest.mark.parametrize("path", [deform_attn, deform_attn_pytorch])
both_references = pytest.mark.parametrize("boxes", [False, True], ids=["centres", "boxes"])


def needs_kernel(device, dtype=torch.float32):
    if "fallback" in status(device, dtype):
        pytest.skip(status(device, dtype))


@pytest.fixture(scope="module")
def nvcc():
    path, reason = build.find_nvcc()
    if path is None:
        pytest.skip(reason)
    return path


class CudaSource(torch.autograd.Function):
    """The CUDA kernels, compiled for the CPU by a test's fixture and run warp by warp."""

    library = None

    @staticmethod
    def call(backward, level_shapes, value, reference, offsets, logits, *others):
        (B, N, h, c), (Q, L, P) = value.shape, (logits.shape[dim] for dim in (1, 3, 4))
        sizes = [B, N, h, c, Q, L, P, reference.dim() == 3, backward, *(x for shape in level_shapes for x in shape)]
        data = [x.data_ptr() for x in (value, reference, offsets, logits, *others)]
        types = (ctypes.c_int * len(sizes))(*sizes), (ctypes.c_void_p * len(data))(*data)
        CudaSource.library.run(str(value.dtype).encode(), *types)

    @staticmethod
    def forward(context, value, level_shapes, *others):
        context.level_shapes = level_shapes
        context.save_for_backward(value, *others)
        B, _, h, c = value.shape
        output = value.new_full((B, others[1].shape[1], h * c), torch.nan)  # what is to be written whole
        CudaSource.call(False, level_shapes, value, *others, output)
        return output

    @staticmethod
    def backward(context, grad_output):
        value, reference, offsets, logits = context.saved_tensors
        grads = [
            torch.zeros_like(value, dtype=logits.dtype),
            torch.zeros_like(reference),
            torch.full_like(offsets, torch.nan),
            torch.full_like(logits, torch.nan),
        ]
        CudaSource.call(True, context.level_shapes, *context.saved_tensors, grad_output.contiguous(), *grads)
        return grads[0].to(value.dtype), None, *grads[1:]


@pytest.fixture(scope="module", params=[[], ["-DADD_FOUR"]], ids=["sm_80", "sm_90"])
def cuda_source(nvcc, request, tmp_path_factory):
    """The CUDA kernels as a path on the CPU: as for sm_80, and with sm_90's additions of four numbers at once."""
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "library.so"
    flags = ["-O1", "-std=c++20", "-shared", "-Xcompiler=-fPIC,-w", f"-I{deform_attn_cuda.HERE}", *request.param]
    subprocess.run([nvcc, *flags, "-o", library, CUDA_ON_CPU], check=True)
    CudaSource.library = ctypes.CDLL(str(library))
    return CudaSource.apply


@every_type
@settings(deadline=None, max_examples=25)
@given(problem=problems)
def test_the_cuda_source_on_a_cpu_agrees_with_the_fallback(cuda_source, dtype, problem):
    assert_agrees(cuda_source, problem["level_shapes"], inputs(**problem, dtype=dtype))

# ---- Kernel = fallback: this section moves to test_dimaskdino.py


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@settings(deadline=None, max_examples=40)
@given(problem=problems)
def test_kernel_and_fallback_agree(device, dtype, problem):
    """Values and all gradients, of any shapes, offsets and references, on borders of cells and outside."""
    if "fallback" in status(device, dtype):
        pytest.skip(status(device, dtype))
    assert_agrees(deform_attn, problem["level_shapes"], inputs(**problem, dtype=dtype, device=device))
