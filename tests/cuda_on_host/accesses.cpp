// The check of every access that a kernel makes to memory. The kernels are compiled with
// -fsanitize=thread, which calls the functions at the end of this file in place of that
// sanitizer's.
//
// Blocks and threads run one after the other here, so that a race is not seen as such: it is two
// accesses to the same memory, one of them a write and not both atomic, by threads of one block
// without a barrier between them, or by two blocks of one launch.
#include <algorithm>
#include <iterator>
#include <memory>
#include <unordered_map>
#include <vector>

#include "scheduler.h"

namespace cuda_on_host {
namespace {

// What is known of a word, or of a byte.
struct Cell {
  uint32_t written = 0, read = 0;   // when: the interval of the last time, 0 for never
  uint16_t writer = 0, reader = 0;  // by which thread then
  uint32_t read_by_blocks = 0;      // the last launch in which several blocks read it
};
constexpr uint16_t kAtomic = 0x8000;   // a bit of the writer
constexpr uint16_t kSeveral = 0xffff;  // a reader
constexpr uintptr_t kPage = 4096, kWord = 4;

// The cells of a page are of words until something else than whole words is accessed there.
struct Page {
  uintptr_t cell = kWord;  // bytes of one
  std::vector<Cell> cells{kPage / kWord};

  void split() {
    std::vector<Cell> bytes(kPage);
    for (uintptr_t byte = 0; byte < kPage; ++byte) bytes[byte] = cells[byte / cell];
    cells.swap(bytes);
    cell = 1;
  }
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct {
  uintptr_t number;
  Page* page;
} recent[256];

Page& page_of(uintptr_t number) {
  auto& found = recent[number % std::size(recent)];
  if (found.page && found.number == number) return *found.page;
  std::unique_ptr<Page>& page = pages[number];
  if (!page) page = std::make_unique<Page>();
  found = {number, page.get()};
  return *page;
}

class Check {
 public:
  Check(const void* at, Access access, const void* code)
      : access_(access),
        code_(code),
        shared_(shared_memory.holds(at)),
        begin_(shared_ ? intervals.block : intervals.launch) {}

  void of(Cell* cell) const {
    const unsigned writer = cell->writer & ~kAtomic;
    const bool both_atomic = access_ == Access::atomic && cell->writer & kAtomic;
    if (!both_atomic && unordered(cell->written, writer)) {
      race(access_ == Access::read ? " writes what is read" : " writes what is written",
           cell->written, writer);
    }
    access_ == Access::read ? read(cell) : write(cell);
  }

 private:
  // Whether nothing orders an earlier access and this one.
  bool unordered(uint32_t when, unsigned thread) const {
    if (when < begin_) return false;
    return when < intervals.block || (when == intervals.now && thread != running_thread);
  }

  void read(Cell* cell) const {
    if (shared_ && cell->written < begin_) fail("shared memory is read that nobody has written");
    if (cell->read >= begin_ && cell->read < intervals.block) cell->read_by_blocks = begin_;
    const bool again = cell->read == intervals.now && cell->reader != running_thread;
    cell->reader = again ? kSeveral : static_cast<uint16_t>(running_thread);
    cell->read = intervals.now;
  }

  void write(Cell* cell) const {
    const bool by_blocks = !shared_ && cell->read_by_blocks == begin_;
    if (by_blocks || unordered(cell->read, cell->reader)) {
      race(" reads what is written", by_blocks ? 0 : cell->read, cell->reader);
    }
    cell->writer =
        static_cast<uint16_t>(running_thread | (access_ == Access::atomic ? kAtomic : 0));
    cell->written = intervals.now;
  }

  [[noreturn]] void race(const char* what, uint32_t when, unsigned thread) const {
    const std::string who = when < intervals.block ? "another block"
                            : thread == kSeveral   ? "another thread"
                                                   : "thread " + std::to_string(thread);
    fail("a race: " + who + what);
  }
  [[noreturn]] void fail(const std::string& what) const {
    cuda_on_host::fail(what, running_thread, Symbol(code_).place);
  }

  Access access_;
  const void* code_;
  bool shared_;
  uint32_t begin_;  // accesses before this interval are another launch's, or another block's
};

}  // namespace

void forget_accesses() {
  constexpr size_t kManyPages = 1 << 12;  // a quarter of a gigabyte
  if (pages.size() < kManyPages) return;
  pages.clear();
  for (auto& entry : recent) entry.page = nullptr;
}

void check_access(const void* data, size_t size, Access access, const void* code) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  if (!running_stack || at - reinterpret_cast<uintptr_t>(running_stack) < kStack) return;
  const Check check(data, access, code);
  for (uintptr_t begin = at, end; begin < at + size; begin = end) {
    Page& page = page_of(begin / kPage);
    end = std::min(at + size, (begin / kPage + 1) * kPage);
    if ((begin | end) % page.cell) page.split();
    for (uintptr_t byte = begin; byte < end; byte += page.cell) {
      check.of(&page.cells[byte % kPage / page.cell]);
    }
  }
}

}  // namespace cuda_on_host

using cuda_on_host::Access;
using cuda_on_host::check_access;

#define CUDA_ON_HOST_HOOK(name, size, access) \
  extern "C" void name(void* at) { check_access(at, size, access, __builtin_return_address(0)); }
#define CUDA_ON_HOST_HOOKS(size)                                     \
  CUDA_ON_HOST_HOOK(__tsan_read##size, size, Access::read)           \
  CUDA_ON_HOST_HOOK(__tsan_write##size, size, Access::write)         \
  CUDA_ON_HOST_HOOK(__tsan_unaligned_read##size, size, Access::read) \
  CUDA_ON_HOST_HOOK(__tsan_unaligned_write##size, size, Access::write)
CUDA_ON_HOST_HOOKS(1)
CUDA_ON_HOST_HOOKS(2)
CUDA_ON_HOST_HOOKS(4)
CUDA_ON_HOST_HOOKS(8)
CUDA_ON_HOST_HOOKS(16)
extern "C" void __tsan_read_range(void* at, size_t size) {
  check_access(at, size, Access::read, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* at, size_t size) {
  check_access(at, size, Access::write, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
// The host's own code counts references.
extern "C" unsigned __tsan_atomic32_fetch_add(volatile void* to, unsigned by, int) {
  return __atomic_fetch_add(static_cast<volatile unsigned*>(to), by, __ATOMIC_SEQ_CST);
}
// Any access whose type is aligned to more than its address.
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void*, uintptr_t) {
  cuda_on_host::fail("a misaligned access", cuda_on_host::running_thread,
                     cuda_on_host::Symbol(__builtin_return_address(0)).place);
}
