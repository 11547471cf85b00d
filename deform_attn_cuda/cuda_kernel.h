// The interface between operator_cuda.cpp (PyTorch, no CUDA code) and cuda_kernel.cu (CUDA code, no PyTorch).
#pragma once
#include <cuda_runtime_api.h>

#include "problem.h"

namespace deform_attn {

constexpr int MAX_BLOCKS = 65535;  // of a grid's second and third size

// V: type of the value and the output (float, double, __half, __nv_bfloat16); A: type of the sums, double for double
// and else float. All tensors are dense.
template <typename V, typename A>
struct Inputs {
  const V* value;
  const A *reference, *offsets, *logits;
};

// `value` and `reference` must be zero before, `reference` may be null; the others are written whole.
template <typename A>
struct Gradients { A *value, *reference, *offsets, *logits; };

template <typename V, typename A>
void launch_forward(const Problem&, const Inputs<V, A>&, V* output, cudaStream_t);
template <typename V, typename A>
void launch_backward(const Problem&, const V* grad_output, const Inputs<V, A>&, const Gradients<A>&, cudaStream_t);

}  // namespace deform_attn
