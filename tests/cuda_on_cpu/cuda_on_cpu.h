// Runs CUDA kernels on a CPU, a block at a time, for the tests where there is no GPU.
//
// Each thread of a block is a coroutine. It runs until it has to wait for others, at a barrier, in a shuffle, or at an
// atomic operation that returns something; then one of those that can go on does, drawn by lot. So what reads before
// another thread wrote, for want of a barrier, finds what was there before: shared memory holds, in each new block,
// what is not a number. Blocks run one after the other.
#pragma once
#include <cuda_runtime_api.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

constexpr unsigned POISON = 0x7ff8dbad;  // not a number as a float and, twice, as a double
constexpr int SHARED_BYTES = 48 << 10, STACK_BYTES = 64 << 10, MAX_THREADS = 1024;

static dim3 threadIdx, blockIdx;
alignas(16) static unsigned shared_memory[SHARED_BYTES / sizeof(unsigned)];
static long long numbers_added;  // to global memory, by all threads

struct Barrier {
  int threads;
  std::vector<int> waiting;
};
static Barrier of_block, of_warp[MAX_THREADS / 32];
static std::vector<int> ready;  // threads that can go on
static int finished;            // how many threads of the block came to its end
static jmp_buf places[MAX_THREADS], scheduler;
static std::minstd_rand lot;

[[noreturn]] inline void run_one() {
  if (ready.empty()) _longjmp(scheduler, 1);
  std::swap(ready[lot() % ready.size()], ready.back());
  threadIdx.x = ready.back();
  ready.pop_back();
  _longjmp(places[threadIdx.x], 1);
}

inline void run_others() {  // until this thread is drawn again
  if (!_setjmp(places[threadIdx.x])) run_one();
}

inline void wait(Barrier& barrier) {
  barrier.waiting.push_back(threadIdx.x);
  if (int(barrier.waiting.size()) == barrier.threads) {
    ready.insert(ready.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }
  run_others();
}

inline void __syncthreads() { wait(of_block); }
inline void __syncwarp() { wait(of_warp[threadIdx.x / 32]); }

template <typename T>
T __shfl_xor_sync(unsigned, T mine, int distance) {
  static T offered[2][MAX_THREADS];
  static bool turn[MAX_THREADS];
  const unsigned me = threadIdx.x;
  T* const row = offered[turn[me] = !turn[me]];  // the last row may still be read
  row[me] = mine;
  __syncwarp();
  return row[me ^ distance];
}

inline bool __any_sync(unsigned mask, int x) {
  for (int distance = 1; distance < 32; distance *= 2) x |= __shfl_xor_sync(mask, x, distance);
  return x;
}

template <typename T>
T exchanged(T* at, T with) {
  const T before = *at;
  *at = with;
  ready.push_back(threadIdx.x);
  run_others();
  return before;
}
template <typename T> T atomicExch(T* at, T with) { return exchanged(at, with); }
inline unsigned atomicInc(unsigned* at, unsigned last) { return exchanged(at, *at < last ? *at + 1 : 0); }
template <typename T> T atomicCAS(T* at, T expected, T with) { return exchanged(at, *at == expected ? with : *at); }

static std::function<void()> kernel_call;

inline void run_thread() {  // once for each block
  if (!_setjmp(places[threadIdx.x])) _longjmp(scheduler, 1);
  for (;;) {
    kernel_call();
    ++finished;
    run_others();
  }
}

// Returns false where threads wait for others that never come.
inline bool launch(dim3 blocks, int threads, std::function<void()> call) {
  static std::vector<char> stacks(MAX_THREADS * STACK_BYTES);
  kernel_call = call;
  of_block = {threads, {}};
  for (int thread = 0; thread < threads; ++thread) {
    of_warp[thread / 32] = {32, {}};
    threadIdx.x = thread;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stacks.data() + thread * STACK_BYTES;
    start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&start, run_thread, 0);
    if (!_setjmp(scheduler)) setcontext(&start);
  }
  for (blockIdx.z = 0; blockIdx.z < blocks.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
        std::fill(std::begin(shared_memory), std::end(shared_memory), POISON);
        finished = 0;
        for (int thread = 0; thread < threads; ++thread) ready.push_back(thread);
        if (!_setjmp(scheduler)) run_one();
        if (finished < threads) return false;
      }
  return true;
}

#define __launch_bounds__(...)
#define SHARED(Type, name)                            \
  static_assert(sizeof(Type) <= sizeof shared_memory); \
  Type& name = *reinterpret_cast<Type*>(shared_memory)
