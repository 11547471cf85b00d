// The CUDA kernels, forward and backward. No PyTorch in here.
//
// Who owns what. A pair is one query and one head. `lanes` threads, a power of two in one warp, own a pair; each holds
// WIDTH of its c channels, 16 bytes of a row of memory in the forward. A warp owns 32 / lanes pairs: consecutive
// queries of one head of one image, so that the rows they sample are often the same and found in L1. Blocks go
// head by head: those that run at one time share one or two heads' rows of the value, which stay in L2.
//
// Of a pair's L * P points, 2 * lanes at a time are computed, each by one thread of the warp, which leaves the four
// corner tokens and the weights in shared memory (`locate`); then the owners of the pair go through these points, read
// the four rows, and sum in registers. A warp synchronises with itself alone.
//
// What bounds it, for 20,197 queries of 8 heads, 32 channels and 16 points: 1.3 GB of rows in float32 (0.66 GB in 16
// bit) go through L1, 18 times what must come from memory; the backward adds as many float32 numbers to grad_value,
// 331 million, in L2. Arithmetic is nowhere near a limit. On sm_90 four neighbours are added by one instruction.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_kernel.h"

#ifndef LAUNCH  // cuda_on_cpu.cpp has its own
#define LAUNCH(kernel, blocks, stream, ...) kernel<<<blocks, THREADS, 0, stream>>>(__VA_ARGS__)
#endif

namespace deform_attn {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int SLOTS = 64;  // points of one warp in shared memory at a time: 32 / lanes pairs of 2 * lanes points
constexpr unsigned ALL = 0xffffffff;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename V> __device__ __forceinline__ V narrow(float x);
template <> __device__ __forceinline__ float narrow(float x) { return x; }
template <> __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <typename V> __device__ __forceinline__ V narrow(double x) { return x; }

// WIDTH neighbouring channels, moved by one instruction.
template <typename V, int WIDTH>
struct alignas(sizeof(V) * WIDTH) Row { V channel[WIDTH]; };

template <typename V, int WIDTH, typename A>
__device__ __forceinline__ void load(const V* from, A (&to)[WIDTH]) {
  const Row<V, WIDTH> row = *reinterpret_cast<const Row<V, WIDTH>*>(from);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) to[i] = widen(row.channel[i]);
}

template <typename A, int WIDTH>
__device__ __forceinline__ void add_to_memory(A* to, const A (&terms)[WIDTH]) {
#if __CUDA_ARCH__ >= 900
  constexpr bool at_once = WIDTH == 4 && sizeof(A) == 4;
  if constexpr (at_once)
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "f"(terms[0]), "f"(terms[1]), "f"(terms[2]), "f"(terms[3]) : "memory");
#else
  constexpr bool at_once = false;
#endif
  if constexpr (!at_once)
    for (int i = 0; i < WIDTH; ++i) atomicAdd(to + i, terms[i]);
}

// Top left, top right, bottom left, bottom right; -1 where outside of the level.
struct alignas(16) Corners { int token[4]; };

// Corner tokens of a location, and how far (dx, dy) it lies right of and below the first. Infinity is outside; where
// the location is not a number, neither are dx and dy, and all corners are the level's first token, to let that show.
template <typename A>
__device__ __forceinline__ Corners locate(const CudaProblem& problem, int level, A x, A y, A& dx, A& dy) {
  const int W = problem.width[level], H = problem.height[level], start = problem.start[level];
  x = x * W - A(0.5);
  y = y * H - A(0.5);
  x = x < -2 ? A(-2) : x > W ? A(W) : x;  // far outside is outside, and NaN stays
  y = y < -2 ? A(-2) : y > H ? A(H) : y;
  const A left = floor(x), top = floor(y);
  dx = x - left;
  dy = y - top;
  if (dx != dx || dy != dy) return {start, start, start, start};
  const int column = int(left), line = int(top), token = start + line * W + column;
  const bool has_left = column >= 0 && column < W, has_right = column >= -1 && column + 1 < W;
  const bool has_top = line >= 0 && line < H, has_bottom = line >= -1 && line + 1 < H;
  return {has_top && has_left ? token : -1, has_top && has_right ? token + 1 : -1,
          has_bottom && has_left ? token + W : -1, has_bottom && has_right ? token + W + 1 : -1};
}

// Where this thread works.
struct Place {
  int lanes, lane;               // threads of a pair, and the number of this one
  int pair, pairs;               // number of its pair in the warp, and of how many
  int image, head, first_query;  // the first query of the warp
  int64_t slice;                 // first element of this image and head in the value

  __device__ Place(const CudaProblem& problem, int lanes_log2) {
    lanes = 1 << lanes_log2;
    lane = threadIdx.x & (lanes - 1);
    pairs = 32 >> lanes_log2;
    pair = (threadIdx.x & 31) >> lanes_log2;
    const int tile = WARPS * pairs, tiles = (problem.Q - 1) / tile + 1, block = blockIdx.x;
    image = block / tiles / problem.h;
    head = block / tiles % problem.h;
    first_query = block % tiles * tile + threadIdx.x / 32 * pairs;
    slice = (int64_t(image) * problem.N * problem.h + head) * problem.c;
  }

  // The number of a pair in [B Q h].
  __device__ int64_t row(const CudaProblem& problem, int query) const {
    return (int64_t(image) * problem.Q + query) * problem.h + head;
  }
};

// Points [first, first + 2 * lanes) of all pairs of the warp, one thread for each: calls visit(slot, row, point) with
// row, the number of the pair in [B Q h]. Slots are such that the pairs of a warp read neighbouring ones.
template <typename Visit>
__device__ __forceinline__ void for_points(const CudaProblem& problem, const Place& place, int lanes_log2, int first,
                                           Visit visit) {
  const int points = problem.L * problem.P;
  for (int item = threadIdx.x & 31; item < SLOTS; item += 32) {
    const int pair = item >> (lanes_log2 + 1), offset = item & (2 * place.lanes - 1), point = first + offset;
    const int query = place.first_query + pair;
    if (point < points && query < problem.Q) visit(offset * place.pairs + pair, place.row(problem, query), point);
  }
}

template <typename V, typename A, int WIDTH>
__global__ void __launch_bounds__(THREADS, 4)
forward(const __grid_constant__ CudaProblem problem, int lanes_log2, const V* __restrict__ value,
        const A* __restrict__ locations, const A* __restrict__ weights, V* __restrict__ output) {
  __shared__ Corners all_tokens[WARPS][SLOTS];
  struct alignas(16) Counts { A corner[4]; };
  __shared__ Counts all_counts[WARPS][SLOTS];
  Corners* tokens = all_tokens[threadIdx.x / 32];
  Counts* counts = all_counts[threadIdx.x / 32];
  const Place place(problem, lanes_log2);
  const int points = problem.L * problem.P, step = 2 * place.lanes;
  const int stride = problem.h * problem.c, query = place.first_query + place.pair;
  value += place.slice;

  for (int begin = 0; begin < problem.c; begin += place.lanes * WIDTH) {  // once, but for very many channels
    const int channel = begin + place.lane * WIDTH;
    const bool active = channel < problem.c && query < problem.Q;
    A sum[WIDTH] = {};
    for (int first = 0; first < points; first += step) {
      __syncwarp();
      for_points(problem, place, lanes_log2, first, [&](int slot, int64_t row, int point) {
        const int64_t at = row * points + point;
        const int level = point / problem.P;
        A dx, dy;
        const Corners corners = locate(problem, level, locations[2 * at], locations[2 * at + 1], dx, dy);
        const A top = weights[at] * (1 - dy), bottom = weights[at] * dy;
        const A count[4] = {top * (1 - dx), top * dx, bottom * (1 - dx), bottom * dx};
#pragma unroll
        for (int k = 0; k < 4; ++k) {  // a corner outside counts nothing, unless its weight is not a number
          tokens[slot].token[k] = corners.token[k] < 0 ? problem.start[level] : corners.token[k];
          counts[slot].corner[k] = corners.token[k] < 0 ? A(0) * count[k] : count[k];
        }
      });
      __syncwarp();
      if (active) {
        const int end = min(step, points - first);
#pragma unroll 2
        for (int p = 0; p < end; ++p) {
          const Corners corners = tokens[p * place.pairs + place.pair];
          const Counts count = counts[p * place.pairs + place.pair];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            A sampled[WIDTH];
            load<V, WIDTH>(value + int64_t(corners.token[k]) * stride + channel, sampled);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum[i] += count.corner[k] * sampled[i];
          }
        }
      }
    }
    if (active) {
      Row<V, WIDTH> row;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) row.channel[i] = narrow<V>(sum[i]);
      *reinterpret_cast<Row<V, WIDTH>*>(output + place.row(problem, query) * problem.c + channel) = row;
    }
  }
}

// With d_k the product of grad_output with the row of corner k, summed over channels: grad_weights is the sum of d_k by
// shares, grad_locations that of differences of d_k. So three sums over the lanes of a pair are all that is needed.
template <typename V, typename A, int WIDTH>
__global__ void __launch_bounds__(THREADS, 3)
backward(const __grid_constant__ CudaProblem problem, int lanes_log2, const V* __restrict__ grad_output,
         const V* __restrict__ value, const A* __restrict__ locations, const A* __restrict__ weights,
         A* __restrict__ grad_value, A* __restrict__ grad_locations, A* __restrict__ grad_weights) {
  struct Shares { A dx, dy, weight; };
  struct Gradients { A weight, x, y; };
  __shared__ Corners all_tokens[WARPS][SLOTS];
  __shared__ Shares all_shares[WARPS][SLOTS];
  __shared__ Gradients all_gradients[WARPS][SLOTS];
  Corners* tokens = all_tokens[threadIdx.x / 32];
  Shares* shares = all_shares[threadIdx.x / 32];
  Gradients* gradients = all_gradients[threadIdx.x / 32];
  const Place place(problem, lanes_log2);
  const int points = problem.L * problem.P, step = 2 * place.lanes;
  const int stride = problem.h * problem.c, query = place.first_query + place.pair;
  const int first_channel = place.lane * WIDTH;
  value += place.slice;
  grad_value += place.slice;
  grad_output += place.row(problem, query) * problem.c;
  const bool asks = query < problem.Q;
  A grad[WIDTH] = {};
  if (asks && first_channel < problem.c) load<V, WIDTH>(grad_output + first_channel, grad);

  for (int first = 0; first < points; first += step) {
    for_points(problem, place, lanes_log2, first, [&](int slot, int64_t row, int point) {
      const int64_t at = row * points + point;
      Shares share;
      share.weight = weights[at];
      tokens[slot] = locate(problem, point / problem.P, locations[2 * at], locations[2 * at + 1], share.dx, share.dy);
      shares[slot] = share;
    });
    __syncwarp();
    const int end = min(step, points - first);
    for (int p = 0; p < end; ++p) {  // by the whole warp, as its threads exchange numbers
      const int slot = p * place.pairs + place.pair;
      A d[4] = {}, dx = 0, dy = 0;
      if (asks) {
        const Corners corners = tokens[slot];
        const A weight = shares[slot].weight;
        dx = shares[slot].dx;
        dy = shares[slot].dy;
        const A count[4] = {weight * (1 - dy) * (1 - dx), weight * (1 - dy) * dx, weight * dy * (1 - dx), weight * dy * dx};
        for (int channel = first_channel; channel < problem.c; channel += place.lanes * WIDTH) {
          if (problem.c > place.lanes * WIDTH) load<V, WIDTH>(grad_output + channel, grad);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            if (corners.token[k] < 0) continue;
            const int64_t at = int64_t(corners.token[k]) * stride + channel;
            A sampled[WIDTH], term[WIDTH];
            load<V, WIDTH>(value + at, sampled);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) {
              d[k] += grad[i] * sampled[i];
              term[i] = grad[i] * count[k];
            }
            add_to_memory<A, WIDTH>(grad_value + at, term);
          }
        }
      }
      A weight = (1 - dy) * ((1 - dx) * d[0] + dx * d[1]) + dy * ((1 - dx) * d[2] + dx * d[3]);
      A x = (1 - dy) * (d[1] - d[0]) + dy * (d[3] - d[2]), y = (1 - dx) * (d[2] - d[0]) + dx * (d[3] - d[1]);
      for (int distance = place.lanes / 2; distance; distance /= 2) {
        weight += __shfl_xor_sync(ALL, weight, distance);
        x += __shfl_xor_sync(ALL, x, distance);
        y += __shfl_xor_sync(ALL, y, distance);
      }
      if (place.lane == 0) gradients[slot] = {weight, x, y};
    }
    __syncwarp();
    for_points(problem, place, lanes_log2, first, [&](int slot, int64_t row, int point) {
      const int64_t at = row * points + point;
      const int level = point / problem.P;
      const Gradients gradient = gradients[slot];
      const A weight = shares[slot].weight;
      grad_weights[at] = gradient.weight;
      grad_locations[2 * at] = gradient.x * weight * problem.width[level];
      grad_locations[2 * at + 1] = gradient.y * weight * problem.height[level];
    });  // the same thread writes these slots next
  }
}

// Threads of a pair for c channels, WIDTH for each thread, as a power of two.
int lanes_log2(int c, int width) {
  int log2 = 0;
  while (log2 < 5 && (width << log2) < c) ++log2;
  return log2;
}

int blocks(const CudaProblem& problem, int lanes_log2) {
  const int tile = WARPS * (32 >> lanes_log2);
  return problem.B * problem.h * ((problem.Q - 1) / tile + 1);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <int WIDTH, typename V, typename A>
void forward_by(const CudaProblem& problem, const V* value, const A* locations, const A* weights, V* output,
                cudaStream_t stream) {
  const int log2 = lanes_log2(problem.c, WIDTH);
  const auto kernel = forward<V, A, WIDTH>;
  LAUNCH(kernel, blocks(problem, log2), stream, problem, log2, value, locations, weights, output);
}

template <int WIDTH, typename V, typename A>
void backward_by(const CudaProblem& problem, const V* grad_output, const V* value, const A* locations, const A* weights,
                 A* grad_value, A* grad_locations, A* grad_weights, cudaStream_t stream) {
  const int log2 = lanes_log2(problem.c, WIDTH);
  const auto kernel = backward<V, A, WIDTH>;
  LAUNCH(kernel, blocks(problem, log2), stream, problem, log2, grad_output, value, locations, weights, grad_value,
         grad_locations, grad_weights);
}

}  // namespace

template <typename V, typename A>
void launch_forward(const CudaProblem& problem, const V* value, const A* locations, const A* weights, V* output,
                    cudaStream_t stream) {
  constexpr int WIDTH = 16 / sizeof(V);
  if (problem.c % WIDTH == 0 && aligned(value) && aligned(output))
    forward_by<WIDTH>(problem, value, locations, weights, output, stream);
  else
    forward_by<1>(problem, value, locations, weights, output, stream);
}

// A thread adds 16 bytes of grad_value, whose type is A, at once.
template <typename V, typename A>
void launch_backward(const CudaProblem& problem, const V* grad_output, const V* value, const A* locations,
                     const A* weights, A* grad_value, A* grad_locations, A* grad_weights, cudaStream_t stream) {
  constexpr int WIDTH = 16 / sizeof(A);
  if (problem.c % WIDTH == 0 && aligned(value) && aligned(grad_output) && aligned(grad_value))
    backward_by<WIDTH>(problem, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights, stream);
  else
    backward_by<1>(problem, grad_output, value, locations, weights, grad_value, grad_locations, grad_weights, stream);
}

#define INSTANTIATE(V, A)                                                                                       \
  template void launch_forward(const CudaProblem&, const V*, const A*, const A*, V*, cudaStream_t);             \
  template void launch_backward(const CudaProblem&, const V*, const V*, const A*, const A*, A*, A*, A*, cudaStream_t)
INSTANTIATE(float, float);
INSTANTIATE(double, double);
INSTANTIATE(__half, float);
INSTANTIATE(__nv_bfloat16, float);

}  // namespace deform_attn
