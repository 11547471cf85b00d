// What operator_cuda.cpp (PyTorch, no CUDA code) and cuda_kernel.cu (CUDA code, no PyTorch) have to agree on.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace deform_attn {

constexpr int MAX_LEVELS = 64, MAX_BLOCKS = 65535;  // MAX_BLOCKS: of a grid's second and third size

struct alignas(16) Level { int W, H, start; };  // start: its first token

// Queries that lie in lines of W, H of them, and how they are cut into tiles: the number of the first tile, how many
// make up a line of tiles, and a little more than 2^31 / that, so that tile * lines_per_tile / 2^31 is a tile's line.
struct alignas(16) Field {
  int W, H, start;
  unsigned first_tile, columns, lines_per_tile;
};

// Shapes of one call, letters as in __init__.py. Goes to the GPU by value, with the launch.
struct CudaProblem {
  int B, N, h, c, Q, L, P;
  int boxes;                   // 1: the reference holds boxes [B Q 4]; 0: it holds centres [Q 2]
  unsigned levels_per_point;   // a little more than 2^31 / P: point * levels_per_point / 2^31 is the point's level
  Level level[MAX_LEVELS];
  Field fields[MAX_LEVELS + 1];  // set by launch_*; behind the last there is one that begins at no tile
};

// sizes: those of CudaProblem, in its order; level_shapes: H and W of each level.
template <typename Size>
CudaProblem problem_of(const Size* sizes, const Size* level_shapes) {
  CudaProblem problem = {int(sizes[0]), int(sizes[1]), int(sizes[2]), int(sizes[3]),
                         int(sizes[4]), int(sizes[5]), int(sizes[6]), int(sizes[7])};
  problem.levels_per_point = (1u << 31) / problem.P + 1;
  for (int level = 0, start = 0; level < problem.L; ++level) {
    const int H = int(level_shapes[2 * level]), W = int(level_shapes[2 * level + 1]);
    problem.level[level] = {W, H, start};
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
void launch_forward(CudaProblem, const Inputs<V, A>&, V* output, cudaStream_t);
template <typename V, typename A>
void launch_backward(CudaProblem, const V* grad_output, const Inputs<V, A>&, const Gradients<A>&, cudaStream_t);

}  // namespace deform_attn
