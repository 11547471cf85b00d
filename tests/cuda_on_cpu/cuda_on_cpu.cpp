// Runs the kernels of cuda_kernel.cu on a CPU, a warp at a time, for the tests where there is no GPU.
//
// Each thread of a warp is a coroutine. At a shuffle it stores its number and switches to the next one; when its turn
// comes again, all have stored theirs. Warps share nothing but memory that they add to, and run one after the other.
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

constexpr int LANES_OF_WARP = 32, STACK_BYTES = 64 << 10;

static dim3 threadIdx, blockIdx;
static std::function<void()> kernel_call;
static jmp_buf lanes[LANES_OF_WARP], end_of_warp;
static int lane, ended, rounds[LANES_OF_WARP];  // how many shuffles each has come to
static double offered[2][LANES_OF_WARP];        // in this shuffle and the last one, which may still be read

static void run_others() {  // until it is this lane's turn again
  if (_setjmp(lanes[lane])) return;
  if (ended == LANES_OF_WARP) _longjmp(end_of_warp, 1);
  const int next = (lane + 1) % LANES_OF_WARP;
  threadIdx.x += next - lane;
  lane = next;
  _longjmp(lanes[lane], 1);
}

template <typename T>
T exchange(T mine, int with) {
  const int round = ++rounds[lane];
  offered[round % 2][lane] = mine;
  run_others();
  if (rounds[with] != round && rounds[with] != round + 1) std::abort();  // it is at another shuffle, or has ended
  return T(offered[round % 2][with]);
}

template <typename T> T __shfl_xor_sync(unsigned, T mine, int distance) { return exchange(mine, lane ^ distance); }
template <typename T> T __shfl_sync(unsigned, T mine, int source, int width) {
  return exchange(mine, lane / width * width + source);
}

static void run_warps() {
  for (ended = LANES_OF_WARP;; ++ended) {
    run_others();
    kernel_call();
  }
}

static void start_lanes() {
  static std::vector<char> stacks(LANES_OF_WARP * STACK_BYTES);
  for (lane = 0; lane < LANES_OF_WARP; ++lane) {
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.data() + lane * STACK_BYTES;
    start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&start, run_warps, 0);
    if (!_setjmp(end_of_warp)) setcontext(&start);
  }
}

static void run_warp() {
  ended = 0;
  std::fill(rounds, rounds + LANES_OF_WARP, 0);
  if (!_setjmp(end_of_warp)) _longjmp(lanes[lane = 0], 1);
}

static void launch(dim3 blocks, unsigned threads, std::function<void()> call) {
  kernel_call = call;
  start_lanes();
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x)
        for (unsigned first = 0; first < threads; first += LANES_OF_WARP) {
          threadIdx.x = first;
          run_warp();
        }
}

template <typename A> void atomicAdd(A* to, A x) { *to += x; }
void atomicAdd(float4* to, float4 x) {
  if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
  to->x += x.x, to->y += x.y, to->z += x.z, to->w += x.w;
}

using std::exp, std::floor, std::fmax, std::fmin, std::min;
#define __launch_bounds__(...)
#define ADD_FOUR  // as on sm_90
#define LAUNCH(kernel, blocks, stream, ...) launch(blocks, THREADS, [&] { kernel(__VA_ARGS__); })
#include "cuda_kernel.cu"

namespace deform_attn {

template <typename V, typename A>
void run(const Problem& problem, void** data) {
  const auto as = [&](int i) { return static_cast<A*>(data[i]); };
  const Inputs<V, A> inputs = {static_cast<const V*>(data[0]), as(1), as(2), as(3)};
  V* const output = static_cast<V*>(data[4]);
  if (as(5)) launch_backward<V, A>(problem, output, inputs, {as(5), as(6), as(7), as(8)}, nullptr);
  else launch_forward<V, A>(problem, inputs, output, nullptr);
}

// sizes: B N h c Q L P, 1 for boxes, then W, H and first token of each level. data: value, reference, offsets, logits,
// output; or for the backward grad_output, and the gradients of the inputs, which are null otherwise.
extern "C" void run(const char* type, const int* sizes, void** data) {
  const int *s = sizes, *levels = sizes + 8;
  Problem problem = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7] == 1};
  for (int i = 0; i < problem.L; ++i) problem.levels[i] = {levels[3 * i], levels[3 * i + 1], levels[3 * i + 2]};
  const std::string name = type;
  if (name == "torch.float32") run<float, float>(problem, data);
  if (name == "torch.float64") run<double, double>(problem, data);
  if (name == "torch.float16") run<__half, float>(problem, data);
  if (name == "torch.bfloat16") run<__nv_bfloat16, float>(problem, data);
}

}  // namespace deform_attn
