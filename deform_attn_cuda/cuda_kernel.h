// What operator_cuda.cpp (PyTorch, no CUDA code) and cuda_kernel.cu (CUDA code, no PyTorch) have to agree on.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace deform_attn {

constexpr int MAX_LEVELS = 64, MAX_BLOCKS = 65535;  // MAX_BLOCKS: of a grid's second and third size

struct Level { int W, H, start; };  // start: its first token

// Shapes of one call, letters as in __init__.py. Goes to the GPU by value, with the launch.
struct CudaProblem {
  int B, N, h, c, Q, L, P;
  bool boxes;  // whether the reference holds boxes [B Q 4] and not centres [Q 2]
  Level levels[MAX_LEVELS];
};

// Level shapes are given as H and W of each level.
template <typename Size>
CudaProblem problem_of(int B, int N, int h, int c, int Q, int L, int P, bool boxes, const Size* level_shapes) {
  CudaProblem problem = {B, N, h, c, Q, L, P, boxes};
  for (int level = 0, start = 0; level < L; ++level) {
    const int H = int(level_shapes[2 * level]), W = int(level_shapes[2 * level + 1]);
    problem.levels[level] = {W, H, start};
    start += H * W;
  }
  return problem;
}

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
void launch_forward(const CudaProblem&, const Inputs<V, A>&, V* output, cudaStream_t);
template <typename V, typename A>
void launch_backward(const CudaProblem&, const V* grad_output, const Inputs<V, A>&, const Gradients<A>&, cudaStream_t);

}  // namespace deform_attn
