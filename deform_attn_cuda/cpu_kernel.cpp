// The CPU kernel, plain pointers and no PyTorch, compiled once for each instruction set (-DCAPABILITY names it).
//
// Of one query and head, `locate` computes as many points at once as a register holds: the tokens of their four corners
// and what each corner counts. Then the rows of those tokens, c channels in a row of memory, are read in vectors. A
// corner outside its level counts nothing and reads the level's first token, so there are no branches; a location that
// is not a number makes every corner count NaN. No vector is wider than a register, but for doubles, which serve tests
// of gradients: compilers take wider ones apart, number by number.
#include <algorithm>
#include <utility>

#include "cpu_kernel.h"

namespace deform_attn {
namespace {

#if defined(__AVX512F__)
constexpr int REGISTER = 64;  // bytes
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
template <typename A>
constexpr int WIDEST = std::max<int>(4, REGISTER / sizeof(A));

template <typename T, int LANES>
struct VectorOf {
  static_assert(sizeof(T) * LANES <= REGISTER || sizeof(T) == 8, "wider than a register, so slow");
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

// The two halves of a vector, added.
template <typename V, int... I>
inline auto halved(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, I...) + __builtin_shufflevector(v, v, int(sizeof...(I)) + I...);
}

// A vector of any number of lanes, halved until it has four of them.
template <typename T, typename V>
inline Vector<T, 4> fold(V v) {
  constexpr int LANES = sizeof(V) / sizeof(T);
  if constexpr (LANES == 1) return Vector<T, 4>{v[0], 0, 0, 0};
  else if constexpr (LANES == 4) return v;
  else return fold<T>(halved(v, std::make_integer_sequence<int, LANES / 2>()));
}

template <typename A> struct IntegerOf { using type = int32_t; };
template <> struct IntegerOf<double> { using type = int64_t; };

// The even elements of 2 * LANES numbers in a row, and the odd ones.
template <typename A, typename Real, int... I>
inline void split_pairs(const A* pairs, Real& even, Real& odd, std::integer_sequence<int, I...>) {
  const Real a = load<sizeof...(I)>(pairs), b = load<sizeof...(I)>(pairs + sizeof...(I));
  even = __builtin_shufflevector(a, b, 2 * I...);
  odd = __builtin_shufflevector(a, b, 2 * I + 1 ...);
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

// A group of points, the last of which may be idle.
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
    for (int p = 0; p < count && count < GROUP; ++p) {  // do not read beyond the end
      offset[2 * p] = offsets[2 * p];
      offset[2 * p + 1] = offsets[2 * p + 1];
      weight[p] = weights[p];
    }
    constexpr int LANES = std::min<int>(GROUP, WIDEST<A>);
    for (int first = 0; first < count; first += LANES)
      locate_together<DERIVATIVES, LANES>(reference, (count < GROUP ? offset : offsets) + 2 * first,
                                          (count < GROUP ? weight : weights) + first, first);
  }

  // Of the points [first, first + LANES) of the group.
  template <bool DERIVATIVES, int LANES>
  void locate_together(const Reference<A>& reference, const A* offsets, const A* weights, int first) {
    using Real = Vector<A, LANES>;
    using Whole = Vector<Integer, LANES>;
    Real x, y;
    split_pairs(offsets, x, y, std::make_integer_sequence<int, LANES>());
    const Real w = load<LANES>(weights), zero = {};
    const Whole W = load<LANES>(width + first), H = load<LANES>(height + first), origin = load<LANES>(start + first);
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
    store<LANES>(token[0] + first, origin + (has_top & has_left & token_top));
    store<LANES>(token[1] + first, origin + (has_top & has_right & (token_top + 1)));
    store<LANES>(token[2] + first, origin + (has_bottom & has_left & token_bottom));
    store<LANES>(token[3] + first, origin + (has_bottom & has_right & (token_bottom + 1)));
    store<LANES>(corner[0] + first, w * share_top * share_left);
    store<LANES>(corner[1] + first, w * share_top * share_right);
    store<LANES>(corner[2] + first, w * share_bottom * share_left);
    store<LANES>(corner[3] + first, w * share_bottom * share_right);
    if constexpr (DERIVATIVES) {
      store<LANES>(left + first, share_left);
      store<LANES>(right + first, share_right);
      store<LANES>(top + first, share_top);
      store<LANES>(bottom + first, share_bottom);
      store<LANES>(left_x + first, has_left ? zero - 1 : zero);
      store<LANES>(right_x + first, has_right ? zero + 1 : zero);
      store<LANES>(top_y + first, has_top ? zero - 1 : zero);
      store<LANES>(bottom_y + first, has_bottom ? zero + 1 : zero);
      store<LANES>(scale_x + first, cells_x);
      store<LANES>(scale_y + first, cells_y);
    }
  }
};

// Calls visit.operator()<LANES, VECTORS>(channel) for blocks of LANES * VECTORS channels that make up c.
template <typename A, typename Visit>
inline void for_channels(int64_t c, Visit visit) {
  int64_t channel = 0;
  constexpr auto lanes = [](int channels) { return std::min<int>(channels, WIDEST<A>); };
  for (; channel + 32 <= c; channel += 32) visit.template operator()<lanes(32), 32 / lanes(32)>(channel);
  for (; channel + 16 <= c; channel += 16) visit.template operator()<lanes(16), 16 / lanes(16)>(channel);
  for (; channel + 8 <= c; channel += 8) visit.template operator()<lanes(8), 8 / lanes(8)>(channel);
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
    for_channels<A>(problem.c, [&]<int LANES, int VECTORS>(int64_t channel) {
      constexpr int SUMS = std::clamp(8 / VECTORS, 1, 4);  // they need not wait for each other, and fit into registers
      Vector<A, LANES> sum[SUMS][VECTORS] = {};
      for (int64_t group = 0; group < all; group += GROUP) {
        const int count = int(all - group < GROUP ? all - group : GROUP);
        if (all > GROUP) {
          points.set_levels(problem, group, count);
          const int64_t at = row * all + group;
          points.template locate<false>(reference, offsets + 2 * at, weights + at, count);
        }
        for (int p = 0; p < count; ++p)
          for (int k = 0; k < 4; ++k)
            for (int j = 0; j < VECTORS; ++j) {
              const int64_t element = points.token[k][p] * stride + channel + j * LANES;
              sum[k % SUMS][j] += load<LANES>(value + element) * points.corner[k][p];
            }
      }
      for (int j = 0; j < VECTORS; ++j) {
        for (int half = SUMS / 2; half > 0; half /= 2)
          for (int k = 0; k < half; ++k) sum[k][j] += sum[k + half][j];
        store<LANES>(output + row * problem.c + channel + j * LANES, sum[0][j]);
      }
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
      for_channels<A>(c, [&]<int LANES, int VECTORS>(int64_t channel) {
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
