// CUDA kernels of the operators that operator.cpp defines. No CUDA code in here.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
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

CudaProblem problem_of(const Tensor& value, IntArrayRef level_shapes, const Tensor& locations) {
  const int64_t B = value.size(0), N = value.size(1), h = value.size(2), c = value.size(3);
  const int64_t Q = locations.size(1), L = locations.size(3), P = locations.size(4);
  TORCH_CHECK_VALUE(L <= MAX_LEVELS, "deform_attn: level_shapes hold ", L, " levels, the CUDA kernel takes ", MAX_LEVELS);
  TORCH_CHECK_VALUE(B <= MAX_BLOCKS && h <= MAX_BLOCKS && h * c < 1 << 28 && P < 1 << 14 && B * h * (Q + 1) < 1 << 30,
                    "deform_attn: value ", value.sizes(), " with locations ", locations.sizes(),
                    " is too large for the CUDA kernel");
  CudaProblem problem = {int(B), int(N), int(h), int(c), int(Q), int(L), int(P), 1.0f / P};
  int start = 0;
  for (int64_t level = 0; level < L; ++level) {
    problem.height[level] = int(level_shapes[2 * level]);
    problem.width[level] = int(level_shapes[2 * level + 1]);
    problem.start[level] = start;
    start += problem.height[level] * problem.width[level];
  }
  return problem;
}

template <typename V, typename A>
struct Types {
  static V* of_value(const Tensor& tensor) { return static_cast<V*>(tensor.data_ptr()); }
  static A* of_sum(const Tensor& tensor) { return static_cast<A*>(tensor.data_ptr()); }
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

Tensor forward_cuda(const Tensor& value_, IntArrayRef level_shapes, const Tensor& locations_, const Tensor& weights_) {
  check(value_, level_shapes, locations_, weights_);
  const c10::cuda::CUDAGuard device(value_.device());
  const Tensor value = value_.contiguous(), locations = locations_.contiguous(), weights = weights_.contiguous();
  const CudaProblem problem = problem_of(value, level_shapes, locations);
  Tensor output = at::empty({problem.B, problem.Q, problem.h * problem.c}, value.options());
  if (output.numel() == 0) return output;
  with_types(value, [&](auto types) {
    launch_forward(problem, types.of_value(value), types.of_sum(locations), types.of_sum(weights),
                   types.of_value(output), c10::cuda::getCurrentCUDAStream().stream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output_, const Tensor& value_,
                                                 IntArrayRef level_shapes, const Tensor& locations_,
                                                 const Tensor& weights_) {
  check(value_, level_shapes, locations_, weights_, grad_output_);
  const c10::cuda::CUDAGuard device(value_.device());
  const Tensor grad_output = grad_output_.contiguous(), value = value_.contiguous();
  const Tensor locations = locations_.contiguous(), weights = weights_.contiguous();
  const CudaProblem problem = problem_of(value, level_shapes, locations);
  Tensor grad_value = at::zeros(value.sizes(), locations.options());
  Tensor grad_locations = at::empty_like(locations), grad_weights = at::empty_like(weights);
  if (grad_output.numel() > 0) {
    at::globalContext().alertNotDeterministic("deform_attn::backward on CUDA");  // sums in the order of arrival
    with_types(value, [&](auto types) {
      launch_backward(problem, types.of_value(grad_output), types.of_value(value), types.of_sum(locations),
                      types.of_sum(weights), types.of_sum(grad_value), types.of_sum(grad_locations),
                      types.of_sum(grad_weights), c10::cuda::getCurrentCUDAStream().stream());
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(deform_attn, CUDA, m) {
  m.impl("forward", forward_cuda);
  m.impl("backward", backward_cuda);
}

}  // namespace deform_attn
