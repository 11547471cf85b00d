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
  auto value = static_cast<const V*>(data[0]), grad_output = static_cast<const V*>(data[4]);
  auto locations = static_cast<const A*>(data[1]), weights = static_cast<const A*>(data[2]);
  launch_forward(problem, value, locations, weights, static_cast<V*>(data[3]), nullptr);
  launch_backward(problem, grad_output, value, locations, weights, static_cast<A*>(data[5]), static_cast<A*>(data[6]),
                  static_cast<A*>(data[7]), nullptr);
}

// sizes: B N h c Q L P, then H and W of each level; data: value, locations, weights, output, grad_output, grad_value,
// grad_locations, grad_weights.
extern "C" void forward_and_backward(const char* type, const int* sizes, void** data) {
  CudaProblem problem = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6],
                         1.0f / sizes[6]};
  for (int level = 0, start = 0; level < problem.L; ++level) {
    problem.height[level] = sizes[7 + 2 * level];
    problem.width[level] = sizes[8 + 2 * level];
    problem.start[level] = start;
    start += problem.height[level] * problem.width[level];
  }
  const std::string name = type;
  if (name == "torch.float32") both<float, float>(problem, data);
  if (name == "torch.float64") both<double, double>(problem, data);
  if (name == "torch.float16") both<__half, float>(problem, data);
  if (name == "torch.bfloat16") both<__nv_bfloat16, float>(problem, data);
}

}  // namespace deform_attn
