// Runs a kernel's blocks one after the other, and a block's threads as fibers in turns: each runs
// until its next barrier or warp collective. Whatever CUDA leaves undefined there ends the launch.
#include "scheduler.h"

#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {

const char* running_stack = nullptr;
unsigned running_thread = 0;
Intervals intervals;
SharedMemory shared_memory;

namespace {

enum class State { ready, waiting, ended };
enum class Order { forward, reverse, random };

constexpr const char* kCalls[] = {"__syncthreads",    "__syncwarp",      "__shfl_sync",
                                  "__shfl_down_sync", "__shfl_xor_sync", "__ballot_sync",
                                  "__any_sync"};
constexpr unsigned kWarp = 32, kMostThreads = 1024;

struct Fiber {
  Context context;
  char* stack = nullptr;
  bool started = false;
  State state = State::ended;
  // Of the call that it waits at:
  Call call;
  unsigned mask;
  uint64_t value, answer;
  int argument;
  Place place;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

Fiber fibers[kMostThreads];
Context scheduler;
Fiber* running = nullptr;
void (*thread_body)(void*);
void* body_argument;
const void* kernel_code;
std::string failure;  // of the launch, empty so far
std::mutex one_launch;
Order order = Order::forward;
int launches = 0;
std::mt19937 random_numbers;

std::string at(const Fiber& fiber) {
  return std::string(fiber.place.file) + ":" + std::to_string(fiber.place.line) + " (" +
         kCalls[static_cast<int>(fiber.call)] + ")";
}

[[noreturn]] void fail(const std::string& what, const Fiber& fiber) {
  cuda_on_host::fail(what, static_cast<unsigned>(&fiber - fibers), at(fiber));
}

// --- from the scheduler to a fiber and back

// AddressSanitizer is told of each switch, before and after: to a fiber, or to the scheduler
// (null).
#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_stack_size;
void* scheduler_fake_stack;

void before_switch(Fiber* to) {
  if (to) {
    __sanitizer_start_switch_fiber(&scheduler_fake_stack, to->stack, kStack);
  } else {
    __sanitizer_start_switch_fiber(&running->fake_stack, scheduler_stack, scheduler_stack_size);
  }
}
void after_switch(void* fake_stack, bool in_fiber) {
  const void** bottom = in_fiber ? &scheduler_stack : nullptr;
  __sanitizer_finish_switch_fiber(fake_stack, bottom, in_fiber ? &scheduler_stack_size : nullptr);
}
void forget_stack(Fiber* fiber) { __asan_unpoison_memory_region(fiber->stack, kStack); }
#else
void* scheduler_fake_stack;
void before_switch(Fiber*) {}
void after_switch(void*, bool) {}
void forget_stack(Fiber*) {}
#endif

void leave() {
  before_switch(nullptr);
  switch_context(&running->context, &scheduler);
  after_switch(running->fake_stack, true);
}

// A fiber outlives its thread, and becomes one of the next block.
void run_threads() {
  after_switch(nullptr, true);
  while (true) {
    thread_body(body_argument);
    running->state = State::ended;
    leave();
  }
}

void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  if (!fiber.stack) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    fiber.stack = static_cast<char*>(stack);
  }
  if (!fiber.started) {
    // Stacks that all ended alike would compete for the same lines of the cache.
    start_context(&fiber.context, fiber.stack, kStack - thread % 64 * 320, run_threads);
    fiber.started = true;
  }
  running = &fiber;
  running_stack = fiber.stack;
  running_thread = thread;
  threadIdx = {thread, 0, 0};
  before_switch(&fiber);
  switch_context(&scheduler, &fiber.context);
  after_switch(scheduler_fake_stack, false);
  running_stack = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

// Whatever a fiber was doing, it will begin anew.
void abandon(Fiber* fiber) {
  if (fiber->started) forget_stack(fiber);
  fiber->started = false;
}

// --- warps

// Whether all lanes that `mine` names have come to its call.
bool all_have_come(const Fiber* lanes, unsigned count, const Fiber& mine) {
  if (!(mine.mask >> (&mine - lanes) & 1)) fail("a thread calls that its mask does not name", mine);
  bool all = true;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(mine.mask >> lane & 1)) continue;
    if (lane >= count) fail("the mask names a lane that the block does not have", mine);
    const Fiber& other = lanes[lane];
    if (other.state == State::ended) fail("the mask names a lane that has ended", mine);
    if (other.state == State::ready || other.call == Call::syncthreads) {
      all = false;
    } else if (other.call != mine.call || other.mask != mine.mask ||
               other.place.line != mine.place.line) {
      fail("lanes of one mask wait at different calls, another one at " + at(other), mine);
    }
  }
  return all;
}

uint64_t answer_to(const Fiber* lanes, const Fiber& mine, unsigned votes) {
  const unsigned lane = static_cast<unsigned>(&mine - lanes);
  const unsigned argument = static_cast<unsigned>(mine.argument);
  unsigned from = lane;
  switch (mine.call) {
    case Call::ballot:
      return votes;
    case Call::any:
      return votes != 0;
    case Call::shfl:
      from = argument % kWarp;
      break;
    case Call::shfl_down:
      from = lane + argument < kWarp ? lane + argument : lane;
      break;
    case Call::shfl_xor:
      from = (lane ^ argument) % kWarp;
      break;
    default:
      return 0;
  }
  if (!(mine.mask >> from & 1)) fail("a lane is read that the mask does not name", mine);
  return lanes[from].value;
}

// Answers every call of a warp to which all lanes have come; whether there was one.
bool answer_calls(Fiber* lanes, unsigned count) {
  bool any = false;
  for (unsigned i = 0; i < count; ++i) {
    if (lanes[i].state != State::waiting || lanes[i].call == Call::syncthreads) continue;
    if (!all_have_come(lanes, count, lanes[i])) continue;
    const unsigned mask = lanes[i].mask;
    unsigned votes = 0;
    for (unsigned k = 0; k < count; ++k) {
      if (mask >> k & 1 && lanes[k].value) votes |= 1u << k;
    }
    for (unsigned k = 0; k < count; ++k) {
      if (mask >> k & 1) lanes[k].answer = answer_to(lanes, lanes[k], votes);
    }
    for (unsigned k = 0; k < count; ++k) {
      if (mask >> k & 1) lanes[k].state = State::ready;
    }
    any = true;
  }
  return any;
}

// --- blocks

// What the module holds in thread-local memory.
void find_shared_memory() {
  static thread_local char some = 0;
  const auto look = [](dl_phdr_info* module, size_t, void* inside) {
    for (int i = 0; i < module->dlpi_phnum; ++i) {
      const auto& part = module->dlpi_phdr[i];
      const SharedMemory here{module->dlpi_tls_data, part.p_memsz};
      if (part.p_type == PT_TLS && here.holds(inside)) shared_memory = here;
    }
    return 0;
  };
  dl_iterate_phdr(look, &some);
}

void put_in_order(std::vector<unsigned>* turns) {
  std::iota(turns->begin(), turns->end(), 0u);
  if (order == Order::reverse) std::reverse(turns->begin(), turns->end());
  if (order == Order::random) std::shuffle(turns->begin(), turns->end(), random_numbers);
}

// Runs a warp until it can go no further, or in random order for a while.
void run_warp(unsigned first, unsigned count) {
  static std::vector<unsigned> turns;
  turns.resize(count);
  unsigned rounds = order == Order::random ? 1 + random_numbers() % 6 : ~0u;
  put_in_order(&turns);
  do {
    for (unsigned lane : turns) {
      if (fibers[first + lane].state == State::ready) resume(first + lane);
    }
  } while (answer_calls(fibers + first, count) && --rounds);
}

// Lets the threads of a block go on once all wait at one __syncthreads; fails if nothing can.
void release_barrier(unsigned threads) {
  const Fiber* first = nullptr;
  unsigned at_barrier = 0, ended = 0;
  for (unsigned t = 0; t < threads; ++t) {
    const Fiber& fiber = fibers[t];
    if (fiber.state == State::ready) return;
    ended += fiber.state == State::ended;
    if (fiber.state != State::waiting) continue;
    at_barrier += fiber.call == Call::syncthreads;
    if (!first || first->call == Call::syncthreads) first = &fiber;
  }
  if (ended == threads) return;
  if (first->call != Call::syncthreads) {
    fail("deadlock: " + std::to_string(at_barrier) + " threads of the block wait at __syncthreads",
         *first);
  }
  if (ended) fail("a barrier after " + std::to_string(ended) + " threads have ended", *first);
  for (unsigned t = 0; t < threads; ++t) {
    if (fibers[t].place.line != first->place.line) {
      fail("threads wait at different barriers, another one at " + at(fibers[t]), *first);
    }
    fibers[t].state = State::ready;
  }
  intervals.next();
}

void run_block(unsigned threads) {
  const unsigned warps = (threads + kWarp - 1) / kWarp;
  static std::vector<unsigned> turns;
  turns.resize(warps);
  intervals.next();
  intervals.block = intervals.now;
  for (unsigned t = 0; t < threads; ++t) fibers[t].state = State::ready;
  const auto has_ended = [](const Fiber& fiber) { return fiber.state == State::ended; };
  while (!std::all_of(fibers, fibers + threads, has_ended)) {
    put_in_order(&turns);
    for (unsigned w : turns) run_warp(kWarp * w, std::min(kWarp, threads - kWarp * w));
    release_barrier(threads);
  }
}

}  // namespace

// The compiler's own tools know; without them an address has to do.
Symbol::Symbol(const void* code) : function("(unknown)"), place("(unknown)") {
  Dl_info module;
  if (!dladdr(code, &module)) return;
  char command[4096], line[4096];
  const size_t offset = static_cast<const char*>(code) - static_cast<char*>(module.dli_fbase);
  std::snprintf(command, sizeof(command), "addr2line -fCe '%s' %#zx", module.dli_fname, offset);
  FILE* lines = popen(command, "r");
  for (std::string* answer : {&function, &place}) {
    if (!lines || !std::fgets(line, sizeof(line), lines)) break;
    answer->assign(line, std::strcspn(line, "\n"));
  }
  if (lines) pclose(lines);
}

void fail(const std::string& what, unsigned thread, const std::string& where) {
  failure = "CUDA on the host: " + what + "\n  kernel " + Symbol(kernel_code).function +
            "\n  block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(thread) +
            ", at " + where;
  if (running_stack) leave();  // for good
  throw std::runtime_error(failure);
}

uint64_t wait(Call call, unsigned mask, uint64_t value, int argument, Place place) {
  Fiber* me = running;
  me->call = call;
  me->mask = mask;
  me->value = value;
  me->argument = argument;
  me->place = place;
  me->state = State::waiting;
  leave();
  return me->answer;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                   void* argument) {
  const std::lock_guard<std::mutex> held(one_launch);
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool along_x = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
  if (!along_x || !grid.x || grid.x > 0x7fffffffu || !block.x || block.x > kMostThreads) {
    return cudaErrorInvalidConfiguration;
  }
  gridDim = grid;
  blockDim = block;
  kernel_code = kernel;
  thread_body = body;
  body_argument = argument;
  intervals.next();
  intervals.launch = intervals.now;
  find_shared_memory();
  forget_accesses();
  std::vector<unsigned> turns(grid.x);
  put_in_order(&turns);
  failure.clear();
  ++launches;
  try {
    for (unsigned b : turns) {
      blockIdx = {b, 0, 0};
      run_block(block.x);
    }
  } catch (...) {
    for (Fiber& fiber : fibers) abandon(&fiber);
    throw;
  }
  return cudaSuccess;
}

#define CUDA_ON_HOST_EXPORT extern "C" __attribute__((visibility("default")))

// 0: forward, 1: reverse, 2: random.
CUDA_ON_HOST_EXPORT void cuda_on_host_order(int which, unsigned seed) {
  const std::lock_guard<std::mutex> held(one_launch);
  order = static_cast<Order>(which);
  random_numbers.seed(seed);
}

CUDA_ON_HOST_EXPORT int cuda_on_host_launches() { return launches; }

}  // namespace cuda_on_host

// Only one fiber runs at a time, so that plain arithmetic is atomic.
#define CUDA_ON_HOST_ATOMIC(T, name, result)                                  \
  T name(T* to, T by) {                                                       \
    using namespace cuda_on_host;                                             \
    check_access(to, sizeof(T), Access::atomic, __builtin_return_address(0)); \
    const T old = *to;                                                        \
    *to = result;                                                             \
    return old;                                                               \
  }
CUDA_ON_HOST_ATOMIC(unsigned, atomicAdd, old + by)
CUDA_ON_HOST_ATOMIC(unsigned, atomicOr, old | by)
CUDA_ON_HOST_ATOMIC(unsigned, atomicMax, std::max(old, by))
CUDA_ON_HOST_ATOMIC(unsigned long long, atomicAdd, old + by)
CUDA_ON_HOST_ATOMIC(unsigned long long, atomicMax, std::max(old, by))
