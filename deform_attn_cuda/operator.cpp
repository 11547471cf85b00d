// The operators deform_attn::forward and deform_attn::backward: schema, checks, autograd, and their CPU kernels.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/softmax.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
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
using c10::SymIntArrayRef;

void check(const Tensor& value, IntArrayRef level_shapes, const Tensor& reference, const Tensor& offsets,
           const Tensor& logits, const Tensor& grad_output) {
  TORCH_CHECK_VALUE(value.dim() == 4 && value.size(3) > 0 && offsets.dim() == 6 && offsets.size(3) > 0 &&
                    offsets.size(4) > 0, "deform_attn: value must be [B N h c] and offsets [B Q h L P 2], not ",
                    value.sizes(), " and ", offsets.sizes());
  const int64_t B = value.size(0), N = value.size(1), h = value.size(2), c = value.size(3);
  const int64_t Q = offsets.size(1), L = offsets.size(3), P = offsets.size(4);
  TORCH_CHECK_VALUE(offsets.sizes().equals({B, Q, h, L, P, 2}), "deform_attn: offsets ", offsets.sizes(),
                    " do not fit value ", value.sizes());
  TORCH_CHECK_VALUE(logits.sizes().equals({B, Q, h, L, P}), "deform_attn: logits ", logits.sizes(),
                    " do not fit offsets ", offsets.sizes());
  TORCH_CHECK_VALUE(reference.sizes().equals({Q, 2}) || reference.sizes().equals({B, Q, 4}), "deform_attn: reference ",
                    reference.sizes(), " does not fit offsets ", offsets.sizes());
  const auto type = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  for (const Tensor& tensor : {reference, offsets, logits})
    TORCH_CHECK_VALUE(tensor.scalar_type() == type && tensor.device() == value.device(), "deform_attn: reference, ",
                      "offsets and logits must be ", type, " on ", value.device(), ", as the value is of ",
                      value.scalar_type(), ", not ", tensor.scalar_type(), " on ", tensor.device());
  TORCH_CHECK_VALUE(!grad_output.defined() || (grad_output.sizes().equals({B, Q, h * c}) &&
                    grad_output.options().type_equal(value.options()) && grad_output.device() == value.device()),
                    "deform_attn: grad_output ", grad_output.defined() ? grad_output.sizes() : IntArrayRef(),
                    " does not fit the output");
  int64_t tokens = 0;
  bool fit = int64_t(level_shapes.size()) == 2 * L && N < INT32_MAX;
  for (size_t i = 0; fit && i < level_shapes.size(); i += 2) {
    const int64_t H = level_shapes[i], W = level_shapes[i + 1];
    fit = H > 0 && W > 0 && H <= N && W <= N;
    tokens += H * W;
  }
  TORCH_CHECK_VALUE(fit && tokens == N, "deform_attn: level_shapes ", level_shapes, " must be ", 2 * L,
                    " numbers for ", N, " tokens");
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

// The shapes of a call, and the geometry of its levels, point by point.
struct Call {
  Problem problem;
  std::vector<int32_t> geometry;

  Call(const Tensor& value, IntArrayRef level_shapes, const Tensor& reference, const Tensor& offsets) {
    const int64_t L = offsets.size(3), P = offsets.size(4), points = L * P;
    geometry.resize(3 * points);
    int64_t start = 0;
    for (int64_t level = 0; level < L; ++level) {
      const int64_t H = level_shapes[2 * level], W = level_shapes[2 * level + 1];
      for (int64_t point = level * P; point < (level + 1) * P; ++point) {
        geometry[point] = int32_t(W);
        geometry[points + point] = int32_t(H);
        geometry[2 * points + point] = int32_t(start);
      }
      start += H * W;
    }
    problem = {value.size(0), value.size(1), value.size(2), value.size(3), offsets.size(1), L, P,
               reference.dim() == 3, geometry.data(), geometry.data() + points, geometry.data() + 2 * points};
  }
};

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

template <typename T>
T* pointer(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

// Softmax over the points of a head.
Tensor weights_of(const Tensor& logits) { return at::softmax(logits.flatten(3), 3).view(logits.sizes()); }

// Queries are taken head by head, so that the rows in use, those of one head near the query, stay in the cache.
Tensor forward_cpu(const Tensor& value_, IntArrayRef level_shapes, const Tensor& reference_, const Tensor& offsets_,
                   const Tensor& logits) {
  check(value_, level_shapes, reference_, offsets_, logits);
  const Call call(value_, level_shapes, reference_, offsets_);
  const Problem& problem = call.problem;
  const Tensor value = value_.contiguous(), reference = reference_.contiguous();
  const Tensor offsets = offsets_.contiguous(), weights = weights_of(logits.contiguous());
  Tensor output = at::empty({problem.B, problem.Q, problem.h * problem.c}, value.options());
  const int64_t grain = 1 + 65536 / (1 + problem.L * problem.P * (problem.c + 16));
  with_kernels(value, [&]<typename V, typename A>(const Kernels<V, A>& kernels) {
    at::parallel_for(0, problem.B * problem.h * problem.Q, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t slice = begin / problem.Q, first = begin % problem.Q;
        const int64_t last = std::min(problem.Q, first + end - begin);
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
                         bool reference_asks) {
  check(value_, level_shapes, reference_, offsets_, logits, grad_output_);
  const Call call(value_, level_shapes, reference_, offsets_);
  const Problem& problem = call.problem;
  const Tensor grad_output = grad_output_.contiguous(), value = value_.contiguous();
  const Tensor reference = reference_.contiguous(), offsets = offsets_.contiguous();
  const Tensor weights = weights_of(logits.contiguous());
  Tensor grad_value = at::empty(value.sizes(), offsets.options());
  Tensor grad_offsets = at::empty_like(offsets), grad_weights = at::empty_like(weights);
  const int64_t tasks = problem.B * problem.h * problem.L, R = reference.size(-1);
  Tensor grad_reference = at::empty({problem.B, reference_asks ? problem.h * problem.L : 0, problem.Q, R},
                                    offsets.options());
  const int64_t grain = 1 + 32768 / (1 + problem.Q * problem.P * (problem.c + 16));
  with_kernels(value, [&]<typename V, typename A>(const Kernels<V, A>& kernels) {
    at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        kernels.backward(problem, pointer<V>(grad_output), pointer<V>(value), pointer<A>(reference),
                         pointer<A>(offsets), pointer<A>(weights), pointer<A>(grad_value),
                         reference_asks ? pointer<A>(grad_reference) + task * problem.Q * R : nullptr,
                         pointer<A>(grad_offsets), pointer<A>(grad_weights), task / problem.L / problem.h,
                         task / problem.L % problem.h, task % problem.L);
    });
  });
  const Tensor grad_logits = at::_softmax_backward_data(grad_weights.flatten(3), weights.flatten(3), 3,
                                                        weights.scalar_type());
  grad_reference = !reference_asks ? at::empty({0}, offsets.options())
      : problem.boxes ? grad_reference.sum(1) : grad_reference.sum({0, 1});
  return {grad_value.to(value.scalar_type()), grad_reference, grad_offsets, grad_logits.view(logits.sizes())};
}

Tensor call_forward(const Tensor& value, SymIntArrayRef level_shapes, const Tensor& reference, const Tensor& offsets,
                    const Tensor& logits) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("deform_attn::forward", "")
      .typed<Tensor(const Tensor&, SymIntArrayRef, const Tensor&, const Tensor&, const Tensor&)>();
  return op.call(value, level_shapes, reference, offsets, logits);
}

FourTensors call_backward(const Tensor& grad_output, const Tensor& value, SymIntArrayRef level_shapes,
                          const Tensor& reference, const Tensor& offsets, const Tensor& logits, bool reference_asks) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("deform_attn::backward", "")
      .typed<FourTensors(const Tensor&, const Tensor&, SymIntArrayRef, const Tensor&, const Tensor&, const Tensor&,
                         bool)>();
  return op.call(grad_output, value, level_shapes, reference, offsets, logits, reference_asks);
}

// Level shapes may be symbols here, while a graph is traced; kernels are given numbers by the dispatcher.
struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& value, SymIntArrayRef level_shapes,
                        const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({value, reference, offsets, logits});
    context->saved_data["level_shapes"] = level_shapes;
    context->saved_data["reference_asks"] = reference.requires_grad();
    return call_forward(value, level_shapes, reference, offsets, logits);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto level_shapes = context->saved_data["level_shapes"].toSymIntVector();
    const bool reference_asks = context->saved_data["reference_asks"].toBool();
    auto [value, reference, offsets, logits] =
        call_backward(grads[0], saved[0], level_shapes, saved[1], saved[2], saved[3], reference_asks);
    return {value, Tensor(), reference_asks ? reference : Tensor(), offsets, logits};
  }
};

Tensor forward_autograd(const Tensor& value, SymIntArrayRef level_shapes, const Tensor& reference,
                        const Tensor& offsets, const Tensor& logits) {
  return Function::apply(value, level_shapes, reference, offsets, logits);
}

}  // namespace

TORCH_LIBRARY(deform_attn, m) {
  m.def("forward(Tensor value, SymInt[] level_shapes, Tensor reference, Tensor offsets, Tensor logits) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("backward(Tensor grad_output, Tensor value, SymInt[] level_shapes, Tensor reference, Tensor offsets, Tensor "
        "logits, bool reference_asks) -> (Tensor, Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(deform_attn, CPU, m) {
  m.impl("forward", forward_cpu);
  m.impl("backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(deform_attn, Autograd, m) {
  m.impl("forward", forward_autograd);
  m.impl("backward", torch::autograd::autogradNotImplementedFallback());  // second derivatives are an error
}

}  // namespace deform_attn
