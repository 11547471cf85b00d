// The CPU kernel: plain pointers and no PyTorch, compiled once for each instruction set (-DCAPABILITY names it).
//
// `Points::locate` computes as many points of a query and head at once as a register holds: the tokens of each point's
// four corners, and by how much each corner counts. Then the rows of those tokens, c channels side by side, are read in
// vectors. A corner outside of its level counts zero and reads the level's first token, so there are no branches; if a
// location is NaN, all corners count NaN. No vector is wider than a register, because compilers take wider ones apart
// number by number; vectors of doubles, which serve to test gradients, may be.
#include <algorithm>
#include <utility>
#include <vector>

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

// A vector of 1, 4, 8 or 16 lanes, added up to four.
template <typename T, typename V>
inline Vector<T, 4> fold(V v) {
  constexpr int LANES = sizeof(V) / sizeof(T);
  Vector<T, 4> sum = {};
  if constexpr (LANES == 1) sum[0] = v[0];
  if constexpr (LANES >= 4) sum = __builtin_shufflevector(v, v, 0, 1, 2, 3);
  if constexpr (LANES >= 8) sum += __builtin_shufflevector(v, v, 4, 5, 6, 7);
  if constexpr (LANES == 16) sum += __builtin_shufflevector(v, v, 8, 9, 10, 11);
  if constexpr (LANES == 16) sum += __builtin_shufflevector(v, v, 12, 13, 14, 15);
  return sum;
}

// The even elements of 2 * LANES numbers in a row, and the odd ones.
template <typename A, typename Real, int... I>
inline void split_pairs(const A* pairs, Real& even, Real& odd, std::integer_sequence<int, I...>) {
  const Real a = load<sizeof...(I)>(pairs), b = load<sizeof...(I)>(pairs + sizeof...(I));
  even = __builtin_shufflevector(a, b, 2 * I...);
  odd = __builtin_shufflevector(a, b, 2 * I + 1 ...);
}

// The reference point or box of a query. An offset of 1 is `cells` cells, plus the fraction `width` of the level's W
// and `height` of its H.
template <typename A>
struct Reference {
  A x, y, cells, width, height;

  Reference(const Problem& problem, const A* references, int64_t image, int64_t query) {
    const A* reference = references + (problem.boxes ? 4 * (image * problem.Q + query) : 2 * query);
    x = reference[0];
    y = reference[1];
    cells = problem.boxes ? 0 : 1;
    width = problem.boxes ? reference[2] * (A(0.5) / problem.P) : 0;
    height = problem.boxes ? reference[3] * (A(0.5) / problem.P) : 0;
  }
};

// Points [first, first + size) of a query and head, computed together. Lanes beyond `size` are idle. Corners are top
// left, top right, bottom left, bottom right.
template <typename A, int LANES>
struct Points {
  using Real = Vector<A, LANES>;
  using Whole = decltype(Real() < Real());
  int first, size;
  Whole W = {}, H = {}, start = {};  // of each point's level
  A some_offsets[2 * LANES] = {}, some_weights[LANES] = {};  // of a group that is not full
  Whole token[4];
  Real count[4];          // weight * bilinear coefficient; 0 outside of the level
  Real inside[4];         // 1, or 0 outside of the level
  Real dx, dy;            // from the top left corner
  Real cells_x, cells_y;  // how many cells an offset of 1 is

  Points(const Problem& problem, int first, int end) : first(first), size(std::min(end - first, LANES)) {
    for (int p = 0; p < size; ++p) {
      const Level& level = problem.levels[(first + p) / problem.P];
      W[p] = level.W;
      H[p] = level.H;
      start[p] = level.start;
    }
  }

  // offsets, weights: of all points of the query and head.
  template <bool DERIVATIVES>
  void locate(const Reference<A>& reference, const A* offsets, const A* weights) {
    offsets += 2 * first;
    weights += first;
    if (size < LANES) {  // do not read beyond the end
      offsets = std::copy_n(offsets, 2 * size, some_offsets) - 2 * size;
      weights = std::copy_n(weights, size, some_weights) - size;
    }
    const Real zero = {};
    Real x, y;
    split_pairs(offsets, x, y, std::make_integer_sequence<int, LANES>());
    const Real w = load<LANES>(weights);
    const Real W_real = __builtin_convertvector(W, Real), H_real = __builtin_convertvector(H, Real);
    const Real one_x = W_real * reference.width + reference.cells;
    const Real one_y = H_real * reference.height + reference.cells;
    x = x * one_x + (W_real * reference.x - A(0.5));
    y = y * one_y + (H_real * reference.y - A(0.5));
    x = x < A(-2) ? zero - 2 : x > W_real ? W_real : x;  // far outside is outside, and NaN stays
    y = y < A(-2) ? zero - 2 : y > H_real ? H_real : y;
    Whole column = __builtin_convertvector(x, Whole), line = __builtin_convertvector(y, Whole);
    column += __builtin_convertvector(column, Real) > x;  // a true comparison is -1: truncation becomes floor
    line += __builtin_convertvector(line, Real) > y;
    const Real right = x - __builtin_convertvector(column, Real);
    const Real bottom = y - __builtin_convertvector(line, Real);
    const Whole has_left = (column >= 0) & (column < W), has_right = (column >= -1) & (column + 1 < W);
    const Whole has_top = (line >= 0) & (line < H), has_bottom = (line >= -1) & (line + 1 < H);
    const Whole top_left = line * W + column;
    const Real outside = (right - right) + (bottom - bottom);  // 0, or NaN where the location is
    const auto set_corner = [&](int k, Whole is_inside, Whole index, Real coefficient) {
      token[k] = start + (is_inside & index);
      count[k] = w * (is_inside ? coefficient : outside);
      if constexpr (DERIVATIVES) inside[k] = is_inside ? zero + 1 : zero;
    };
    set_corner(0, has_top & has_left, top_left, (1 - bottom) * (1 - right));
    set_corner(1, has_top & has_right, top_left + 1, (1 - bottom) * right);
    set_corner(2, has_bottom & has_left, top_left + W, bottom * (1 - right));
    set_corner(3, has_bottom & has_right, top_left + W + 1, bottom * right);
    if constexpr (DERIVATIVES) {
      dx = right;
      dy = bottom;
      cells_x = one_x;
      cells_y = one_y;
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
  constexpr int TOGETHER = std::min(16, WIDEST<A>);
  std::vector<Points<A, TOGETHER>> groups;
  for (int first = 0; first < all; first += TOGETHER) groups.emplace_back(problem, first, int(all));
  for (int64_t query = first; query < last; ++query) {
    const int64_t row = (image * problem.Q + query) * problem.h + head;
    const Reference<A> reference(problem, references, image, query);
    for (auto& points : groups) points.template locate<false>(reference, offsets + 2 * row * all, weights + row * all);
    for_channels<A>(problem.c, [&]<int LANES, int VECTORS>(int64_t channel) {
      constexpr int SUMS = std::clamp(8 / VECTORS, 1, 4);  // they need not wait for each other, and fit into registers
      Vector<A, LANES> sum[SUMS][VECTORS] = {};
      for (const auto& points : groups)
        for (int p = 0; p < points.size; ++p)
          for (int k = 0; k < 4; ++k)
            for (int j = 0; j < VECTORS; ++j) {
              const int64_t element = points.token[k][p] * stride + channel + j * LANES;
              sum[k % SUMS][j] += load<LANES>(value + element) * points.count[k][p];
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
  const int64_t c = problem.c, stride = problem.h * c, all = problem.L * problem.P;
  const Level& range = problem.levels[level];
  value += image * problem.N * stride + head * c;
  grad_value += image * problem.N * stride + head * c;
  for (int64_t token = range.start, end = token + int64_t(range.W) * range.H; token < end; ++token)
    for (int64_t channel = 0; channel < c; ++channel) grad_value[token * stride + channel] = 0;

  const int begin = int(level) * problem.P, end = begin + problem.P;
  for (int first = begin; first < end; first += 4) {
    Points<A, 4> points(problem, first, end);
    for (int64_t query = 0; query < problem.Q; ++query) {
      const int64_t row = (image * problem.Q + query) * problem.h + head;
      const Reference<A> reference(problem, references, image, query);
      points.template locate<true>(reference, offsets + 2 * row * all, weights + row * all);
      Vector<A, 4> dot[4] = {};  // grad_output . value of each corner
      for_channels<A>(c, [&]<int LANES, int VECTORS>(int64_t channel) {
        Vector<A, LANES> grad[VECTORS];
        for (int j = 0; j < VECTORS; ++j) grad[j] = load<LANES>(grad_output + row * c + channel + j * LANES);
        for (int p = 0; p < points.size; ++p) {
          Vector<A, LANES> product[4] = {};
          for (int k = 0; k < 4; ++k)
            for (int j = 0; j < VECTORS; ++j) {
              const int64_t element = points.token[k][p] * stride + channel + j * LANES;
              product[k] += load<LANES>(value + element) * grad[j];
              store<LANES>(grad_value + element, load<LANES>(grad_value + element) + grad[j] * points.count[k][p]);
            }
          dot[p] += lane_sums<A>(fold<A>(product[0]), fold<A>(product[1]), fold<A>(product[2]), fold<A>(product[3]));
        }
      });
      A grad_x = 0, grad_y = 0, grad_width = 0, grad_height = 0;  // of the reference
      for (int p = 0; p < points.size; ++p) {
        const int64_t at = row * all + first + p;
        const A w = weights[at], dx = points.dx[p], dy = points.dy[p];
        A d[4];
        for (int k = 0; k < 4; ++k) d[k] = dot[p][k] * points.inside[k][p];
        grad_weights[at] = (1 - dy) * ((1 - dx) * d[0] + dx * d[1]) + dy * ((1 - dx) * d[2] + dx * d[3]);
        const A x = w * ((1 - dy) * (d[1] - d[0]) + dy * (d[3] - d[2]));  // by a move of one cell
        const A y = w * ((1 - dx) * (d[2] - d[0]) + dx * (d[3] - d[1]));
        grad_offsets[2 * at] = x * points.cells_x[p];
        grad_offsets[2 * at + 1] = y * points.cells_y[p];
        grad_x += x * range.W;
        grad_y += y * range.H;
        grad_width += x * range.W * offsets[2 * at];
        grad_height += y * range.H * offsets[2 * at + 1];
      }
      if (grad_reference) {
        A* const grad = grad_reference + query * (problem.boxes ? 4 : 2);
        grad[0] += grad_x;
        grad[1] += grad_y;
        if (problem.boxes) {
          grad[2] += grad_width * (A(0.5) / problem.P);
          grad[3] += grad_height * (A(0.5) / problem.P);
        }
      }
    }
  }
}

}  // namespace

extern const CpuKernels CAPABILITY;
const CpuKernels CAPABILITY = {{forward<float, float>, backward<float, float>},
                               {forward<double, double>, backward<double, double>},
                               {forward<bfloat16, float>, backward<bfloat16, float>}};

}  // namespace deform_attn
