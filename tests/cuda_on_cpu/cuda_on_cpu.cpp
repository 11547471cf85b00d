// The kernels of cuda_kernel.cu on a CPU, for the tests.
#include <string>

#include "cuda_on_cpu.h"

using std::floor;
template <typename T> T max(T a, T b) { return a > b || b != b ? a : b; }  // of NaN and a number, the number
template <typename T> T min(T a, T b) { return a < b || b != b ? a : b; }

template <typename T> void keep(T&) {}
template <typename T> T __ldg(const T* from) { return *from; }
void __stcg(int4* to, int4 bytes) { *to = bytes; }
unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
template <typename A> A power_of_2(A x) { return std::exp2(x); }
template <typename A> A log_2(A x) { return std::log2(x); }
template <typename A> A reciprocal(A x) { return 1 / x; }

float __uint_as_float(unsigned bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

void add_four(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
  numbers_added += 4;
}
template <typename A> void add_one(A* to, A a) { *to += a, ++numbers_added; }

static bool all_ended;
#define LAUNCH(kernel, blocks, stream, ...) all_ended &= launch(blocks, THREADS, [&] { kernel(__VA_ARGS__); })
#include "cuda_kernel.cu"

namespace deform_attn {

template <typename V, typename A>
void both(const CudaProblem& problem, void** data) {
  const auto as = [&](int i) { return static_cast<A*>(data[i]); };
  const Inputs<V, A> inputs = {static_cast<const V*>(data[0]), as(1), as(2), as(3)};
  launch_forward<V, A>(problem, inputs, static_cast<V*>(data[4]), nullptr);
  launch_backward<V, A>(problem, static_cast<const V*>(data[5]), inputs, {as(6), as(7), as(8), as(9)}, nullptr);
}

// sizes: B N h c Q L P, 1 for boxes, then H and W of each level; data: value, reference, offsets, logits, output,
// grad_output, grad_value, grad_reference, grad_offsets, grad_logits. Returns how many numbers were added to global
// memory, or -1 where threads wait for ever.
extern "C" long long forward_and_backward(const char* type, const int* sizes, void** data) {
  const CudaProblem problem = problem_of(sizes, sizes + 8);
  const std::string name = type;
  numbers_added = 0, all_ended = true;
  if (name == "torch.float32") both<float, float>(problem, data);
  if (name == "torch.float64") both<double, double>(problem, data);
  if (name == "torch.float16") both<__half, float>(problem, data);
  if (name == "torch.bfloat16") both<__nv_bfloat16, float>(problem, data);
  return all_ended ? numbers_added : -1;
}

}  // namespace deform_attn
