// The CUDA kernels, forward and backward. No PyTorch in here.
//
// Who owns what. A pair is one query and one head. LANES threads of a warp own a pair and take 32 of its channels at a
// time, WIDTH for each thread: in the forward 16 bytes of the value, in the backward 32 bytes of sums. So a warp owns
// WIDTH pairs, and a block a tile of queries that lie side by side, of one head of one image, whose samples are often
// of the same rows, which are then found in L1. Blocks go head by head: those that run at one time share one or two
// heads' rows of the value, which stay in L2.
//
// First the threads of a pair find the sum that its softmax divides by. Then its L * P points are taken in steps. Each
// thread computes two of them (of double one), its items (`locate`), and leaves the tokens of their corners and what
// these count in shared memory, in a slot for each point of the step. Then all threads of the pair go through the
// slots, read the four rows of each, and sum in registers. A warp of the forward synchronises with itself alone.
//
// The backward adds to grad_value, where the corners of many points meet. A block first sums what it has for a token
// (`Tile`), then adds it to memory once. 35 million numbers are added for the encoder's 300 million at local offsets,
// and 222 for 321 million at random ones. L2 adds perhaps 0.8 million a microsecond. By this estimate
// even the random ones are worth the instructions that it costs; so it is done always.
//
// What bounds it, for 20,197 queries of 8 heads, 32 channels and 16 points on an H100: instructions. It issues 0.93
// million warp instructions a microsecond, and the forward is 32 million of them in float32 and 36 million in 16 bit,
// so 34 or 39 us, while its 1.3 (0.66) GB of rows leave L1 in 45 (22) us. Most are those that a point needs: for each
// corner a load, its address, WIDTH multiplications, and in 16 bit WIDTH conversions. The backward is 112 million in
// float32 and 119 million in 16 bit, so 121 or 129 us, of which sums of tokens are half.
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
// Unlike atomicAdd, these say that memory is global even where nvcc does not know, and nothing waits for them.
__device__ __forceinline__ void add_one(float* to, float a) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(a) : "memory");
}
__device__ __forceinline__ void add_one(double* to, double a) {
  asm volatile("red.relaxed.gpu.global.add.f64 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "d"(a) : "memory");
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

// Where a backward's thread finds piece j of its channels. Each piece is moved by one instruction, threads side by side
// move neighbouring pieces, and those whose `turn` differs move theirs in another order: from different banks.
template <int LANES, int PIECE>
__device__ __forceinline__ int channel_of(int j, int lane, int turn) {
  return ((j ^ turn) * LANES + lane) * PIECE;
}

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
  A shift;                 // of the softmax

  __device__ __forceinline__ Offset<A> scale(const Level& level) const {  // how many cells an offset of 1 is
    return {width * level.W + cells, height * level.H + cells};
  }
  __device__ __forceinline__ A weight(int point) const { return power_of_2(__ldg(logits + point) * A(LOG2_E) - shift); }
};

template <typename A>
struct Point {
  Corners<unsigned> tokens;
  Corners<A> counts;  // weight * share of the line * share of the column
  A weight, dx, dy;   // how far it lies right of and below the top left corner
  int inside;         // bit k: corner k is inside of the level
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
  const Offset<A> scale = pair.scale(level);
  const A x = __ldg(&pair.offsets[point].x) * scale.x + (pair.x * W - A(0.5));
  const A y = __ldg(&pair.offsets[point].y) * scale.y + (pair.y * H - A(0.5));
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
  int query;             // number of its query in [B Q]
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
    query = field->start + line * field->W + column;
    asks = line < field->H && column < field->W && query < problem.Q;
    query = image * problem.Q + (asks ? query : 0);
    slice = int64_t(image * problem.N * problem.h + head) * problem.c;
    keep(slice);
  }

  // The number of its pair in [B Q h].
  __device__ __forceinline__ int row(const CudaProblem& problem) const { return query * problem.h + int(blockIdx.y); }

  // The first element of its query in the reference.
  __device__ __forceinline__ int reference(const CudaProblem& problem) const {
    return problem.boxes ? 4 * query : 2 * (query - int(blockIdx.z) * problem.Q);
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
  reference += at.reference(problem);
  const A half = A(0.5) * reciprocal(A(problem.P));
  const int64_t first = int64_t(at.row(problem)) * points;
  offsets += first, logits += first;
  keep(offsets), keep(logits);
  Pair<A> pair = {offsets, logits, reference[0], reference[1], A(!problem.boxes),
                  problem.boxes ? reference[2] * half : 0, problem.boxes ? reference[3] * half : 0};
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
      V* const first = output + uint64_t(unsigned(at.row(problem))) * unsigned(problem.c);
      Row<V, WIDTH>* const to = reinterpret_cast<Row<V, WIDTH>*>(first + channel);
      if constexpr (sizeof row == 16)  // nvcc would split a plain store
        __stcg(reinterpret_cast<int4*>(to), *reinterpret_cast<const int4*>(&row));
      else
        *to = row;
    }
  }
}

// Adds to neighbouring channels in memory.
template <int PIECE, typename A>
__device__ __forceinline__ void add_to_memory(A* to, const A (&sum)[PIECE]) {
  if constexpr (PIECE == 4)
    add_four(to, sum[0], sum[1], sum[2], sum[3]);
  else
    add_one(to, sum[0]);
}

// Of d[0] to d[3] the sums over the threads of a pair: each returns that of d[lane % 4].
template <int LANES, typename A>
__device__ __forceinline__ A sum_of_lanes(A (&d)[4], int lane) {
#pragma unroll
  for (int half = 2; half > 0; half /= 2) {
    const int distance = 2 / half;
    const bool odd = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i)
      d[i] = (odd ? d[2 * i + 1] : d[2 * i]) + __shfl_xor_sync(ALL, odd ? d[2 * i] : d[2 * i + 1], distance);
  }
#pragma unroll
  for (int distance = 4; distance < LANES; distance *= 2) d[0] += __shfl_xor_sync(ALL, d[0], distance);
  return d[0];
}

// What a block of the backward shares in a step. Corners are numbered through its points. Each asks that its count
// times the grad_output of its pair be added to grad_value at its token, and those of neighbouring queries often name
// the same token. So corners of one token are linked to a list, and a list is summed before it is added to memory.
// Instead of a token stands the number of the piece of the value that its row begins with.
template <typename A, int WIDTH>
struct Tile {
  using At = Place<A, WIDTH>;
  static constexpr int POINTS = THREADS * At::ITEMS, CORNERS = 4 * POINTS;
  static constexpr unsigned NONE = ~0u;
  struct Points {
    Corners<unsigned> pieces[POINTS];
    Corners<A> counts[POINTS], sums[POINTS];  // sums over channels of grad_output times a corner's row
  };
  struct alignas(2 * sizeof(A)) Corner { A count; unsigned next; };
  struct alignas(8) List { unsigned piece, corner; };  // of its token; that it begins with
  struct Lists {
    Corner corners[CORNERS];
    List places[CORNERS];           // a list is at a place that follows from its piece, or at the next free one
    unsigned short taken[CORNERS];  // places that hold lists
    unsigned number;                // of lists
  };

  alignas(16) A grads[THREADS / At::LANES][CHANNELS];  // of each pair
  union {
    Points of;
    Lists lists;  // later
  };

  __device__ __forceinline__ void clear_lists() {
#pragma unroll
    for (int i = 0; i < CORNERS / THREADS; ++i) lists.places[i * THREADS + threadIdx.x] = {NONE, NONE};
    if (threadIdx.x == 0) lists.number = 0;
  }

  // Puts a corner before the others of its token.
  __device__ __forceinline__ void link(unsigned corner, unsigned piece, A count) {
    unsigned place = piece * 2654435769u / (~0u / CORNERS + 1), found;
#pragma unroll 1
    while ((found = atomicCAS(&lists.places[place].piece, NONE, piece)) != NONE && found != piece)
      place = (place + 1) % CORNERS;
    // With atomicAdd, nvcc would count new lists over the warp, which takes more instructions.
    if (found == NONE) lists.taken[atomicInc(&lists.number, CORNERS)] = place;
    lists.corners[corner] = {count, atomicExch(&lists.places[place].corner, corner)};
  }

  // Sums lists and adds the sums to rows that begin at `rows`, so many elements a piece; `channels` are left of a row.
  __device__ __forceinline__ void add_lists(A* rows, int channels, int elements) const {
    // Four neighbours are added at once, or each for itself by eight threads side by side: whole sectors of memory.
    constexpr bool AT_ONCE = VECTOR_REDUCTION && WIDTH == 8;
    constexpr int LANES = AT_ONCE || At::LANES > 8 ? At::LANES : 8, PIECE = AT_ONCE ? 4 : 1;
    constexpr int PIECES = CHANNELS / LANES / PIECE;
    const unsigned first = threadIdx.x / LANES;
    int channel[PIECES];
    A* to[PIECES];
#pragma unroll
    for (int j = 0; j < PIECES; ++j) {
      channel[j] = channel_of<LANES, PIECE>(j, threadIdx.x % LANES, first % PIECES);
      to[j] = rows + channel[j];
      keep(to[j]);
    }
#pragma unroll 1
    for (unsigned n = first, number = lists.number; n < number; n += THREADS / LANES) {
      const List list = lists.places[lists.taken[n]];
      unsigned corner = list.corner;
      A sum[PIECES][PIECE] = {};
#pragma unroll 1
      do {
        const Corner now = lists.corners[corner];
        const unsigned its_grads = corner / (4 * At::STEP) * CHANNELS;
#pragma unroll
        for (int j = 0; j < PIECES; ++j) {
          const auto& grad = reinterpret_cast<const Row<A, PIECE>&>(grads[0][its_grads | channel[j]]);
#pragma unroll
          for (int i = 0; i < PIECE; ++i) sum[j][i] += now.count * grad.channel[i];
        }
        corner = now.next;
      } while (corner != NONE);
#pragma unroll
      for (int j = 0; j < PIECES; ++j)
        if (channel[j] < channels) add_to_memory(to[j] + uint64_t(list.piece) * elements, sum[j]);
    }
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
  grad_output += int64_t(at.row(problem)) * problem.c;
  grad_offsets += int64_t(at.row(problem)) * points;
  grad_logits += int64_t(at.row(problem)) * points;
  // Points of a pair lie in a row, swapped so that the pairs of a warp read from different banks.
  const int block_pair = threadIdx.x / At::LANES, row = block_pair * At::STEP ^ at.pair;
  // 16 bytes of the value are a piece of a thread's channels.
  constexpr int PIECE = 16 / sizeof(V) < WIDTH ? 16 / sizeof(V) : WIDTH, PIECES = WIDTH / PIECE;
  using Piece = Row<V, PIECE>;
  const unsigned pieces_of_token = problem.h * problem.c / PIECE;

  A by_reference[4] = {};
  for (int begin = 0; begin < problem.c; begin += CHANNELS) {  // later rounds add to the gradients of the points
    A grad[PIECES][PIECE] = {};
    const Piece* pieces[PIECES];  // this thread's, of the first token
    A nothing = 0;  // NaN where grad_output is not finite, which shows even by a count of 0
#pragma unroll
    for (int j = 0; j < PIECES; ++j) {
      const int in_round = channel_of<At::LANES, PIECE>(j, at.lane, at.pair % PIECES), channel = begin + in_round;
      const bool active = channel < problem.c;
      if (active && at.asks) {
        widen(*reinterpret_cast<const Piece*>(grad_output + channel), grad[j]);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) nothing += A(0) * grad[j][i];
      }
#pragma unroll
      for (int i = 0; i < PIECE; ++i) tile.grads[block_pair][in_round + i] = grad[j][i];
      pieces[j] = reinterpret_cast<const Piece*>(value + at.slice + (active ? channel : begin));
    }
    nothing = sum_of_pair<At::LANES>(nothing);
    A by_weight = 0;  // sum of weight * its gradient

    for (int first = 0; first < points; first += At::STEP) {
      Point<A> items[At::ITEMS];
      if (works) {
#pragma unroll
        for (int item = 0; item < At::ITEMS; ++item) {
          const int slot = item * At::LANES + at.lane, point = min(first + slot, points - 1);
          items[item] = locate(problem, pair, point);
#pragma unroll
          for (int k = 0; k < 4; ++k)
            tile.of.pieces[row ^ slot].corner[k] = items[item].tokens.corner[k] * pieces_of_token;
          tile.of.counts[row ^ slot] = items[item].counts;
        }
        __syncwarp();
        const int end = min(At::STEP, points - first);
#pragma unroll 1
        for (int slot = 0; slot < end; ++slot) {  // by the whole warp, as its threads exchange numbers
          const Corners<unsigned> first_pieces = tile.of.pieces[row ^ slot];
          Piece sampled[4][PIECES];
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int j = 0; j < PIECES; ++j) sampled[k][j] = pieces[j][first_pieces.corner[k]];
          A d[4] = {};
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int j = 0; j < PIECES; ++j) {
              A wide[PIECE];
              widen(sampled[k][j], wide);
#pragma unroll
              for (int i = 0; i < PIECE; ++i) d[k] += grad[j][i] * wide[i];
            }
          const A sum = sum_of_lanes<At::LANES>(d, at.lane);
          if (at.lane < 4) tile.of.sums[row ^ slot].corner[at.lane] = sum;
        }
        __syncwarp();
      }
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item) {
        const int slot = item * At::LANES + at.lane, point = first + slot;
        if (at.asks && point < points) {
          const Point<A>& p = items[item];
          Corners<A> d = tile.of.sums[row ^ slot];
#pragma unroll
          for (int k = 0; k < 4; ++k) d.corner[k] = p.inside >> k & 1 ? d.corner[k] : A(0) * d.corner[k];
          const A upper = d.corner[1] - d.corner[0], lower = d.corner[3] - d.corner[2];
          A logit = p.weight * ((1 - p.dy) * (d.corner[0] + p.dx * upper) + p.dy * (d.corner[2] + p.dx * lower));
          const A x = p.weight * ((1 - p.dy) * upper + p.dy * lower);  // by a move of one cell
          const A y = p.weight * ((1 - p.dx) * (d.corner[2] - d.corner[0]) + p.dx * (d.corner[3] - d.corner[1]));
          by_weight += logit;
          grad_logits[point] = logit + (begin > 0 ? grad_logits[point] : 0);
          const Level& level = level_of(problem, point);
          const Offset<A> scale = pair.scale(level), by_centre = {x * level.W, y * level.H};
          grad_offsets[point].x = x * scale.x + (begin > 0 ? grad_offsets[point].x : 0);
          grad_offsets[point].y = y * scale.y + (begin > 0 ? grad_offsets[point].y : 0);
          by_reference[0] += by_centre.x;
          by_reference[1] += by_centre.y;
          if (problem.boxes) {
            by_reference[2] += by_centre.x * __ldg(&pair.offsets[point].x);
            by_reference[3] += by_centre.y * __ldg(&pair.offsets[point].y);
          }
        }
      }

      Corners<unsigned> first_pieces[At::ITEMS];
      Corners<A> counts[At::ITEMS];
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item) {
        const int point = row ^ (item * At::LANES + at.lane);
        first_pieces[item] = tile.of.pieces[point];
        counts[item] = tile.of.counts[point];
      }
      __syncthreads();  // what the lists write over has been read
      tile.clear_lists();
      __syncthreads();
#pragma unroll
      for (int item = 0; item < At::ITEMS; ++item) {
        const int slot = item * At::LANES + at.lane;
        unsigned corner = 4 * (row ^ slot);
        keep(corner);
        if (at.asks && first + slot < points)
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const A count = counts[item].corner[k];
            if (count != nothing) tile.link(corner + k, first_pieces[item].corner[k], count);
          }
      }
      __syncthreads();  // the lists are whole
      tile.add_lists(grad_value + at.slice + begin, problem.c - begin, PIECE);
      __syncthreads();  // and have been used
    }
    by_weight = sum_of_pair<At::LANES>(by_weight);
#pragma unroll 1
    for (int point = at.lane; point < points && at.asks; point += At::LANES)
      grad_logits[point] -= pair.weight(point) * by_weight;
  }
  if (grad_reference == nullptr) return;
  const A half = A(0.5) * reciprocal(A(problem.P));
  const A sum = sum_of_lanes<At::LANES>(by_reference, at.lane) * (at.lane < 2 ? 1 : half);
  if (at.asks && at.lane < (problem.boxes ? 4 : 2)) add_one(grad_reference + at.reference(problem) + at.lane, sum);
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

// A thread has 32 bytes of a pair's sums, whose type is A.
template <typename V, typename A>
void launch_backward(CudaProblem problem, const V* grad_output, const Inputs<V, A>& in,
                     const Gradients<A>& gradients, cudaStream_t stream) {
  const auto start = [&](auto kernel, int width) {
    const dim3 blocks = cut(problem, width);  // a warp owns as many pairs as a thread has channels
    LAUNCH(kernel, blocks, stream, problem, grad_output, in.value, in.reference,
           reinterpret_cast<const Offset<A>*>(in.offsets), in.logits, gradients.value, gradients.reference,
           reinterpret_cast<Offset<A>*>(gradients.offsets), gradients.logits);
  };
  constexpr int WIDTH = 32 / sizeof(A);
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
