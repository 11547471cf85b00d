// The CPU kernel, plain pointers and no PyTorch, compiled once for each instruction set (-DCAPABILITY names it).
//
// Of one query and head, `locate` computes all points at once: the tokens of their four corners and what each corner
// counts. Then the rows of those tokens, c channels in a row of memory, are read in vectors. A corner outside its
// level counts nothing and reads the level's first token, so there are no branches; a location that is not a number
// makes every corner count NaN.
#include "cpu_kernel.h"

namespace deform_attn {
namespace {

template <typename T, int LANES>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * LANES)));
};
template <typename T, int LANES>
using Vector = typename VectorOf<T, LANES>::type;

template <int LANES, typename T>
inline auto load(const T* from) {
  Vector<T, LANES> loaded;
  __builtin_memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

template <int LANES>
inline auto load(const bfloat16* from) {
  Vector<uint16_t, LANES> half;
  __builtin_memcpy(&half, from, sizeof half);
  return (Vector<float, LANES>)(__builtin_convertvector(half, Vector<uint32_t, LANES>) << 16);
}

template <int LANES, typename T, typename Vector>
inline void store(T* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

template <int LANES>
inline void store(bfloat16* to, Vector<float, LANES> vector) {  // rounds to nearest, ties to even; keeps NaN
  auto bits = (Vector<uint32_t, LANES>)vector;
  auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  auto half = __builtin_convertvector(vector == vector ? rounded : (bits >> 16) | 0x40, Vector<uint16_t, LANES>);
  __builtin_memcpy(to, &half, sizeof half);
}

// Sums over the lanes of four vectors.
template <typename T>
inline Vector<T, 4> lane_sums(Vector<T, 4> a, Vector<T, 4> b, Vector<T, 4> c, Vector<T, 4> d) {
  auto ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  auto cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

template <typename T>
inline Vector<T, 4> fold(Vector<T, 4> v) { return v; }
template <typename T>
inline Vector<T, 4> fold(Vector<T, 8> v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
template <typename T>
inline Vector<T, 4> fold(Vector<T, 16> v) {
  return fold<T>(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
template <typename T>
inline Vector<T, 4> fold(Vector<T, 1> v) { return Vector<T, 4>{v[0], 0, 0, 0}; }

template <typename A> struct IntegerOf { using type = int32_t; };
template <> struct IntegerOf<double> { using type = int64_t; };

// The even elements of 2 * LANES numbers in a row, and the odd ones.
template <typename A>
inline void split_pairs(const A* pairs, Vector<A, 4>& even, Vector<A, 4>& odd) {
  const auto a = load<4>(pairs), b = load<4>(pairs + 4);
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
}
template <typename A>
inline void split_pairs(const A* pairs, Vector<A, 16>& even, Vector<A, 16>& odd) {
  const auto a = load<16>(pairs), b = load<16>(pairs + 16);
  even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

// Where a query looks from: its centre, how many cells an offset of 1 is, and how much of a level's W and H.
template <typename A>
struct Reference {
  A x, y, cells, width, height;

  Reference(const Problem& problem, const A* reference, int64_t image, int64_t query) {
    reference += problem.boxes ? 4 * (image * problem.Q + query) : 2 * query;
    x = reference[0];
    y = reference[1];
    cells = problem.boxes ? 0 : 1;
    width = problem.boxes ? reference[2] * (A(0.5) / problem.P) : 0;
    height = problem.boxes ? reference[3] * (A(0.5) / problem.P) : 0;
  }
};

// A group of points computed together, the last of which may be idle.
template <typename A, int GROUP>
struct Points {
  using Integer = typename IntegerOf<A>::type;
  // In.
  alignas(64) Integer width[GROUP], height[GROUP], start[GROUP];
  alignas(64) A offset[2 * GROUP], weight[GROUP];
  // Out. Corners are top left, top right, bottom left, bottom right.
  alignas(64) Integer token[4][GROUP];
  alignas(64) A corner[4][GROUP];                                         // weight * share of line * share of column
  alignas(64) A left[GROUP], right[GROUP], top[GROUP], bottom[GROUP];     // shares of columns and lines, 0 outside
  alignas(64) A left_x[GROUP], right_x[GROUP], top_y[GROUP], bottom_y[GROUP];  // their derivatives by a move of a cell
  alignas(64) A scale_x[GROUP], scale_y[GROUP];                           // how many cells an offset of 1 is

  void set_levels(const Problem& problem, int64_t first, int count) {
    for (int p = 0; p < count; ++p) {
      width[p] = problem.width[first + p];
      height[p] = problem.height[first + p];
      start[p] = problem.start[first + p];
    }
  }

  template <bool DERIVATIVES>
  void locate(const Reference<A>& reference, const A* offsets, const A* weights, int count) {
    using Real = Vector<A, GROUP>;
    using Whole = Vector<Integer, GROUP>;
    for (int p = 0; p < count && count < GROUP; ++p) {  // do not read beyond the end
      offset[2 * p] = offsets[2 * p];
      offset[2 * p + 1] = offsets[2 * p + 1];
      weight[p] = weights[p];
    }
    Real x, y;
    split_pairs(count < GROUP ? offset : offsets, x, y);
    const Real w = load<GROUP>(count < GROUP ? weight : weights), zero = {};
    const Whole W = load<GROUP>(width), H = load<GROUP>(height), origin = load<GROUP>(start);
    const Real W_real = __builtin_convertvector(W, Real), H_real = __builtin_convertvector(H, Real);
    const Real cells_x = W_real * reference.width + reference.cells;
    const Real cells_y = H_real * reference.height + reference.cells;
    x = x * cells_x + (W_real * reference.x - A(0.5));
    y = y * cells_y + (H_real * reference.y - A(0.5));
    x = x < A(-2) ? zero - 2 : x > W_real ? W_real : x;  // far outside is outside, and NaN stays
    y = y < A(-2) ? zero - 2 : y > H_real ? H_real : y;
    Whole column = __builtin_convertvector(x, Whole), line = __builtin_convertvector(y, Whole);
    column += Whole(__builtin_convertvector(column, Real) > x);  // a true comparison is -1: truncation becomes floor
    line += Whole(__builtin_convertvector(line, Real) > y);
    const Real dx = x - __builtin_convertvector(column, Real), dy = y - __builtin_convertvector(line, Real);
    const Real nan_x = dx - dx, nan_y = dy - dy;  // 0, or NaN where the location is
    const Whole has_left = (column >= 0) & (column < W), has_right = (column >= -1) & (column + 1 < W);
    const Whole has_top = (line >= 0) & (line < H), has_bottom = (line >= -1) & (line + 1 < H);
    const Real share_left = (has_left ? 1 - dx : zero) + nan_x, share_right = (has_right ? dx : zero) + nan_x;
    const Real share_top = (has_top ? 1 - dy : zero) + nan_y, share_bottom = (has_bottom ? dy : zero) + nan_y;
    const Whole token_top = line * W + column, token_bottom = token_top + W;
    store<GROUP>(token[0], origin + (has_top & has_left & token_top));
    store<GROUP>(token[1], origin + (has_top & has_right & (token_top + 1)));
    store<GROUP>(token[2], origin + (has_bottom & has_left & token_bottom));
    store<GROUP>(token[3], origin + (has_bottom & has_right & (token_bottom + 1)));
    store<GROUP>(corner[0], w * share_top * share_left);
    store<GROUP>(corner[1], w * share_top * share_right);
    store<GROUP>(corner[2], w * share_bottom * share_left);
    store<GROUP>(corner[3], w * share_bottom * share_right);
    if constexpr (DERIVATIVES) {
      store<GROUP>(left, share_left);
      store<GROUP>(right, share_right);
      store<GROUP>(top, share_top);
      store<GROUP>(bottom, share_bottom);
      store<GROUP>(left_x, has_left ? zero - 1 : zero);
      store<GROUP>(right_x, has_right ? zero + 1 : zero);
      store<GROUP>(top_y, has_top ? zero - 1 : zero);
      store<GROUP>(bottom_y, has_bottom ? zero + 1 : zero);
      store<GROUP>(scale_x, cells_x);
      store<GROUP>(scale_y, cells_y);
    }
  }
};

// Calls visit.operator()<LANES, VECTORS>(channel) for blocks of LANES * VECTORS channels that make up c.
template <typename Visit>
inline void for_channels(int64_t c, Visit visit) {
  int64_t channel = 0;
  for (; channel + 32 <= c; channel += 32) visit.template operator()<16, 2>(channel);
  for (; channel + 16 <= c; channel += 16) visit.template operator()<16, 1>(channel);
  for (; channel + 8 <= c; channel += 8) visit.template operator()<8, 1>(channel);
  for (; channel + 4 <= c; channel += 4) visit.template operator()<4, 1>(channel);
  for (; channel < c; ++channel) visit.template operator()<1, 1>(channel);
}

template <typename V, typename A>
void forward(const Problem& problem, const V* value, const A* references, const A* offsets, const A* weights, V* output,
             int64_t image, int64_t head, int64_t first, int64_t last) {
  const int64_t stride = problem.h * problem.c, all = problem.L * problem.P;
  value += image * problem.N * stride + head * problem.c;
  constexpr int GROUP = 16;
  Points<A, GROUP> points = {};
  const int first_count = int(all < GROUP ? all : GROUP);
  points.set_levels(problem, 0, first_count);
  for (int64_t query = first; query < last; ++query) {
    const int64_t row = (image * problem.Q + query) * problem.h + head;
    const Reference<A> reference(problem, references, image, query);
    points.template locate<false>(reference, offsets + 2 * row * all, weights + row * all, first_count);
    for_channels(problem.c, [&]<int LANES, int VECTORS>(int64_t channel) {
      Vector<A, LANES> sum[4][VECTORS] = {};
      for (int64_t group = 0; group < all; group += GROUP) {
        const int count = int(all - group < GROUP ? all - group : GROUP);
        if (all > GROUP) {
          points.set_levels(problem, group, count);
          const int64_t at = row * all + group;
          points.template locate<false>(reference, offsets + 2 * at, weights + at, count);
        }
        for (int p = 0; p < count; ++p)
          for (int k = 0; k < 4; ++k)
            for (int j = 0; j < VECTORS; ++j)
              sum[k][j] += load<LANES>(value + points.token[k][p] * stride + channel + j * LANES) * points.corner[k][p];
      }
      for (int j = 0; j < VECTORS; ++j)
        store<LANES>(output + row * problem.c + channel + j * LANES, (sum[0][j] + sum[1][j]) + (sum[2][j] + sum[3][j]));
    });
  }
}

template <typename V, typename A>
void backward(const Problem& problem, const V* grad_output, const V* value, const A* references, const A* offsets,
              const A* weights, A* grad_value, A* grad_reference, A* grad_offsets, A* grad_weights, int64_t image,
              int64_t head, int64_t level) {
  const int64_t c = problem.c, P = problem.P, stride = problem.h * c;
  const int64_t first_point = level * P, width = problem.width[first_point], height = problem.height[first_point];
  value += image * problem.N * stride + head * c;
  grad_value += image * problem.N * stride + head * c;
  for (int64_t token = problem.start[first_point], end = token + width * height; token < end; ++token)
    for (int64_t channel = 0; channel < c; ++channel) grad_value[token * stride + channel] = 0;

  constexpr int GROUP = 4;
  Points<A, GROUP> points = {};
  points.set_levels(problem, first_point, int(P < GROUP ? P : GROUP));  // the same level, so the same for all groups
  for (int64_t query = 0; query < problem.Q; ++query) {
    const int64_t row = (image * problem.Q + query) * problem.h + head;
    const Reference<A> reference(problem, references, image, query);
    A grad_x = 0, grad_y = 0, grad_width = 0, grad_height = 0;  // of the reference
    for (int64_t group = 0; group < P; group += GROUP) {
      const int64_t at = (row * problem.L + level) * P + group;
      const int count = int(P - group < GROUP ? P - group : GROUP);
      points.template locate<true>(reference, offsets + 2 * at, weights + at, count);
      Vector<A, 4> dot[GROUP] = {};  // grad_output . value of each corner
      for_channels(c, [&]<int LANES, int VECTORS>(int64_t channel) {
        Vector<A, LANES> grad[VECTORS];
        for (int j = 0; j < VECTORS; ++j) grad[j] = load<LANES>(grad_output + row * c + channel + j * LANES);
        for (int p = 0; p < count; ++p) {
          Vector<A, LANES> product[4] = {};
          for (int k = 0; k < 4; ++k)
            for (int j = 0; j < VECTORS; ++j) {
              const int64_t element = points.token[k][p] * stride + channel + j * LANES;
              product[k] += load<LANES>(value + element) * grad[j];
              store<LANES>(grad_value + element, load<LANES>(grad_value + element) + grad[j] * points.corner[k][p]);
            }
          dot[p] += lane_sums<A>(fold<A>(product[0]), fold<A>(product[1]), fold<A>(product[2]), fold<A>(product[3]));
        }
      });
      for (int p = 0; p < count; ++p) {
        const A left = points.left[p], right = points.right[p], top = points.top[p], bottom = points.bottom[p];
        const Vector<A, 4> d = dot[p];
        grad_weights[at + p] = top * (left * d[0] + right * d[1]) + bottom * (left * d[2] + right * d[3]);
        const A x = weights[at + p] * (top * (points.left_x[p] * d[0] + points.right_x[p] * d[1]) +
                                       bottom * (points.left_x[p] * d[2] + points.right_x[p] * d[3]));
        const A y = weights[at + p] * (left * (points.top_y[p] * d[0] + points.bottom_y[p] * d[2]) +
                                       right * (points.top_y[p] * d[1] + points.bottom_y[p] * d[3]));
        grad_offsets[2 * (at + p)] = x * points.scale_x[p];
        grad_offsets[2 * (at + p) + 1] = y * points.scale_y[p];
        grad_x += x * width;
        grad_y += y * height;
        grad_width += x * width * offsets[2 * (at + p)];
        grad_height += y * height * offsets[2 * (at + p) + 1];
      }
    }
    if (grad_reference) {
      *grad_reference++ = grad_x;
      *grad_reference++ = grad_y;
    }
    if (grad_reference && problem.boxes) {
      *grad_reference++ = grad_width * (A(0.5) / P);
      *grad_reference++ = grad_height * (A(0.5) / P);
    }
  }
}

}  // namespace

extern const CpuKernels CAPABILITY;
const CpuKernels CAPABILITY = {{forward<float, float>, backward<float, float>},
                               {forward<double, double>, backward<double, double>},
                               {forward<bfloat16, float>, backward<bfloat16, float>}};

}  // namespace deform_attn
