// The interface of cpu_kernel.cpp, which is compiled once for each instruction set.
#pragma once
#include <cstdint>

#include "problem.h"

namespace deform_attn {

struct bfloat16 { uint16_t bits; };

// V: type of the value and the output; A: type of the sums and of all else. weights: the softmax of the logits.
template <typename V, typename A>
struct Kernels {
  // Output of queries [first, last) of one image and head.
  void (*forward)(const Problem&, const V* value, const A* reference, const A* offsets, const A* weights, V* output,
                  int64_t image, int64_t head, int64_t first, int64_t last);
  // Gradients that belong to one image, head and level: its rows of grad_value, its points of grad_offsets and
  // grad_weights, and its own grad_reference for all queries, which is zero before and may be null.
  void (*backward)(const Problem&, const V* grad_output, const V* value, const A* reference, const A* offsets,
                   const A* weights, A* grad_value, A* grad_reference, A* grad_offsets, A* grad_weights, int64_t image,
                   int64_t head, int64_t level);
};

struct CpuKernels {
  Kernels<float, float> float32;
  Kernels<double, double> float64;
  Kernels<bfloat16, float> bfloat16_;
};

}  // namespace deform_attn
