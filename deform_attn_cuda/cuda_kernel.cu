// The CUDA kernels, forward and backward. No PyTorch in here.
//
// A pair is one query and one head. LANES threads of a warp own it, and each of them WIDTH neighbouring channels: 16
// bytes of the value, or one channel where the rows of tensors do not begin at multiples of 16 bytes. Together they own
// 32 channels; where a head has more, they take 32 after 32. Blocks go head by head, so those that run at one time read
// one or two heads' rows of the value, which stay in L2.
//
// A pair's L * P points are taken LANES at a time. Each thread locates one of them: the tokens of its four corners and
// by how much each corner counts. Then all threads of the pair go through these points, which they get by warp
// shuffles, read the rows of the four tokens, and sum in registers. So all threads of a warp take the same steps. Those
// beyond the last query repeat it and write nothing. Warps share nothing.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda_kernel.h"

#ifndef LAUNCH  // tests/cuda_on_cpu has its own
#define LAUNCH(kernel, blocks, stream, ...) kernel<<<blocks, THREADS, 0, stream>>>(__VA_ARGS__)
#endif

namespace deform_attn {
namespace {

constexpr int THREADS = 256;
constexpr int CHANNELS = 32;  // of a pair at a time
constexpr unsigned WARP = 0xffffffff;

// Neighbouring channels, read or written by one instruction.
template <typename V, int WIDTH>
struct alignas(sizeof(V) * WIDTH) Row { V channel[WIDTH]; };

template <typename V, int WIDTH>
__device__ Row<V, WIDTH> read_row(const V* from) { return *reinterpret_cast<const Row<V, WIDTH>*>(from); }

template <int LANES, typename A>
__device__ A sum_of_pair(A x) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) x += __shfl_xor_sync(WARP, x, distance);
  return x;
}

template <int LANES, typename A>
__device__ A max_of_pair(A x) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) x = fmax(x, __shfl_xor_sync(WARP, x, distance));
  return x;
}

// Corners are top left, top right, bottom left, bottom right.
template <typename A>
struct Point {
  A weight;            // of the softmax
  A dx, dy;            // from the top left corner, in cells
  A cells_x, cells_y;  // how many cells an offset of 1 is
  int token[4];
  A count[4];          // weight * bilinear coefficient; 0 outside of the level
  bool inside[4];      // whether the corner is in the level
};

// One query and one head, with the place of this thread among its threads.
template <typename A, int LANES>
struct Pair {
  const Problem& problem;
  int lane;                   // of this thread
  bool exists, warp_exists;   // false beyond the last query, and where no pair of the warp exists
  int64_t row;                // number of the pair in [B Q h]
  int64_t slice;              // first element of its image and head in the value
  int64_t reference;          // first element of its query in the reference
  A x, y, width, height;      // reference point or centre; width and height of what an offset of 1 is in a box
  const A *offsets, *logits;  // of its points
  A top, sum;                 // of the softmax: largest logit, sum of exponentials

  __device__ Pair(const Problem& problem, const A* references, const A* all_offsets, const A* all_logits)
      : problem(problem), lane(threadIdx.x % LANES) {
    const int head = blockIdx.y, image = blockIdx.z;
    const int query = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int last_or_query = min(query, problem.Q - 1);
    exists = query < problem.Q;
    warp_exists = query - threadIdx.x % 32 / LANES < problem.Q;
    if (!warp_exists) return;
    row = (int64_t(image) * problem.Q + last_or_query) * problem.h + head;
    slice = (int64_t(image) * problem.N * problem.h + head) * problem.c;
    reference = problem.boxes ? 4 * (int64_t(image) * problem.Q + last_or_query) : 2 * int64_t(last_or_query);
    x = references[reference];
    y = references[reference + 1];
    width = problem.boxes ? references[reference + 2] * (A(0.5) / problem.P) : 0;
    height = problem.boxes ? references[reference + 3] * (A(0.5) / problem.P) : 0;
    offsets = all_offsets + 2 * row * points();
    logits = all_logits + row * points();
    top = logits[0];
    for (int point = lane; point < points(); point += LANES) top = fmax(top, logits[point]);
    top = max_of_pair<LANES>(top);
    sum = 0;
    for (int point = lane; point < points(); point += LANES) sum += exp(logits[point] - top);
    sum = sum_of_pair<LANES>(sum);
  }

  __device__ int points() const { return problem.L * problem.P; }
  __device__ A weight(int point) const { return exp(logits[point] - top) / sum; }
  __device__ const Level& level(int point) const { return problem.levels[point / problem.P]; }

  // Infinity is outside. A corner outside counts zero and is taken for the level's first token, so that it can be read
  // without a branch. If the location is NaN, all corners are outside and count NaN.
  __device__ Point<A> locate(int point) const {
    const Level level = this->level(point);
    Point<A> p;
    p.weight = weight(point);
    p.cells_x = problem.boxes ? width * level.W : 1;
    p.cells_y = problem.boxes ? height * level.H : 1;
    const A px = offsets[2 * point] * p.cells_x + (x * level.W - A(0.5));
    const A py = offsets[2 * point + 1] * p.cells_y + (y * level.H - A(0.5));
    const A near_x = fmin(fmax(px, A(-2)), A(level.W)), near_y = fmin(fmax(py, A(-2)), A(level.H));  // -2 for NaN
    const int column = int(floor(near_x)), line = int(floor(near_y));
    p.dx = near_x - column + (px == px ? 0 : px);
    p.dy = near_y - line + (py == py ? 0 : py);
    const A outside = (p.dx - p.dx) + (p.dy - p.dy);  // 0, or NaN where the location is
    const auto set_corner = [&](int k, int dx, int dy, A coefficient) {
      const int cx = column + dx, cy = line + dy;
      p.inside[k] = cx >= 0 && cx < level.W && cy >= 0 && cy < level.H;
      p.token[k] = level.start + (p.inside[k] ? cy * level.W + cx : 0);
      p.count[k] = p.weight * (p.inside[k] ? coefficient : outside);
    };
    set_corner(0, 0, 0, (1 - p.dy) * (1 - p.dx));
    set_corner(1, 1, 0, (1 - p.dy) * p.dx);
    set_corner(2, 0, 1, p.dy * (1 - p.dx));
    set_corner(3, 1, 1, p.dy * p.dx);
    return p;
  }
};

template <typename V, typename A, int WIDTH>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 8 ? 3 : 4)  // blocks at one time, so what registers allow
forward(const __grid_constant__ Problem problem, const V* __restrict__ value, const A* __restrict__ reference,
        const A* __restrict__ offsets, const A* __restrict__ logits, V* __restrict__ output) {
  constexpr int LANES = CHANNELS / WIDTH;
  const Pair<A, LANES> pair(problem, reference, offsets, logits);
  if (!pair.warp_exists) return;
  const int64_t stride = int64_t(problem.h) * problem.c;  // from one token to the next
  for (int channel = pair.lane * WIDTH, round = 0; round < problem.c; round += CHANNELS, channel += CHANNELS) {
    const bool active = channel < problem.c;
    const V* const rows = value + pair.slice + (active ? channel : 0);
    A sum[WIDTH] = {};
    for (int first = 0; first < pair.points(); first += LANES) {
      const Point<A> mine = pair.locate(min(first + pair.lane, pair.points() - 1));
      for (int lane = 0; lane < min(LANES, pair.points() - first); ++lane) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int token = __shfl_sync(WARP, mine.token[k], lane, LANES);
          const A count = __shfl_sync(WARP, mine.count[k], lane, LANES);
          const Row<V, WIDTH> row = read_row<V, WIDTH>(rows + token * stride);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum[i] += count * A(row.channel[i]);
        }
      }
    }
    if (active && pair.exists) {
      Row<V, WIDTH> row;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) row.channel[i] = V(sum[i]);
      *reinterpret_cast<Row<V, WIDTH>*>(output + pair.row * problem.c + channel) = row;
    }
  }
}

// Adds to neighbouring numbers in memory, where other threads add as well.
template <int WIDTH, typename A>
__device__ void add(A* to, const A (&numbers)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) atomicAdd(to + i, numbers[i]);
}

#if __CUDA_ARCH__ >= 900 || defined(ADD_FOUR)  // four by one instruction
template <int WIDTH>
__device__ std::enable_if_t<WIDTH % 4 == 0> add(float* to, const float (&numbers)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; i += 4)
    atomicAdd(reinterpret_cast<float4*>(to + i),
              make_float4(numbers[i], numbers[i + 1], numbers[i + 2], numbers[i + 3]));
}
#endif

// With dot[k] the product of grad_output and the row of corner k, summed over channels, the gradients of a point are
// those of the bilinear interpolation of dot. The threads of a pair sum dot; the thread that located the point does the
// rest. grad_reference may be null.
template <typename V, typename A, int WIDTH>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 8 ? 2 : 3)
backward(const __grid_constant__ Problem problem, const V* __restrict__ grad_output, const V* __restrict__ value,
         const A* __restrict__ reference, const A* __restrict__ offsets, const A* __restrict__ logits,
         A* __restrict__ grad_value, A* __restrict__ grad_reference, A* __restrict__ grad_offsets,
         A* __restrict__ grad_logits) {
  constexpr int LANES = CHANNELS / WIDTH;
  const Pair<A, LANES> pair(problem, reference, offsets, logits);
  if (!pair.warp_exists) return;
  const int64_t stride = int64_t(problem.h) * problem.c;
  grad_offsets += 2 * pair.row * pair.points();
  grad_logits += pair.row * pair.points();
  A by_weights = 0;         // sum of weight * its gradient, over this thread's points
  A by_reference[4] = {};
  for (int channel = pair.lane * WIDTH, round = 0; round < problem.c; round += CHANNELS, channel += CHANNELS) {
    const bool active = channel < problem.c && pair.exists;
    const int64_t rows = pair.slice + (active ? channel : 0);
    A grad[WIDTH] = {};
    if (active) {
      const Row<V, WIDTH> row = read_row<V, WIDTH>(grad_output + pair.row * problem.c + channel);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) grad[i] = A(row.channel[i]);
    }
    for (int first = 0; first < pair.points(); first += LANES) {
      const int point = min(first + pair.lane, pair.points() - 1);
      const Point<A> mine = pair.locate(point);
      A dot[4] = {};  // of this thread's point
      for (int lane = 0; lane < min(LANES, pair.points() - first); ++lane) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t at = rows + __shfl_sync(WARP, mine.token[k], lane, LANES) * stride;
          const A count = __shfl_sync(WARP, mine.count[k], lane, LANES);
          const Row<V, WIDTH> row = read_row<V, WIDTH>(value + at);
          A product = 0, counted[WIDTH];
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) {
            product += grad[i] * A(row.channel[i]);
            counted[i] = grad[i] * count;
          }
          if (active && count != 0) add(grad_value + at, counted);
          product = sum_of_pair<LANES>(product);
          if (lane == pair.lane) dot[k] = product;
        }
      }
      if (!pair.exists || first + pair.lane >= pair.points()) continue;
#pragma unroll
      for (int k = 0; k < 4; ++k) dot[k] *= A(mine.inside[k]);
      const A w = mine.weight, dx = mine.dx, dy = mine.dy;
      const A logit = w * ((1 - dy) * ((1 - dx) * dot[0] + dx * dot[1]) + dy * ((1 - dx) * dot[2] + dx * dot[3]));
      const A x = w * ((1 - dy) * (dot[1] - dot[0]) + dy * (dot[3] - dot[2]));  // by a move of one cell
      const A y = w * ((1 - dx) * (dot[2] - dot[0]) + dx * (dot[3] - dot[1]));
      const bool again = round > 0;  // then earlier channels have written
      grad_logits[point] = logit + (again ? grad_logits[point] : 0);
      grad_offsets[2 * point] = x * mine.cells_x + (again ? grad_offsets[2 * point] : 0);
      grad_offsets[2 * point + 1] = y * mine.cells_y + (again ? grad_offsets[2 * point + 1] : 0);
      by_weights += logit;
      const A by_x = x * pair.level(point).W, by_y = y * pair.level(point).H;
      by_reference[0] += by_x;
      by_reference[1] += by_y;
      by_reference[2] += by_x * pair.offsets[2 * point] * (A(0.5) / problem.P);
      by_reference[3] += by_y * pair.offsets[2 * point + 1] * (A(0.5) / problem.P);
    }
  }
  by_weights = sum_of_pair<LANES>(by_weights);
  for (int point = pair.lane; point < pair.points() && pair.exists; point += LANES)
    grad_logits[point] -= pair.weight(point) * by_weights;
  if (grad_reference == nullptr) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const A sum = sum_of_pair<LANES>(by_reference[i]);
    if (pair.exists && pair.lane == 0 && i < (problem.boxes ? 4 : 2))
      atomicAdd(grad_reference + pair.reference + i, sum);
  }
}

template <int WIDTH>
dim3 blocks_of(const Problem& problem) {
  constexpr int PAIRS = THREADS * WIDTH / CHANNELS;  // of a block
  return dim3((problem.Q - 1) / PAIRS + 1, problem.h, problem.B);
}

// Whether rows of the value and of all that is like it begin at multiples of 16 bytes.
template <int WIDTH, typename... Pointers>
bool aligned(const Problem& problem, Pointers... pointers) {
  return problem.c % WIDTH == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

}  // namespace

template <typename V, typename A>
void launch_forward(const Problem& problem, const Inputs<V, A>& in, V* output, cudaStream_t stream) {
  const auto launch_by = [&]<int WIDTH>() {
    LAUNCH((forward<V, A, WIDTH>), blocks_of<WIDTH>(problem), stream, problem, in.value, in.reference, in.offsets,
           in.logits, output);
  };
  constexpr int WIDTH = 16 / sizeof(V);
  if (aligned<WIDTH>(problem, in.value, output)) launch_by.template operator()<WIDTH>();
  else launch_by.template operator()<1>();
}

template <typename V, typename A>
void launch_backward(const Problem& problem, const V* grad_output, const Inputs<V, A>& in,
                     const Gradients<A>& gradients, cudaStream_t stream) {
  const auto launch_by = [&]<int WIDTH>() {
    LAUNCH((backward<V, A, WIDTH>), blocks_of<WIDTH>(problem), stream, problem, grad_output, in.value, in.reference,
           in.offsets, in.logits, gradients.value, gradients.reference, gradients.offsets, gradients.logits);
  };
  constexpr int WIDTH = 16 / sizeof(V);
  if (aligned<WIDTH>(problem, in.value, grad_output, gradients.value)) launch_by.template operator()<WIDTH>();
  else launch_by.template operator()<1>();
}

#define INSTANTIATE(V, A)                                                                \
  template void launch_forward(const Problem&, const Inputs<V, A>&, V*, cudaStream_t); \
  template void launch_backward(const Problem&, const V*, const Inputs<V, A>&, const Gradients<A>&, cudaStream_t)
INSTANTIATE(float, float);
INSTANTIATE(double, double);
INSTANTIATE(__half, float);
INSTANTIATE(__nv_bfloat16, float);

}  // namespace deform_attn
