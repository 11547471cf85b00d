// Runs the kernels of cuda_kernel.cu on a CPU, for the tests where there is no GPU. The 32 threads of a warp are
// coroutines that take turns at each __syncwarp and __shfl_xor_sync, in ascending order in one warp and in descending
// order in the next, so that a missing __syncwarp shows; warps and blocks run one after the other.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

struct Index { unsigned x; };
static Index threadIdx, blockIdx;
static ucontext_t scheduler, threads[32];
static int current;  // lane
static bool finished[32];
static std::function<void()> kernel_call;

using std::floor;
using std::max;
using std::min;

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

void run_thread() {
  kernel_call();
  finished[current] = true;
  __syncwarp();
}

void launch(int blocks, int threads_of_block, std::function<void()> call) {
  static std::vector<char> stacks(32 << 16);
  kernel_call = call;
  for (unsigned warp = 0; warp < unsigned(blocks) * threads_of_block / 32; ++warp) {
    blockIdx.x = warp / (threads_of_block / 32);
    for (int lane = 0; lane < 32; ++lane) {
      finished[lane] = false;
      getcontext(&threads[lane]);
      threads[lane].uc_stack.ss_sp = stacks.data() + (lane << 16);
      threads[lane].uc_stack.ss_size = 1 << 16;
      makecontext(&threads[lane], run_thread, 0);
    }
    while (!finished[0]) {
      for (int turn = 0; turn < 32; ++turn) {
        current = warp % 2 ? 31 - turn : turn;
        threadIdx.x = warp % (threads_of_block / 32) * 32 + current;
        swapcontext(&scheduler, &threads[current]);
      }
      if (std::count(finished, finished + 32, finished[0]) != 32) std::abort();  // some threads wait for ever
    }
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
  CudaProblem problem = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6]};
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
