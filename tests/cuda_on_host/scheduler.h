// What the scheduler and the check of memory accesses know of one another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace cuda_on_host {

constexpr size_t kStack = 256 << 10;

// Ends the launch with an exception; the message says which kernel, block and thread did what, and
// `where`.
[[noreturn]] void fail(const std::string& what, unsigned thread, const std::string& where);

// "file:line" of an address in the code, and the function that it lies in.
struct Symbol {
  std::string function, place;
  explicit Symbol(const void* code);
};

// The stack of the thread that runs, null between threads, and its number in its block.
extern const char* running_stack;
extern unsigned running_thread;

// Between two barriers of a block lies an interval; they are numbered in the order they run in.
struct Intervals {
  uint32_t launch, block, now;  // the first of the launch, the first of the block, the current one
  void next() { ++now; }
};
extern Intervals intervals;

enum class Access { read, write, atomic };

// Fails if the access races with an earlier one, or reads shared memory that nobody has written.
void check_access(const void* at, size_t size, Access access, const void* code);

// Between launches: gives memory back if much of it is known.
void forget_accesses();

// The memory of all __shared__ variables.
struct SharedMemory {
  const void* begin = nullptr;
  size_t size = 0;
  bool holds(const void* at) const {
    return static_cast<const char*>(at) - static_cast<const char*>(begin) <
               static_cast<ptrdiff_t>(size) &&
           at >= begin;
  }
};
extern SharedMemory shared_memory;

}  // namespace cuda_on_host
