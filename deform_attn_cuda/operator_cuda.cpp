// The CUDA kernels of the operators that operator.cpp defines. No CUDA code in here.
#include <ATen/Context.h>
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

void require_blocks(const Problem& problem) {
  TORCH_CHECK_VALUE(problem.B <= MAX_BLOCKS && problem.h <= MAX_BLOCKS, "deform_attn: ", problem.B, " images of ",
                    problem.h, " heads are too many for the CUDA kernel, which takes ", MAX_BLOCKS, " of each");
}

template <typename V, typename A>
Inputs<V, A> inputs(const Tensor& value, const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
  return {pointer<V>(value), pointer<A>(reference), pointer<A>(offsets), pointer<A>(logits)};
}

// Calls f<type of the value, type of the sums>.
template <typename F>
void with_types(const Tensor& value, F f) {
  switch (value.scalar_type()) {
    case at::kFloat: return f.template operator()<float, float>();
    case at::kDouble: return f.template operator()<double, double>();
    case at::kHalf: return f.template operator()<__half, float>();
    case at::kBFloat16: return f.template operator()<__nv_bfloat16, float>();
    default: TORCH_CHECK_NOT_IMPLEMENTED(false, "deform_attn: no CUDA kernel for a value of ", value.scalar_type());
  }
}

Tensor forward_cuda(const Tensor& value_, IntArrayRef level_shapes, const Tensor& reference_, const Tensor& offsets_,
                    const Tensor& logits_) {
  const Problem problem = problem_of(value_, level_shapes, reference_, offsets_, logits_);
  require_blocks(problem);
  const c10::cuda::CUDAGuard device(value_.device());
  const Tensor value = value_.contiguous(), reference = reference_.contiguous();
  const Tensor offsets = offsets_.contiguous(), logits = logits_.contiguous();
  Tensor output = at::empty({problem.B, problem.Q, problem.h * problem.c}, value.options());
  if (output.numel() == 0) return output;
  with_types(value, [&]<typename V, typename A>() {
    launch_forward(problem, inputs<V, A>(value, reference, offsets, logits), pointer<V>(output),
                   c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

FourTensors backward_cuda(const Tensor& grad_output_, const Tensor& value_, IntArrayRef level_shapes,
                          const Tensor& reference_, const Tensor& offsets_, const Tensor& logits_,
                          bool reference_requires_grad) {
  const Problem problem = problem_of(value_, level_shapes, reference_, offsets_, logits_, grad_output_);
  require_blocks(problem);
  const c10::cuda::CUDAGuard device(value_.device());
  const Tensor grad_output = grad_output_.contiguous(), value = value_.contiguous();
  const Tensor reference = reference_.contiguous(), offsets = offsets_.contiguous(), logits = logits_.contiguous();
  Tensor grad_value = at::zeros(value.sizes(), offsets.options()), grad_reference = at::zeros_like(reference);
  Tensor grad_offsets = at::empty_like(offsets), grad_logits = at::empty_like(logits);
  if (grad_output.numel() > 0) {
    at::globalContext().alertNotDeterministic("deform_attn::backward on CUDA");  // sums in the order of arrival
    with_types(value, [&]<typename V, typename A>() {
      const Gradients<A> gradients = {pointer<A>(grad_value),
                                      reference_requires_grad ? pointer<A>(grad_reference) : nullptr,
                                      pointer<A>(grad_offsets), pointer<A>(grad_logits)};
      launch_backward(problem, pointer<V>(grad_output), inputs<V, A>(value, reference, offsets, logits), gradients,
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
