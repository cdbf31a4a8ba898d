// Avoids the cost of fresh pages in large allocations.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__GLIBC__)
#include <malloc.h>
#endif

namespace dagcore {

// Asks for huge pages; does nothing if the system has none. The allocator may map a large tensor
// anew each time, and touching it page by page then costs more than filling it.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = int64_t{8} << 20;
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  if (bytes < kLarge) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

// Keeps freed memory in the process, to be allocated again, or returns it to the system. glibc maps
// anew each time what is larger than a threshold. Does nothing with another C library.
inline void keep_freed_memory(bool keep) {
#if defined(__GLIBC__)
  constexpr int kUsual = 32 << 20;  // where glibc's moving threshold ends in a program with tensors
  mallopt(M_MMAP_THRESHOLD, kUsual);
  mallopt(M_MMAP_MAX, keep ? 0 : 65536);  // glibc's default
  mallopt(M_TRIM_THRESHOLD, keep ? -1 : 2 * kUsual);
  if (!keep) malloc_trim(0);
#else
  static_cast<void>(keep);
#endif
}

}  // namespace dagcore
