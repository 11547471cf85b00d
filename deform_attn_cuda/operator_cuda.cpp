// CUDA kernels of the operators that operator.cpp defines. No CUDA code in here.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include "cuda_kernel.h"
#include "operator.h"

namespace deform_attn {
namespace {

using at::IntArrayRef;
using at::Tensor;

CudaProblem problem_of(const Tensor& value, IntArrayRef level_shapes, const Tensor& reference, const Tensor& offsets) {
  const int64_t B = value.size(0), N = value.size(1), h = value.size(2), c = value.size(3);
  const int64_t Q = offsets.size(1), L = offsets.size(3), P = offsets.size(4);
  TORCH_CHECK_VALUE(L <= MAX_LEVELS && B <= MAX_BLOCKS && h <= MAX_BLOCKS && h * c < INT32_MAX && L * P < INT32_MAX &&
                    Q < INT32_MAX, "deform_attn: value ", value.sizes(), " with offsets ", offsets.sizes(),
                    " is too large for the CUDA kernel, which takes ", MAX_LEVELS, " levels and ", MAX_BLOCKS,
                    " images and heads");
  return deform_attn::problem_of(B, N, h, c, Q, L, P, reference.dim() == 3, level_shapes.data());
}

template <typename V, typename A>
struct Types {
  static V* of_value(const Tensor& tensor) { return static_cast<V*>(tensor.data_ptr()); }
  static A* of_sum(const Tensor& tensor) { return static_cast<A*>(tensor.data_ptr()); }  // null where empty
  static Inputs<V, A> inputs(const Tensor& value, const Tensor& reference, const Tensor& offsets,
                             const Tensor& logits) {
    return {of_value(value), of_sum(reference), of_sum(offsets), of_sum(logits)};
  }
  static Gradients<A> gradients(const Tensor& value, const Tensor& reference, const Tensor& offsets,
                                const Tensor& logits) {
    return {of_sum(value), of_sum(reference), of_sum(offsets), of_sum(logits)};
  }
};

template <typename F>
void with_types(const Tensor& value, F f) {
  switch (value.scalar_type()) {
    case at::kFloat: return f(Types<float, float>());
    case at::kDouble: return f(Types<double, double>());
    case at::kHalf: return f(Types<__half, float>());
    case at::kBFloat16: return f(Types<__nv_bfloat16, float>());
    default: TORCH_CHECK_NOT_IMPLEMENTED(false, "deform_attn: no CUDA kernel for a value of ", value.scalar_type());
  }
}

Tensor forward_cuda(const Tensor& value_, IntArrayRef level_shapes, const Tensor& reference_, const Tensor& offsets_,
                    const Tensor& logits_) {
  check(value_, level_shapes, reference_, offsets_, logits_);
  const c10::cuda::CUDAGuard device(value_.device());
  const Tensor value = value_.contiguous(), reference = reference_.contiguous();
  const Tensor offsets = offsets_.contiguous(), logits = logits_.contiguous();
  const CudaProblem problem = problem_of(value, level_shapes, reference, offsets);
  Tensor output = at::empty({problem.B, problem.Q, problem.h * problem.c}, value.options());
  if (output.numel() == 0) return output;
  with_types(value, [&](auto types) {
    launch_forward(problem, types.inputs(value, reference, offsets, logits), types.of_value(output),
                   c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

FourTensors backward_cuda(const Tensor& grad_output_, const Tensor& value_, IntArrayRef level_shapes,
                          const Tensor& reference_, const Tensor& offsets_, const Tensor& logits_,
                          bool reference_asks) {
  check(value_, level_shapes, reference_, offsets_, logits_, grad_output_);
  const c10::cuda::CUDAGuard device(value_.device());
  const Tensor grad_output = grad_output_.contiguous(), value = value_.contiguous();
  const Tensor reference = reference_.contiguous(), offsets = offsets_.contiguous(), logits = logits_.contiguous();
  const CudaProblem problem = problem_of(value, level_shapes, reference, offsets);
  Tensor grad_value = at::zeros(value.sizes(), offsets.options());
  Tensor grad_reference = reference_asks ? at::zeros_like(reference) : at::empty({0}, reference.options());
  Tensor grad_offsets = at::empty_like(offsets), grad_logits = at::empty_like(logits);
  if (grad_output.numel() > 0) {
    at::globalContext().alertNotDeterministic("deform_attn::backward on CUDA");  // sums in the order of arrival
    with_types(value, [&](auto types) {
      launch_backward(problem, types.of_value(grad_output), types.inputs(value, reference, offsets, logits),
                      types.gradients(grad_value, grad_reference, grad_offsets, grad_logits),
                      c10::cuda::getCurrentCUDAStream().stream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_value.to(value.scalar_type()), grad_reference, grad_offsets, grad_logits};
}

}  // namespace

TORCH_LIBRARY_IMPL(deform_attn, CUDA, m) {
  m.impl("forward", forward_cuda);
  m.impl("backward", backward_cuda);
}

}  // namespace deform_attn
