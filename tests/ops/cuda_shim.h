// CUDA as C++: the parts that the kernels use, and a block whose threads are fibers with real barriers and shuffles.
//
// It precedes the kernel source. A barrier hands over to the next thread of the block, so that code with a missing
// barrier reads memory that another thread has not written yet: unwritten shared memory is NaN. The order of threads and
// blocks can be chosen, because one order may hide a fault. One launch at a time: state is global.
#pragma once

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define DEFORM3D_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __syncthreads() emulated::synchronize_block(__LINE__)
#define __syncwarp() emulated::synchronize_warp(emulated::SYNCWARP)

struct Dim3 {
  unsigned x, y, z;
};
static Dim3 blockIdx, blockDim, gridDim, threadIdx;

namespace emulated {

constexpr int WARP = 32;
constexpr size_t STACK = DEFORM3D_STACK_BYTES;
constexpr uint64_t UNTOUCHED = 0x5ca1ab1e0ddba11;
enum Wait { NOTHING, BLOCK, GROUP, SYNCWARP, SHUFFLE, FINISHED };
constexpr int BARRIERS = 16;

#if defined(__x86_64__)
// swapcontext makes a system call for the signal mask; this saves only the registers that the ABI has a callee preserve.
using Context = void*;
extern "C" void deform3d_switch(Context* from, Context to) __attribute__((visibility("hidden")));
asm(R"(
  .text
  .hidden deform3d_switch
  .globl deform3d_switch
deform3d_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static inline void switch_context(Context& from, Context& to) { deform3d_switch(&from, to); }
static inline void prepare(Context& context, char* stack, void (*body)()) {
  void** top = reinterpret_cast<void**>(stack + STACK);
  top -= 2;  // the ABI: 8 bytes past a multiple of 16 where a function starts
  *top = reinterpret_cast<void*>(body);
  top -= 6;
  memset(top, 0, 6 * sizeof(void*));
  context = top;
}
#else
using Context = ucontext_t;
static inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
static inline void prepare(Context& context, char* stack, void (*body)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = STACK;
  context.uc_link = nullptr;
  makecontext(&context, body, 0);
}
#endif

struct Fiber {
  Context context;
  Dim3 index;
  Wait waits;
  unsigned shuffles;
  int barrier;  // the barrier that it waits at, if it waits for a group
};
// A numbered barrier for a part of the block.
struct GroupBarrier {
  int threads, arrived, line;
};
struct Warp {
  int threads, arrived;
  Wait kind;
  // Two sets: the last thread to arrive at a shuffle may reach the next before the others have read.
  uint64_t values[2][WARP];
};

static Fiber *fibers, *current;
static Warp* warps;
static Context scheduler;
static int block_threads, block_arrived, block_line;
static GroupBarrier group_barriers[BARRIERS];
// Shared memory of the running block: heap memory of the requested size, so that a sanitizer guards it.
static unsigned char* shared_memory;
static char message[512];
static void (*kernel)(const int64_t*);
static const int64_t* arguments;

__attribute__((format(printf, 1, 2))) static inline void fail(const char* format, ...) {
  if (message[0]) return;
  int used = snprintf(message, sizeof message, "block %u, thread (%u, %u): ", blockIdx.x, threadIdx.x, threadIdx.y);
  va_list rest;
  va_start(rest, format);
  vsnprintf(message + used, sizeof message - used, format, rest);
  va_end(rest);
}

// Not inlined: the caller must not keep threadIdx across the switch.
__attribute__((noinline)) static inline void leave(Wait why) {
  current->waits = why;
  switch_context(current->context, scheduler);
}

static inline void give_up() {
  for (;;) leave(FINISHED);
}

__attribute__((noinline)) static inline void synchronize_block(int line) {
  if (block_arrived && line != block_line) {
    fail("__syncthreads() of line %d reached while others wait in line %d", line, block_line);
    give_up();
  }
  block_line = line;
  if (++block_arrived < block_threads) return leave(BLOCK);
  block_arrived = 0;
  for (int i = 0; i < block_threads; i++) fibers[i].waits = fibers[i].waits == BLOCK ? NOTHING : fibers[i].waits;
}

// bar.sync with a number and a count of threads: whole warps, the same ones every time.
__attribute__((noinline)) static inline void synchronize_group(int number, int threads, int line) {
  if (number < 1 || number >= BARRIERS || threads < 1 || threads % WARP || threads > block_threads) {
    fail("barrier %d of %d threads in line %d, which no GPU has", number, threads, line);
    give_up();
  }
  GroupBarrier& barrier = group_barriers[number];
  if (barrier.arrived && (line != barrier.line || threads != barrier.threads)) {
    fail("barrier %d of %d threads in line %d reached while others wait for %d threads in line %d", number, threads, line,
         barrier.threads, barrier.line);
    give_up();
  }
  barrier.threads = threads;
  barrier.line = line;
  current->barrier = number;
  if (++barrier.arrived < threads) return leave(GROUP);
  barrier.arrived = 0;
  for (int i = 0; i < block_threads; i++)
    if (fibers[i].waits == GROUP && fibers[i].barrier == number) fibers[i].waits = NOTHING;
}

__attribute__((noinline)) static inline void synchronize_warp(Wait kind) {
  const int first = int(current - fibers) / WARP * WARP;
  Warp& warp = warps[first / WARP];
  if (warp.arrived && warp.kind != kind) {
    fail("__syncwarp() and a shuffle reached by threads of one warp at once");
    give_up();
  }
  warp.kind = kind;
  if (++warp.arrived < warp.threads) return leave(kind);
  warp.arrived = 0;
  for (int i = first; i < first + warp.threads; i++) fibers[i].waits = fibers[i].waits == kind ? NOTHING : fibers[i].waits;
}

static inline uint64_t exchange(unsigned mask, uint64_t value, int lane_mask) {
  if (mask != 0xffffffffu || lane_mask < 0 || lane_mask >= WARP) {
    fail("shuffle with mask %x and lane mask %d", mask, lane_mask);
    give_up();
  }
  const int lane = int(current - fibers) % WARP, other = lane ^ lane_mask;
  Warp& warp = warps[(current - fibers) / WARP];
  uint64_t* values = warp.values[current->shuffles++ % 2];
  values[lane] = value;
  synchronize_warp(SHUFFLE);
  return other < warp.threads ? values[other] : ~uint64_t(0);  // undefined in CUDA: NaN here
}

static inline void run_thread() {
  kernel(arguments);
  give_up();
}

static uint64_t random_state;
static inline unsigned random_below(unsigned count) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return unsigned((random_state >> 11) % count);
}

// 0 forward, 1 reverse, else shuffled with this seed.
static inline void arrange(unsigned* places, unsigned count, int order) {
  for (unsigned i = 0; i < count; i++) places[i] = order == 1 ? count - 1 - i : i;
  for (unsigned i = count; order > 1 && i > 1; i--) {
    unsigned other = random_below(i), kept = places[i - 1];
    places[i - 1] = places[other];
    places[other] = kept;
  }
}

static inline bool run_warp(unsigned number, int order) {
  unsigned lanes[WARP];
  arrange(lanes, warps[number].threads, order);
  bool ever = false;
  for (bool moved = true; moved && !message[0]; ever |= moved) {
    moved = false;
    for (int i = 0; i < warps[number].threads && !message[0]; i++) {
      current = fibers + number * WARP + lanes[i];
      if (current->waits != NOTHING) continue;
      moved = true;
      threadIdx = current->index;
      switch_context(scheduler, current->context);
    }
  }
  return ever;
}

static inline void run_block(char* stacks, unsigned* places, size_t shared_bytes, int order) {
  // malloc aligns to 16 bytes; CUDA promises no more for dynamic shared memory declared like this.
  shared_memory = static_cast<unsigned char*>(malloc(shared_bytes));
  memset(shared_memory, 0xff, shared_bytes);
  memset(fibers, 0, sizeof(Fiber) * block_threads);
  for (int i = 0; i < block_threads; i++) {
    fibers[i].index = {i % blockDim.x, i / blockDim.x, 0};
    prepare(fibers[i].context, stacks + i * STACK, run_thread);
    Warp& warp = warps[i / WARP];
    warp.threads = block_threads - i / WARP * WARP < WARP ? block_threads - i / WARP * WARP : WARP;
    warp.arrived = 0;
  }
  block_arrived = 0;
  memset(group_barriers, 0, sizeof group_barriers);
  // A warp runs until its threads wait for the block, which leaves the others as far behind as possible.
  const unsigned all = (block_threads + WARP - 1) / WARP;
  for (bool moved = true; moved && !message[0];) {
    moved = false;
    arrange(places, all, order);
    for (unsigned i = 0; i < all; i++) moved |= run_warp(places[i], order);
  }
  int waiting[FINISHED + 1] = {};
  for (int i = 0; i < block_threads; i++) waiting[fibers[i].waits]++;
  if (waiting[FINISHED] < block_threads)
    fail("deadlock: %d threads wait at __syncthreads() in line %d, %d at barriers of groups, %d at __syncwarp(), "
         "%d in a shuffle, %d returned",
         waiting[BLOCK], block_line, waiting[GROUP], waiting[SYNCWARP], waiting[SHUFFLE], waiting[FINISHED]);
  free(shared_memory);
}

static inline const char* launch(void (*entry)(const int64_t*), const int64_t* values, unsigned grid, unsigned block_x,
                          unsigned block_y, size_t shared_bytes, int order, char* stacks) {
  kernel = entry;
  arguments = values;
  message[0] = 0;
  random_state = 88172645463325252u + unsigned(order);
  gridDim = {grid, 1, 1};
  blockDim = {block_x, block_y, 1};
  block_threads = int(block_x * block_y);
  for (int i = 0; i < block_threads; i++) *reinterpret_cast<uint64_t*>(stacks + i * STACK) = UNTOUCHED;
  fibers = new Fiber[block_threads];
  warps = new Warp[(block_threads + WARP - 1) / WARP];
  unsigned* places = new unsigned[(block_threads + WARP - 1) / WARP];
  unsigned* blocks = new unsigned[grid];
  arrange(blocks, grid, order);
  for (unsigned i = 0; i < grid && !message[0]; i++) {
    blockIdx = {blocks[i], 0, 0};
    run_block(stacks, places, shared_bytes, order);
  }
  delete[] blocks;
  delete[] places;
  delete[] warps;
  delete[] fibers;
  for (int i = 0; i < block_threads; i++)
    if (*reinterpret_cast<uint64_t*>(stacks + i * STACK) != UNTOUCHED) fail("a thread's stack overflowed");
  return message[0] ? message : nullptr;
}

// Every parameter is one 64-bit integer or pointer, as the launcher passes them.
template <class T>
T argument(int64_t value) {
  static_assert(sizeof(T) == 8, "a kernel parameter of the launcher has 64 bits");
  if constexpr (std::is_pointer<T>::value)
    return reinterpret_cast<T>(value);
  else
    return value;
}
template <class... A, size_t... I>
void call(void (*entry)(A...), const int64_t* values, std::index_sequence<I...>) {
  entry(argument<A>(values[I])...);
}
template <class... A>
constexpr int count(void (*)(A...)) {
  return sizeof...(A);
}
template <class... A>
void call(void (*entry)(A...), const int64_t* values) {
  call(entry, values, std::index_sequence_for<A...>());
}

template <class T>
T add(T* address, T value) {
  T before = *address;
  *address = before + value;
  return before;
}

}  // namespace emulated

// Makes a kernel of the source callable: the emulator appends this for the entry that it launches.
#define DEFORM3D_ENTRY(name)                                                                                         \
  static void deform3d_call(const int64_t* values) { emulated::call(&name, values); }                                \
  extern "C" int deform3d_arguments() { return emulated::count(&name); }                                             \
  extern "C" const char* deform3d_launch(const int64_t* values, unsigned grid, unsigned block_x, unsigned block_y,   \
                                         size_t shared_bytes, int order, char* stacks) {                             \
    return emulated::launch(deform3d_call, values, grid, block_x, block_y, shared_bytes, order, stacks);             \
  }

static inline unsigned char* deform3d_shared_memory() { return emulated::shared_memory; }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = emulated::exchange(mask, bits, lane_mask);
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline int atomicAdd(int* address, int value) { return emulated::add(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return emulated::add(address, value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return emulated::add(address, value);
}
inline float atomicAdd(float* address, float value) { return emulated::add(address, value); }
inline double atomicAdd(double* address, double value) { return emulated::add(address, value); }
