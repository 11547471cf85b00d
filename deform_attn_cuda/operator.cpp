// The operators deform_attn::forward and deform_attn::backward: schema, checks, autograd, and their CPU kernels.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
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
using Gradients = std::tuple<Tensor, Tensor, Tensor>;

void check(const Tensor& value, IntArrayRef level_shapes, const Tensor& locations, const Tensor& weights,
           const Tensor& grad_output) {
  TORCH_CHECK_VALUE(value.dim() == 4 && value.size(3) > 0 && locations.dim() == 6, "deform_attn: value must be [B N h c] and locations ",
                    "[B Q h L P 2], not ", value.sizes(), " and ", locations.sizes());
  const int64_t B = value.size(0), N = value.size(1), h = value.size(2), c = value.size(3);
  const int64_t Q = locations.size(1), L = locations.size(3), P = locations.size(4);
  TORCH_CHECK_VALUE(locations.sizes().equals({B, Q, h, L, P, 2}), "deform_attn: locations ", locations.sizes(),
                    " do not fit value ", value.sizes());
  TORCH_CHECK_VALUE(weights.sizes().equals({B, Q, h, L, P}), "deform_attn: weights ", weights.sizes(),
                    " do not fit locations ", locations.sizes());
  const auto type = value.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK_VALUE(locations.scalar_type() == type && weights.scalar_type() == type, "deform_attn: locations and ",
                    "weights must be ", type, " beside a value of ", value.scalar_type());
  TORCH_CHECK_VALUE(locations.device() == value.device() && weights.device() == value.device(), "deform_attn: value is on ",
                    value.device(), ", locations on ", locations.device(), ", weights on ", weights.device());
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

  Call(const Tensor& value, IntArrayRef level_shapes, const Tensor& locations) {
    const int64_t L = locations.size(3), P = locations.size(4), points = L * P;
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
    problem = {value.size(0), value.size(1), value.size(2), value.size(3), locations.size(1), L, P,
               geometry.data(), geometry.data() + points, geometry.data() + 2 * points};
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

// Queries are taken head by head, so that the rows in use, those of one head near the query, stay in the cache.
Tensor forward_cpu(const Tensor& value_, IntArrayRef level_shapes, const Tensor& locations_, const Tensor& weights_) {
  check(value_, level_shapes, locations_, weights_);
  const Call call(value_, level_shapes, locations_);
  const Problem& problem = call.problem;
  const Tensor value = value_.contiguous(), locations = locations_.contiguous(), weights = weights_.contiguous();
  Tensor output = at::empty({problem.B, problem.Q, problem.h * problem.c}, value.options());
  const int64_t grain = 1 + 65536 / (1 + problem.L * problem.P * (problem.c + 16));
  with_kernels(value, [&]<typename V, typename A>(const Kernels<V, A>& kernels) {
    at::parallel_for(0, problem.B * problem.h * problem.Q, grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t slice = begin / problem.Q, first = begin % problem.Q;
        const int64_t last = std::min(problem.Q, first + end - begin);
        kernels.forward(problem, pointer<V>(value), pointer<A>(locations), pointer<A>(weights), pointer<V>(output),
                        slice / problem.h, slice % problem.h, first, last);
        begin += last - first;
      }
    });
  });
  return output;
}

// One task for each image, head and level, which owns its gradients: nothing is shared between threads, and each
// gradient is summed in the order of the queries whatever the number of threads.
Gradients backward_cpu(const Tensor& grad_output_, const Tensor& value_, IntArrayRef level_shapes,
                       const Tensor& locations_, const Tensor& weights_) {
  check(value_, level_shapes, locations_, weights_, grad_output_);
  const Call call(value_, level_shapes, locations_);
  const Problem& problem = call.problem;
  const Tensor grad_output = grad_output_.contiguous(), value = value_.contiguous();
  const Tensor locations = locations_.contiguous(), weights = weights_.contiguous();
  Tensor grad_value = at::empty(value.sizes(), locations.options());
  Tensor grad_locations = at::empty_like(locations), grad_weights = at::empty_like(weights);
  const int64_t grain = 1 + 32768 / (1 + problem.Q * problem.P * (problem.c + 16));
  with_kernels(value, [&]<typename V, typename A>(const Kernels<V, A>& kernels) {
    at::parallel_for(0, problem.B * problem.h * problem.L, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task)
        kernels.backward(problem, pointer<V>(grad_output), pointer<V>(value), pointer<A>(locations),
                         pointer<A>(weights), pointer<A>(grad_value), pointer<A>(grad_locations),
                         pointer<A>(grad_weights), task / problem.L / problem.h, task / problem.L % problem.h,
                         task % problem.L);
    });
  });
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

Tensor call_forward(const Tensor& value, SymIntArrayRef level_shapes, const Tensor& locations, const Tensor& weights) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("deform_attn::forward", "")
      .typed<Tensor(const Tensor&, SymIntArrayRef, const Tensor&, const Tensor&)>();
  return op.call(value, level_shapes, locations, weights);
}

Gradients call_backward(const Tensor& grad_output, const Tensor& value, SymIntArrayRef level_shapes,
                        const Tensor& locations, const Tensor& weights) {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("deform_attn::backward", "")
      .typed<Gradients(const Tensor&, const Tensor&, SymIntArrayRef, const Tensor&, const Tensor&)>();
  return op.call(grad_output, value, level_shapes, locations, weights);
}

// Level shapes may be symbols here, while a graph is traced; kernels are given numbers by the dispatcher.
struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& value, SymIntArrayRef level_shapes,
                        const Tensor& locations, const Tensor& weights) {
    const at::AutoDispatchBelowADInplaceOrView below;
    context->save_for_backward({value, locations, weights});
    context->saved_data["level_shapes"] = level_shapes;
    return call_forward(value, level_shapes, locations, weights);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const auto saved = context->get_saved_variables();
    const auto level_shapes = context->saved_data["level_shapes"].toSymIntVector();
    auto [value, locations, weights] = call_backward(grads[0], saved[0], level_shapes, saved[1], saved[2]);
    return {value, Tensor(), locations, weights};
  }
};

Tensor forward_autograd(const Tensor& value, SymIntArrayRef level_shapes, const Tensor& locations,
                        const Tensor& weights) {
  return Function::apply(value, level_shapes, locations, weights);
}

}  // namespace

TORCH_LIBRARY(deform_attn, m) {
  m.def("forward(Tensor value, SymInt[] level_shapes, Tensor locations, Tensor weights) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("backward(Tensor grad_output, Tensor value, SymInt[] level_shapes, Tensor locations, Tensor weights)"
        " -> (Tensor, Tensor, Tensor)", {at::Tag::pt2_compliant_tag});
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
