// Runs CUDA kernels on the CPU: each thread of a block is a coroutine, blocks follow one another.
//
// A thread runs until it ends, waits at a barrier, or exchanges a number with its warp. The order is chosen to bring
// out missing barriers: a warp runs on alone until every thread of it waits, and odd blocks take the warps in reverse.
// Shared memory begins as NaN in each block. It finds wrong results, missing barriers, reads of what was never written
// and vectors at addresses that are no multiple of their size; not races within a warp, and nothing about speed.
#pragma once
#define EMULATED
#undef _FORTIFY_SOURCE  // it takes jumps from stack to stack for mistakes
#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
using std::erfc;

struct uint3 { unsigned x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct uint2 { unsigned x, y; };
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
static inline float __uint_as_float(unsigned u) { float v; memcpy(&v, &u, 4); return v; }
static uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
struct Thread { jmp_buf place; std::vector<char> stack; uint3 index; bool ended, waits; float shown[6]; };
static std::vector<Thread> threads;
static jmp_buf scheduler, misaligned;
static size_t current, alive;
static void (*kernel)(void**);
static void** arguments;
static std::vector<char> dynamic;
static std::vector<void*> fresh_arrays;

// Jumps change stacks without a system call, which swapcontext makes each time: a context only begins a coroutine.
[[gnu::noinline]] static void pause() {
  if (!_setjmp(threads[current].place)) _longjmp(scheduler, 1);
}
static void body() {
  for (;;) {  // the coroutine of a thread serves all blocks
    kernel(arguments);
    threads[current].ended = true;
    --alive;
    pause();
  }
}
[[gnu::noinline]] static void go_on() {
  Thread& t = threads[current];
  if (_setjmp(scheduler)) return;
  if (!t.stack.empty()) _longjmp(t.place, 1);
  t.stack.resize(64 << 10);
  static ucontext_t beginning;
  getcontext(&beginning);
  beginning.uc_stack.ss_sp = t.stack.data();
  beginning.uc_stack.ss_size = t.stack.size();
  beginning.uc_link = nullptr;
  makecontext(&beginning, body, 0);
  setcontext(&beginning);
}
// Fills a __shared__ array with NaN when the first thread of a block comes to it.
static void fresh(void* array, size_t bytes) {
  for (void* known : fresh_arrays)
    if (known == array) return;
  fresh_arrays.push_back(array);
  memset(array, 0xFF, bytes);
}
static void run_block() {
  const size_t n = blockDim.x * blockDim.y * blockDim.z, warps = (n + 31) / 32;
  fresh_arrays.clear();
  memset(dynamic.data(), 0xFF, dynamic.size());
  alive = n;
  for (size_t i = 0; i < n; ++i) {
    Thread& t = threads[i];
    t.ended = t.waits = false;
    t.index = {(unsigned)(i % blockDim.x), (unsigned)(i / blockDim.x % blockDim.y), (unsigned)(i / blockDim.x / blockDim.y)};
  }
  const bool reverse = (blockIdx.x + blockIdx.y) % 2;
  while (alive) {
    for (size_t w = 0; w < warps; ++w) {
      const size_t first = 32 * (reverse ? warps - 1 - w : w);
      for (bool moved = true; moved;) {
        moved = false;
        for (size_t i = first; i < n && i < first + 32; ++i)
          if (!threads[i].ended && !threads[i].waits) {
            moved = true;
            current = i;
            threadIdx = threads[i].index;
            go_on();
          }
      }
    }
    for (size_t i = 0; i < n; ++i) threads[i].waits = false;
  }
}
// 0, or 1 where a thread read or wrote a vector at an address that a GPU would not take.
static int run(const unsigned* grid, const unsigned* block, size_t shared, void** a, void (*f)(void**)) {
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block[0], block[1], block[2]};
  kernel = f;
  arguments = a;
  const size_t n = blockDim.x * blockDim.y * blockDim.z;
  if (threads.size() < n) threads.resize(n);
  dynamic.resize(shared + 64);
  if (_setjmp(misaligned)) {
    threads.clear();  // they are in the middle of the kernel
    return 1;
  }
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
  return 0;
}
template <class Vector, class T>
static Vector aligned(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(*Vector())) _longjmp(misaligned, 1);
  return reinterpret_cast<Vector>(p);
}
static float* dynamic_shared() { return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(dynamic.data()) + 15) & ~uintptr_t(15)); }
}  // namespace emulator

static inline void __syncthreads() {
  emulator::threads[emulator::current].waits = true;
  emulator::pause();
}
static inline float __shfl_xor_sync(unsigned, float v, int mask) {
  const size_t me = emulator::current;
  emulator::threads[me].shown[0] = v;
  emulator::pause();  // until the whole warp has shown its number
  v = emulator::threads[me ^ (size_t)mask].shown[0];
  emulator::pause();  // until the whole warp has read
  return v;
}
#define __expf std::exp  // glibc has another function of this name
static inline float emulated_rsqrtf(float x) { return 1.f / std::sqrt(x); }
#define rsqrtf emulated_rsqrtf  // and since 2.42 one of this name too
static inline float to_tf32(float v) {  // 10 bits of mantissa, to the nearest, ties away from zero
  return __uint_as_float((__float_as_uint(v) + 0x1000u) & 0xFFFFE000u);
}
// The product of tensor cores that kernels.cu describes: c (16 x 8) += a (16 x 8) b (8 x 8), spread over a warp.
static inline void multiply_add(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const size_t me = emulator::current, warp = me & ~size_t(31), g = me % 32 / 4, t = me % 4;
  for (int i = 0; i < 4; ++i) emulator::threads[me].shown[i] = a[i];
  for (int i = 0; i < 2; ++i) emulator::threads[me].shown[4 + i] = b[i];
  emulator::pause();
  for (int e = 0; e < 4; ++e)
    for (size_t k = 0; k < 8; ++k) {
      const float x = emulator::threads[warp + 4 * g + k % 4].shown[e / 2 + 2 * (k / 4)];
      const float y = emulator::threads[warp + 4 * (2 * t + e % 2) + k % 4].shown[4 + k / 4];
      c[e] += to_tf32(x) == x && to_tf32(y) == y ? x * y : NAN;  // factors must have been rounded
    }
  emulator::pause();
}
#define reinterpret_cast emulator::aligned  // the kernels' casts are all to vectors
