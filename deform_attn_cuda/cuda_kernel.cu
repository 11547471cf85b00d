// The CUDA kernels, forward and backward. No PyTorch in here.
//
// Who owns what. A pair is one query and one head. LANES threads of a warp own a pair and take 32 of its channels at a
// time, WIDTH neighbours for each thread: 16 bytes of memory. So a warp owns WIDTH pairs, and a block a tile of queries
// that lie side by side, of one head of one image, whose samples are often of the same rows, which are then found in
// L1. Blocks go head by head: those that run at one time share one or two heads' rows of the value, which stay in L2.
//
// First the threads of a pair find the sum that its softmax divides by. Then its L * P points are taken in steps. Each
// thread computes two of them (of double one), its items (`locate`), and leaves the tokens of their corners and what
// these count in shared memory, in a slot for each point of the step. Then all threads of the pair go through the
// slots, read the four rows of each, and sum in registers. A warp of the forward synchronises with itself alone.
//
// The backward adds to grad_value, where the corners of many points meet. A block first sums what it has for a token
// (`Tile`), then adds it to memory once. 49 million numbers are added for the encoder's 300 million at local offsets,
// and 255 for 321 million at random ones. L2 adds perhaps 0.8 million a microsecond. By this estimate
// even the random ones are worth the instructions that it costs; so it is done always.
//
// What bounds it, for 20,197 queries of 8 heads, 32 channels and 16 points on an H100: instructions. It issues 0.93
// million warp instructions a microsecond, and the forward is 32 million of them in float32 and 36 million in 16 bit,
// so 34 or 39 us, while its 1.3 (0.66) GB of rows leave L1 in 45 (22) us. Most are those that a point needs: for each
// corner a load, its address, WIDTH multiplications, and in 16 bit WIDTH conversions. The backward is 134 million in
// float32 and 146 million in 16 bit, so 145 or 158 us, of which sums of tokens are half.
// `python -m deform_attn_cuda.sass` counts.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda_kernel.h"

#if __CUDA_ARCH__ >= 900
#define VECTOR_REDUCTION true  // four neighbours are added to memory by one instruction
#elif !defined(VECTOR_REDUCTION)
#define VECTOR_REDUCTION false
#endif

#ifndef LAUNCH  // cuda_on_cpu.cpp has its own, and of SHARED
#define SHARED(Type, name) __shared__ Type name
#define LAUNCH(kernel, blocks, stream, ...) kernel<<<blocks, THREADS, 0, stream>>>(__VA_ARGS__)

// Keeps nvcc from computing x anew wherever it is used.
template <typename T>
__device__ __forceinline__ void keep(T& x) {
  if constexpr (sizeof x == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
}

__device__ __forceinline__ float power_of_2(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float log_2(float x) {
  asm("lg2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ float reciprocal(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ __forceinline__ double power_of_2(double x) { return exp2(x); }
__device__ __forceinline__ double log_2(double x) { return log2(x); }
__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }

__device__ __forceinline__ void add_four(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(a),
               "f"(b), "f"(c), "f"(d) : "memory");
}
#endif

namespace deform_attn {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int CHANNELS = 32;  // of a pair, at a time
constexpr unsigned ALL = 0xffffffff;
constexpr double LOG2_E = 1.4426950408889634;

// WIDTH neighbouring channels, moved by one instruction.
template <typename V, int WIDTH>
struct alignas(sizeof(V) * WIDTH) Row { V channel[WIDTH]; };

template <typename A, int WIDTH>
__device__ __forceinline__ void widen(const Row<A, WIDTH>& row, A (&to)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) to[i] = row.channel[i];
}
template <int WIDTH>
__device__ __forceinline__ void widen(const Row<__half, WIDTH>& row, float (&to)[WIDTH]) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) to[i] = __half2float(row.channel[i]);
}
__device__ __forceinline__ void widen(const Row<__nv_bfloat16, 1>& row, float (&to)[1]) {
  to[0] = __bfloat162float(row.channel[0]);
}
template <int WIDTH>
__device__ __forceinline__ void widen(const Row<__nv_bfloat16, WIDTH>& row, float (&to)[WIDTH]) {
  const unsigned* words = reinterpret_cast<const unsigned*>(&row);  // of two channels each, the first one low
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) to[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000 : words[i / 2] << 16);
}

template <typename V> __device__ __forceinline__ V narrow(float x);
template <> __device__ __forceinline__ float narrow(float x) { return x; }
template <> __device__ __forceinline__ __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }
template <typename V> __device__ __forceinline__ V narrow(double x) { return x; }

// Four numbers of a point, for its corners top left, top right, bottom left and bottom right.
template <typename T>
struct alignas(16) Corners { T corner[4]; };

template <typename A>
struct Offset { A x, y; };

// What turns a pair's offsets and logits into locations and weights.
template <typename A>
struct Pair {
  const Offset<A>* offsets;
  const A* logits;
  A x, y;                  // its centre
  A cells, width, height;  // an offset of 1 is so many cells, and so much of a level's W and H
  A half;                  // 0.5 / P
  A shift;                 // of the softmax

  __device__ __forceinline__ A weight(int point) const { return power_of_2(__ldg(logits + point) * A(LOG2_E) - shift); }
};

template <typename A>
struct Point {
  Corners<unsigned> tokens;
  Corners<A> counts;   // weight * share of the line * share of the column
  A weight, dx, dy;    // how far it lies right of and below the top left corner
  A scale_x, scale_y;  // how many cells an offset of 1 is
  int inside;          // bit k: corner k is inside of the level
};

__device__ __forceinline__ const Level& level_of(const CudaProblem& problem, int point) {
  return problem.level[__umulhi(2 * point, problem.levels_per_point)];
}

// Infinity is outside. A corner outside counts nothing and reads the level's first token, so that there are no
// branches; what is not a number shows there as well. A location that is not a number has all corners outside and
// counts NaN.
template <typename A>
__device__ __forceinline__ Point<A> locate(const CudaProblem& problem, const Pair<A>& pair, int point) {
  Point<A> p;
  const Level& level = level_of(problem, point);
  const int W = level.W, H = level.H, start = level.start;
  p.weight = pair.weight(point);
  p.scale_x = pair.width * W + pair.cells;
  p.scale_y = pair.height * H + pair.cells;
  const A x = __ldg(&pair.offsets[point].x) * p.scale_x + (pair.x * W - A(0.5));
  const A y = __ldg(&pair.offsets[point].y) * p.scale_y + (pair.y * H - A(0.5));
  const A near_x = min(max(x, A(-2)), A(W)), near_y = min(max(y, A(-2)), A(H));  // -2 for NaN
  const int column = int(floor(near_x)), line = int(floor(near_y));
  p.dx = x == x ? near_x - column : x;
  p.dy = y == y ? near_y - line : y;
  const bool in_column[2] = {unsigned(column) < unsigned(W), unsigned(column + 1) < unsigned(W)};
  const bool in_line[2] = {unsigned(line) < unsigned(H), unsigned(line + 1) < unsigned(H)};
  const A share_x[2] = {1 - p.dx, p.dx}, share_y[2] = {p.weight * (1 - p.dy), p.weight * p.dy};
  int token = start + line * W + column;
  keep(token);
  p.inside = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const bool inside = in_line[k / 2] && in_column[k % 2];
    const A count = share_y[k / 2] * share_x[k % 2];
    p.tokens.corner[k] = inside ? token + k / 2 * W + k % 2 : start;
    p.counts.corner[k] = inside ? count : A(0) * count;
    p.inside |= inside << k;
  }
  return p;
}

// Where this thread works. A block owns a tile of queries: WARPS lines, one for each warp, of PAIRS columns.
template <typename A, int WIDTH>
struct Place {
  static constexpr int ITEMS = 8 / sizeof(A), LANES = CHANNELS / WIDTH, PAIRS = 32 / LANES, STEP = ITEMS * LANES;
  int warp, pair, lane;  // number of its warp in the block, of its pair in the warp, and of itself in the pair
  bool asks;             // false where there is no query; such a thread computes what another does, for nothing
  int row;               // number of its pair in [B Q h]
  int reference;         // first element of its query in the reference
  int64_t slice;         // first element of its image and head in the value

  __device__ __forceinline__ Place(const CudaProblem& problem) {
    warp = threadIdx.x / 32;
    pair = threadIdx.x % 32 / LANES;
    lane = threadIdx.x % LANES;
    const int head = blockIdx.y, image = blockIdx.z;
    const Field* field = problem.fields;
    while (blockIdx.x >= field[1].first_tile) ++field;
    const unsigned tile = blockIdx.x - field->first_tile, tile_line = __umulhi(2 * tile, field->lines_per_tile);
    const int line = tile_line * WARPS + warp, column = (tile - tile_line * field->columns) * PAIRS + pair;
    const int query = field->start + line * field->W + column;
    asks = line < field->H && column < field->W && query < problem.Q;
    const int asked = asks ? query : 0, asked_of_all = image * problem.Q + asked;
    reference = problem.boxes ? 4 * asked_of_all : 2 * asked;
    row = asked_of_all * problem.h + head;
    slice = int64_t(image * problem.N * problem.h + head) * problem.c;
    keep(slice);
  }
};

// Cuts the queries into tiles of WARPS lines of so many columns: where every token asks, in the levels, as neighbours
// sample the same rows; else, or where a level has too many tiles to number them so, as if they were one narrow level.
dim3 cut(CudaProblem& problem, int width) {
  const auto columns = [&](const Level& level) { return unsigned(level.W - 1) / width + 1; };
  const auto tiles = [&](const Level& level) { return columns(level) * ((level.H - 1) / WARPS + 1); };
  bool levels = problem.Q == problem.N;
  for (int l = 0; l < problem.L; ++l)
    levels &= uint64_t(tiles(problem.level[l])) * columns(problem.level[l]) < 1u << 31;
  const Level single = {width, (problem.Q - 1) / width + 1, 0};
  unsigned first_tile = 0;
  Field* field = problem.fields;
  for (int l = 0; l < (levels ? problem.L : 1); ++l, ++field) {
    const Level& level = levels ? problem.level[l] : single;
    *field = {level.W, level.H, level.start, first_tile, columns(level), (1u << 31) / columns(level) + 1};
    first_tile += tiles(level);
  }
  field->first_tile = ~0u;
  return dim3(first_tile, problem.h, problem.B);
}

// The rows of one channel or WIDTH neighbours, one row a token.
template <typename T>
struct Table {
  T* first;
  unsigned stride;  // bytes from one token to the next
  __device__ __forceinline__ T& operator[](unsigned token) const {
    return *(T*)((char*)first + uint64_t(token) * stride);
  }
};

// The sum of x over the threads of a pair, for each of them.
template <int LANES, typename A>
__device__ __forceinline__ A sum_of_pair(A x) {
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) x += __shfl_xor_sync(ALL, x, distance);
  return x;
}

template <int WIDTH, typename A>
__device__ __forceinline__ Pair<A> pair_of(const CudaProblem& problem, const Place<A, WIDTH>& at, const A* reference,
                                           const Offset<A>* offsets, const A* logits) {
  constexpr int LANES = Place<A, WIDTH>::LANES;
  const int points = problem.L * problem.P;
  reference += at.reference;
  const A half = A(0.5) * reciprocal(A(problem.P));
  const int64_t first = int64_t(at.row) * points;
  offsets += first, logits += first;
  keep(offsets), keep(logits);
  Pair<A> pair = {offsets, logits, reference[0], reference[1], A(!problem.boxes),
                  problem.boxes ? reference[2] * half : 0, problem.boxes ? reference[3] * half : 0, half};
  A top = __ldg(pair.logits), sum = 0;
#pragma unroll 1
  for (int point = at.lane; point < points; point += LANES) {
    keep(point);
    top = max(top, __ldg(pair.logits + point));
  }
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) top = max(top, __shfl_xor_sync(ALL, top, distance));
  pair.shift = top * A(LOG2_E);
#pragma unroll 1
  for (int point = at.lane; point < points; point += LANES) {
    keep(point);
    sum += pair.weight(point);
  }
  pair.shift += log_2(sum_of_pair<LANES>(sum));
  return pair;
}

template <typename V, typename A, int WIDTH>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 8 ? 3 : 4)
forward(const __grid_constant__ CudaProblem problem, const V* __restrict__ value, const A* __restrict__ reference,
        const Offset<A>* __restrict__ offsets, const A* __restrict__ logits, V* __restrict__ output) {
  using At = Place<A, WIDTH>;
  At at(problem);
  keep(at.lane);
  if (!__any_sync(ALL, at.asks)) return;  // a warp beyond its level
  struct Slot { Corners<unsigned> tokens; Corners<A> counts; };
  struct Step { Slot slots[At::STEP]; int4 apart; };  // so that pairs read from different banks
  struct Tile { Step steps[WARPS][At::PAIRS]; };
  SHARED(Tile, tile);
  Slot* const slots = tile.steps[at.warp][at.pair].slots;
  const Pair<A> pair = pair_of(problem, at, reference, offsets, logits);
  int points = problem.L * problem.P;
  keep(points);

  for (int begin = 0; begin < problem.c; begin += CHANNELS) {
    const int channel = begin + at.lane * WIDTH;
    const bool active = channel < problem.c;
    const Table<const Row<V, WIDTH>> table = {reinterpret_cast<const Row<V, WIDTH>*>(value + at.slice + channel),
                                              problem.h * problem.c * unsigned(sizeof(V))};
    A sum[WIDTH] = {};
    for (int first = 0; first < points; first += At::STEP) {
      __syncwarp();
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item) {
        const int slot = item * At::LANES + at.lane, point = min(first + slot, points - 1);
        const Point<A> p = locate(problem, pair, point);
        slots[slot].tokens = p.tokens;
        slots[slot].counts = p.counts;
      }
      __syncwarp();
      if (active) {
        const Slot* const end = slots + min(At::STEP, points - first);
#pragma unroll 1
        for (const Slot* slot = slots; slot < end; ++slot) {
          const Corners<unsigned> tokens = slot->tokens;
          const Corners<A> counts = slot->counts;
          Row<V, WIDTH> rows[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) rows[k] = table[tokens.corner[k]];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            A sampled[WIDTH];
            widen(rows[k], sampled);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) sum[i] += counts.corner[k] * sampled[i];
          }
        }
      }
    }
    if (active && at.asks) {
      Row<V, WIDTH> row;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) row.channel[i] = narrow<V>(sum[i]);
      V* const first = output + uint64_t(unsigned(at.row)) * unsigned(problem.c);
      Row<V, WIDTH>* const to = reinterpret_cast<Row<V, WIDTH>*>(first + channel);
      if constexpr (sizeof row == 16)  // nvcc would split a plain store
        __stcg(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&row));
      else
        *to = row;
    }
  }
}

// Adds to a thread's WIDTH channels in memory, at once, or one by one, which lie `apart`.
template <bool AT_ONCE, int WIDTH, typename A>
__device__ __forceinline__ void add_to_memory(A* to, const A (&sum)[WIDTH], int apart) {
  if constexpr (AT_ONCE) {
    add_four(to, sum[0], sum[1], sum[2], sum[3]);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) atomicAdd(to + i * apart, sum[i]);
  }
}

// Of d[0] to d[7] the sums over the threads of a pair: each returns that of d[lane % 8].
template <int LANES, typename A>
__device__ __forceinline__ A sum_of_lanes(A (&d)[8], int lane) {
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const int distance = 4 / half;
    const bool odd = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i)
      d[i] = (odd ? d[2 * i + 1] : d[2 * i]) + __shfl_xor_sync(ALL, odd ? d[2 * i] : d[2 * i + 1], distance);
  }
#pragma unroll
  for (int distance = 8; distance < LANES; distance *= 2) d[0] += __shfl_xor_sync(ALL, d[0], distance);
  return d[0];
}

// What a block of the backward shares in a step. Corners are numbered through its points. Each asks that its count
// times the grad_output of its pair be added to grad_value at its token, and those of neighbouring queries often name
// the same token. So corners of one token are linked to a list, and a list is summed before it is added to memory.
template <typename A, int WIDTH>
struct Tile {
  using At = Place<A, WIDTH>;
  static constexpr int POINTS = THREADS * At::ITEMS, CORNERS = 4 * POINTS, PLACES = CORNERS / 2 * 3;
  static constexpr unsigned NONE = ~0u;
  struct alignas(2 * sizeof(A)) Corner { A count; unsigned next; };

  Row<A, WIDTH> grads[THREADS];  // of each pair's channels
  Corners<unsigned> tokens[POINTS];
  union {
    struct { Corners<A> counts[POINTS], sums[POINTS]; } of;  // sums over channels of grad_output times a corner's row
    Corner corners[CORNERS];                                 // later
  };
  unsigned last[PLACES];           // the corner that a list begins with, at a place found by its token
  unsigned short places[CORNERS];  // of all lists
  unsigned lists;                  // how many there are

  __device__ __forceinline__ unsigned token(unsigned corner) const {
    return reinterpret_cast<const unsigned*>(tokens)[corner];
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < PLACES / THREADS; ++i) last[i * THREADS + threadIdx.x] = NONE;
    if (threadIdx.x == 0) lists = 0;
  }

  // Puts a corner before the others of its token. Returns the place of the list if it is a new one, else NONE. A place
  // that is taken stays so, and its corners are all of one token.
  __device__ __forceinline__ unsigned link(unsigned corner, unsigned its_token, A count) {
    unsigned place = __umulhi(its_token * 2654435769u, PLACES), before;
#pragma unroll 1
    while ((before = atomicCAS(&last[place], NONE, corner)) != NONE && token(before) != its_token)
      place = place + 1 < PLACES ? place + 1 : 0;
    const bool first = before == NONE;
    if (!first) before = atomicExch(&last[place], corner);
    corners[corner] = {count, before};
    return first ? place : NONE;
  }
};

// With d[k] the product of grad_output and the row of corner k, summed over channels, the gradients of a point are sums
// of d by shares, and of their differences. Threads of a pair sum d; the thread whose item the point is does the rest.
// grad_reference may be null.
template <typename V, typename A, int WIDTH>
__global__ void __launch_bounds__(THREADS, sizeof(A) == 8 ? 2 : 3)
backward(const __grid_constant__ CudaProblem problem, const V* __restrict__ grad_output, const V* __restrict__ value,
         const A* __restrict__ reference, const Offset<A>* __restrict__ offsets, const A* __restrict__ logits,
         A* __restrict__ grad_value, A* __restrict__ grad_reference, Offset<A>* __restrict__ grad_offsets,
         A* __restrict__ grad_logits) {
  using At = Place<A, WIDTH>;
  using Tile = Tile<A, WIDTH>;
  const At at(problem);
  SHARED(Tile, tile);
  const Pair<A> pair = pair_of(problem, at, reference, offsets, logits);
  const int points = problem.L * problem.P;
  const bool works = __any_sync(ALL, at.asks);
  grad_output += int64_t(at.row) * problem.c;
  grad_offsets += int64_t(at.row) * points;
  grad_logits += int64_t(at.row) * points;
  // Points of a pair lie in a row, swapped so that the pairs of a warp read from different banks.
  const int row = threadIdx.x / At::LANES * At::STEP, swap = 2 * at.pair;

  for (int begin = 0; begin < problem.c; begin += CHANNELS) {  // later rounds add to the gradients of the points
    const int channel = begin + at.lane * WIDTH;
    const bool active = channel < problem.c;
    // Where four are not added at once, neighbouring threads add to neighbouring channels: whole sectors of memory.
    constexpr bool at_once = VECTOR_REDUCTION && WIDTH == 4 && sizeof(A) == 4;
    const int apart = at_once ? 1 : min(CHANNELS, problem.c - begin) / WIDTH;
    A* const added = grad_value + at.slice + (at_once ? channel : begin + at.lane);
    A grad[WIDTH] = {};
    A nothing = 0;  // NaN where grad_output is not finite, which shows even by a count of 0
    if (active && at.asks) {
      widen(*reinterpret_cast<const Row<V, WIDTH>*>(grad_output + channel), grad);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) nothing += A(0) * grad[i];
    }
    nothing = sum_of_pair<At::LANES>(nothing);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) tile.grads[threadIdx.x].channel[i] = grad[i];
    const auto* const values = reinterpret_cast<const Row<V, WIDTH>*>(value + at.slice + (active ? channel : begin));
    const Table<const Row<V, WIDTH>> table = {values, problem.h * problem.c * unsigned(sizeof(V))};
    A by_weight = 0;  // sum of weight * its gradient

    for (int first = 0; first < points; first += At::STEP) {
      Point<A> items[At::ITEMS];
      tile.clear();
      if (works) {
#pragma unroll
        for (int item = 0; item < At::ITEMS; ++item) {
          const int slot = item * At::LANES + at.lane, point = min(first + slot, points - 1);
          items[item] = locate(problem, pair, point);
          tile.tokens[row + (slot ^ swap)] = items[item].tokens;
          tile.of.counts[row + (slot ^ swap)] = items[item].counts;
        }
        __syncwarp();
        const int end = min(At::STEP, points - first);
#pragma unroll 1
        for (int slot = 0; slot < end; slot += 2) {  // by the whole warp, as its threads exchange numbers
          A d[8];
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const Corners<unsigned> tokens = tile.tokens[row + (slot ^ swap) + s];
            Row<V, WIDTH> rows[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) rows[k] = table[tokens.corner[k]];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              A sampled[WIDTH];
              widen(rows[k], sampled);
              d[4 * s + k] = grad[0] * sampled[0];
#pragma unroll
              for (int i = 1; i < WIDTH; ++i) d[4 * s + k] += grad[i] * sampled[i];
            }
          }
          const A sum = sum_of_lanes<At::LANES>(d, at.lane);
          if (at.lane < 8) tile.of.sums[row + (slot ^ swap) + at.lane / 4].corner[at.lane % 4] = sum;
        }
        __syncwarp();
      }
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item) {
        const int slot = item * At::LANES + at.lane, point = first + slot;
        if (at.asks && point < points) {
          const Point<A>& p = items[item];
          Corners<A> d = tile.of.sums[row + (slot ^ swap)];
#pragma unroll
          for (int k = 0; k < 4; ++k) d.corner[k] = p.inside >> k & 1 ? d.corner[k] : A(0) * d.corner[k];
          const A upper = d.corner[1] - d.corner[0], lower = d.corner[3] - d.corner[2];
          A logit = p.weight * ((1 - p.dy) * (d.corner[0] + p.dx * upper) + p.dy * (d.corner[2] + p.dx * lower));
          const A x = p.weight * ((1 - p.dy) * upper + p.dy * lower);  // by a move of one cell
          const A y = p.weight * ((1 - p.dx) * (d.corner[2] - d.corner[0]) + p.dx * (d.corner[3] - d.corner[1]));
          by_weight += logit;
          grad_logits[point] = logit + (begin > 0 ? grad_logits[point] : 0);
          grad_offsets[point].x = x * p.scale_x + (begin > 0 ? grad_offsets[point].x : 0);
          grad_offsets[point].y = y * p.scale_y + (begin > 0 ? grad_offsets[point].y : 0);
          int reference_asks = grad_reference != nullptr;
          keep(reference_asks);
          if (reference_asks) {
            const Level& level = level_of(problem, point);
            A* const to = grad_reference + at.reference;
            atomicAdd(to, x * level.W);
            atomicAdd(to + 1, y * level.H);
            if (problem.boxes) {
              atomicAdd(to + 2, x * level.W * pair.offsets[point].x * pair.half);
              atomicAdd(to + 3, y * level.H * pair.offsets[point].y * pair.half);
            }
          }
        }
      }

      Corners<A> counts[At::ITEMS];
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item)
        counts[item] = tile.of.counts[row + ((item * At::LANES + at.lane) ^ swap)];
      __syncthreads();  // all tokens are there, and what `corners` writes over has been read
      unsigned places[At::ITEMS][4], lists = 0;
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item) {
        const int slot = item * At::LANES + at.lane, point = row + (slot ^ swap);
        const bool asks = at.asks && first + slot < points;
        const Corners<unsigned> tokens = tile.tokens[point];
        unsigned corner = 4 * point;
        keep(corner);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const A count = counts[item].corner[k];
          places[item][k] = asks && count != nothing ? tile.link(corner + k, tokens.corner[k], count) : Tile::NONE;
          lists += places[item][k] != Tile::NONE;
        }
      }
      unsigned number = atomicAdd(&tile.lists, lists);
#pragma unroll
      for (int k = 0; k < 4 * At::ITEMS; ++k)
        if (places[k / 4][k % 4] != Tile::NONE) tile.places[number++] = places[k / 4][k % 4];

      __syncthreads();  // the lists are whole
#pragma unroll 1
      for (unsigned list = threadIdx.x / At::LANES, lists = tile.lists; list < lists; list += THREADS / At::LANES) {
        unsigned corner = tile.last[tile.places[list]];
        A* const to = added + uint64_t(tile.token(corner)) * unsigned(problem.h * problem.c);
        A sum[WIDTH] = {};
#pragma unroll 1
        do {
          const typename Tile::Corner now = tile.corners[corner];
          const Row<A, WIDTH>* const grads = tile.grads + corner / (4 * At::STEP) * At::LANES;
          Row<A, WIDTH> grad;
          if constexpr (at_once)
            grad = grads[at.lane];
          else
            for (int i = 0; i < WIDTH; ++i) grad.channel[i] = grads->channel[at.lane + i * apart];
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum[i] += now.count * grad.channel[i];
          corner = now.next;
        } while (corner != Tile::NONE);
        if (active) add_to_memory<at_once>(to, sum, apart);
      }
      __syncthreads();  // and have been used
    }
    by_weight = sum_of_pair<At::LANES>(by_weight);
#pragma unroll 1
    for (int point = at.lane; point < points && at.asks; point += At::LANES)
      grad_logits[point] -= pair.weight(point) * by_weight;
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

template <typename V, typename A>
void launch_forward(CudaProblem problem, const Inputs<V, A>& in, V* output, cudaStream_t stream) {
  const auto start = [&](auto kernel, int width) {
    const dim3 blocks = cut(problem, width);  // a warp owns as many pairs as a thread has channels
    LAUNCH(kernel, blocks, stream, problem, in.value, in.reference, reinterpret_cast<const Offset<A>*>(in.offsets),
           in.logits, output);
  };
  constexpr int WIDTH = 16 / sizeof(V);
  if (problem.c % WIDTH == 0 && aligned(in.value) && aligned(output))
    start(forward<V, A, WIDTH>, WIDTH);
  else
    start(forward<V, A, 1>, 1);
}

// A thread adds 16 bytes of grad_value, whose type is A, at once.
template <typename V, typename A>
void launch_backward(CudaProblem problem, const V* grad_output, const Inputs<V, A>& in,
                     const Gradients<A>& gradients, cudaStream_t stream) {
  const auto start = [&](auto kernel, int width) {
    const dim3 blocks = cut(problem, width);  // a warp owns as many pairs as a thread has channels
    LAUNCH(kernel, blocks, stream, problem, grad_output, in.value, in.reference,
           reinterpret_cast<const Offset<A>*>(in.offsets), in.logits, gradients.value, gradients.reference,
           reinterpret_cast<Offset<A>*>(gradients.offsets), gradients.logits);
  };
  constexpr int WIDTH = 16 / sizeof(A);
  if (problem.c % WIDTH == 0 && aligned(in.value) && aligned(grad_output) && aligned(gradients.value))
    start(backward<V, A, WIDTH>, WIDTH);
  else
    start(backward<V, A, 1>, 1);
}

#define INSTANTIATE(V, A)                                                                            \
  template void launch_forward(CudaProblem, const Inputs<V, A>&, V*, cudaStream_t);           \
  template void launch_backward(CudaProblem, const V*, const Inputs<V, A>&, const Gradients<A>&, cudaStream_t)
INSTANTIATE(float, float);
INSTANTIATE(double, double);
INSTANTIATE(__half, float);
INSTANTIATE(__nv_bfloat16, float);

}  // namespace deform_attn
