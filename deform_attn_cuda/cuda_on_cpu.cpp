// Runs the kernels of cuda_kernel.cu on a CPU, for the tests where there is no GPU. The 32 threads of a warp are
// coroutines that take turns at each __syncwarp and __shfl_xor_sync, in ascending order in one warp and in descending
// order in the next, so that a missing __syncwarp shows; warps and blocks run one after the other.
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

static dim3 threadIdx, blockIdx;
static ucontext_t scheduler, threads[32];
static int current;  // lane
static bool finished[32];
static std::function<void()> kernel_call;

using std::floor;
template <typename T> T max(T a, T b) { return a > b || b != b ? a : b; }  // of NaN and a number, the number
template <typename T> T min(T a, T b) { return a < b || b != b ? a : b; }

void keep(int64_t&) {}
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

void __syncwarp() { swapcontext(&threads[current], &scheduler); }

template <typename T>
T __shfl_xor_sync(unsigned, T mine, int distance) {
  static T offered[2][32];
  static bool turn[32];
  T* const row = offered[turn[current] = !turn[current]];  // the last row may still be read
  row[current] = mine;
  __syncwarp();
  return row[current ^ distance];
}

template <typename T>
void atomicAdd(T* to, T term) { *to += term; }

void add_four(float* to, float a, float b, float c, float d) {
  if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
  to[0] += a, to[1] += b, to[2] += c, to[3] += d;
}

void run_thread() {
  kernel_call();
  finished[current] = true;
  __syncwarp();
}

void run_warp(bool ascending) {
  static std::vector<char> stacks(32 << 16);
  const unsigned first_thread = threadIdx.x;
  for (int lane = 0; lane < 32; ++lane) {
    finished[lane] = false;
    getcontext(&threads[lane]);
    threads[lane].uc_stack.ss_sp = stacks.data() + (lane << 16);
    threads[lane].uc_stack.ss_size = 1 << 16;
    makecontext(&threads[lane], run_thread, 0);
  }
  while (!finished[0]) {
    for (int turn = 0; turn < 32; ++turn) {
      current = ascending ? turn : 31 - turn;
      threadIdx.x = first_thread + current;
      swapcontext(&scheduler, &threads[current]);
    }
    if (std::count(finished, finished + 32, finished[0]) != 32) std::abort();  // some threads wait for ever
  }
}

void launch(dim3 blocks, unsigned threads_of_block, std::function<void()> call) {
  kernel_call = call;
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x)
        for (unsigned first_thread = 0; first_thread < threads_of_block; first_thread += 32) {
          threadIdx.x = first_thread;
          run_warp(first_thread / 32 % 2 == 0);
        }
}

#define __shared__ static
#define __launch_bounds__(...)
#define LAUNCH(kernel, blocks, stream, ...) launch(blocks, THREADS, [&] { kernel(__VA_ARGS__); })
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
// grad_output, grad_value, grad_reference, grad_offsets, grad_logits.
extern "C" void forward_and_backward(const char* type, const int* sizes, void** data) {
  const CudaProblem problem = problem_of(sizes, sizes + 8);
  const std::string name = type;
  if (name == "torch.float32") both<float, float>(problem, data);
  if (name == "torch.float64") both<double, double>(problem, data);
  if (name == "torch.float16") both<__half, float>(problem, data);
  if (name == "torch.bfloat16") both<__nv_bfloat16, float>(problem, data);
}

}  // namespace deform_attn
