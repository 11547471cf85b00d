// What operator_cuda.cpp (PyTorch, no CUDA code) and cuda_kernel.cu (CUDA code, no PyTorch) have to agree on.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace deform_attn {

constexpr int MAX_LEVELS = 64, MAX_BLOCKS = 65535;  // MAX_BLOCKS: of a grid's second and third size

// Shapes of one call, letters as in __init__.py. Goes to the GPU by value, with the launch.
struct CudaProblem {
  int B, N, h, c, Q, L, P;
  float levels_per_point;  // 1 / P
  int height[MAX_LEVELS], width[MAX_LEVELS], start[MAX_LEVELS];  // start: first token of the level
};

// V: type of the value and the output (float, double, __half, __nv_bfloat16); A: type of the sums, double for double
// and else float. All tensors are dense. grad_value must be zero before; everything else is written whole.
template <typename V, typename A>
void launch_forward(const CudaProblem&, const V* value, const A* locations, const A* weights, V* output, cudaStream_t);
template <typename V, typename A>
void launch_backward(const CudaProblem&, const V* grad_output, const V* value, const A* locations, const A* weights,
                     A* grad_value, A* grad_locations, A* grad_weights, cudaStream_t);

}  // namespace deform_attn
