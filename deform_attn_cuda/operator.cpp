// The operators deform_attn::forward and deform_attn::backward: schema, checks, and their CPU kernels. __init__.py adds
// what PyTorch needs to differentiate and to trace them.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "cpu_kernel.h"
#include "operator.h"

namespace deform_attn {

#if defined(__x86_64__)
extern const CpuKernels avx512, avx2;
#endif
extern const CpuKernels baseline;

using at::IntArrayRef;
using at::Tensor;

Problem problem_of(const Tensor& value, IntArrayRef level_shapes, const Tensor& reference, const Tensor& offsets,
                   const Tensor& logits, const Tensor& grad_output) {
  const auto require = [&](bool fits) {
    TORCH_CHECK_VALUE(fits, "deform_attn: arguments do not fit one another, or the ", MAX_LEVELS, " levels and 2^31 "
                      "elements of a kernel: value ", value.sizes(), " ", value.scalar_type(), ", level_shapes ",
                      level_shapes, ", reference ", reference.sizes(), ", offsets ", offsets.sizes(), ", logits ",
                      logits.sizes());
  };
  require(value.dim() == 4 && offsets.dim() == 6);
  const int64_t B = value.size(0), N = value.size(1), h = value.size(2), c = value.size(3);
  const int64_t Q = offsets.size(1), L = offsets.size(3), P = offsets.size(4);
  require(c > 0 && L > 0 && P > 0 && L <= MAX_LEVELS && std::max({B, N, h * c, Q, L * P}) < INT32_MAX);
  require(offsets.sizes().equals({B, Q, h, L, P, 2}) && logits.sizes().equals({B, Q, h, L, P}));
  require(reference.sizes().equals({Q, 2}) || reference.sizes().equals({B, Q, 4}));
  const auto precise = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor& tensor : {reference, offsets, logits})
    require(tensor.scalar_type() == precise && tensor.device() == value.device());
  require(!grad_output.defined() || (grad_output.sizes().equals({B, Q, h * c}) &&
                                     grad_output.scalar_type() == value.scalar_type() &&
                                     grad_output.device() == value.device()));
  require(int64_t(level_shapes.size()) == 2 * L);
  Problem problem = {int(B), int(N), int(h), int(c), int(Q), int(L), int(P), reference.dim() == 3};
  int64_t tokens = 0;
  for (int64_t level = 0; level < L; ++level) {
    const int64_t H = level_shapes[2 * level], W = level_shapes[2 * level + 1];
    require(H > 0 && W > 0 && H <= N && W <= N && tokens + H * W <= N);
    problem.levels[level] = {int(W), int(H), int(tokens)};
    tokens += H * W;
  }
  require(tokens == N);
  return problem;
}

namespace {

// PyTorch's own choice of instructions, which ATEN_CPU_CAPABILITY overrides.
const CpuKernels& cpu_kernels() {
#if defined(__x86_64__)
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return avx512;
  if (capability == "AVX2") return avx2;
#endif
  return baseline;
}

// Runs f with the kernels for the type of `value`.
template <typename F>
void with_kernels(const Tensor& value, F f) {
  switch (value.scalar_type()) {
    case at::kFloat: return f(cpu_kernels().float32);
    case at::kDouble: return f(cpu_kernels().float64);
    case at::kBFloat16: return f(cpu_kernels().bfloat16_);
    default: TORCH_CHECK_NOT_IMPLEMENTED(false, "deform_attn: no CPU kernel for a value of ", value.scalar_type());
  }
}

// Softmax over the points of a head.
Tensor weights_of(const Tensor& logits) { return at::softmax(logits.flatten(3), 3).view(logits.sizes()); }

// Queries are taken head by head, so that the rows in use, those of one head near the query, stay in the cache.
Tensor forward_cpu(const Tensor& value_, IntArrayRef level_shapes, const Tensor& reference_, const Tensor& offsets_,
                   const Tensor& logits) {
  const Problem problem = problem_of(value_, level_shapes, reference_, offsets_, logits);
  const Tensor value = value_.contiguous(), reference = reference_.contiguous();
  const Tensor offsets = offsets_.contiguous(), weights = weights_of(logits.contiguous());
  Tensor output = at::empty({problem.B, problem.Q, problem.h * problem.c}, value.options());
  const int64_t Q = problem.Q, slices = int64_t(problem.B) * problem.h;  // one for each image and head
  const int64_t grain = 1 + 65536 / (1 + int64_t(problem.L) * problem.P * (problem.c + 16));
  with_kernels(value, [&]<typename V, typename A>(const Kernels<V, A>& kernels) {
    at::parallel_for(0, slices * Q, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t slice = begin / Q, first = begin % Q;
        const int64_t last = std::min(Q, first + end - begin);
        kernels.forward(problem, pointer<V>(value), pointer<A>(reference), pointer<A>(offsets), pointer<A>(weights),
                        pointer<V>(output), slice / problem.h, slice % problem.h, first, last);
        begin += last - first;
      }
    });
  });
  return output;
}

// One task for each image, head and level, which owns its gradients: nothing is shared between threads, and each
// gradient is summed in the order of the queries whatever the number of threads.
FourTensors backward_cpu(const Tensor& grad_output_, const Tensor& value_, IntArrayRef level_shapes,
                         const Tensor& reference_, const Tensor& offsets_, const Tensor& logits,
                         bool reference_requires_grad) {
  const Problem problem = problem_of(value_, level_shapes, reference_, offsets_, logits, grad_output_);
  const Tensor grad_output = grad_output_.contiguous(), value = value_.contiguous();
  const Tensor reference = reference_.contiguous(), offsets = offsets_.contiguous();
  const Tensor weights = weights_of(logits.contiguous());
  Tensor grad_value = at::empty(value.sizes(), offsets.options());
  Tensor grad_offsets = at::empty_like(offsets), grad_weights = at::empty_like(weights);
  const int64_t B = problem.B, h = problem.h, L = problem.L, Q = problem.Q, R = reference.size(-1);
  Tensor grad_reference = at::zeros({B, reference_requires_grad ? h * L : 0, Q, R}, offsets.options());
  const int64_t grain = 1 + 32768 / (1 + Q * problem.P * (problem.c + 16));
  with_kernels(value, [&]<typename V, typename A>(const Kernels<V, A>& kernels) {
    at::parallel_for(0, B * h * L, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        kernels.backward(problem, pointer<V>(grad_output), pointer<V>(value), pointer<A>(reference),
                         pointer<A>(offsets), pointer<A>(weights), pointer<A>(grad_value),
                         reference_requires_grad ? pointer<A>(grad_reference) + task * Q * R : nullptr,
                         pointer<A>(grad_offsets), pointer<A>(grad_weights), task / L / h, task / L % h, task % L);
    });
  });
  const Tensor grad_logits = at::_softmax_backward_data(grad_weights.flatten(3), weights.flatten(3), 3,
                                                        weights.scalar_type());
  grad_reference = problem.boxes ? grad_reference.sum(1) : grad_reference.sum({0, 1});
  return {grad_value.to(value.scalar_type()), grad_reference, grad_offsets, grad_logits.view(logits.sizes())};
}

}  // namespace

TORCH_LIBRARY(deform_attn, m) {
  m.def("forward(Tensor value, SymInt[] level_shapes, Tensor reference, Tensor offsets, Tensor logits) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("backward(Tensor grad_output, Tensor value, SymInt[] level_shapes, Tensor reference, Tensor offsets, Tensor "
        "logits, bool reference_requires_grad) -> (Tensor, Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(deform_attn, CPU, m) {
  m.impl("forward", forward_cpu);
  m.impl("backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(deform_attn, Autograd, m) {
  m.impl("backward", torch::autograd::autogradNotImplementedFallback());  // second derivatives are an error
}

}  // namespace deform_attn
