// One build for every x86-64: a kernel body is compiled for AVX-512, for AVX2 and for the baseline,
// and the widest that the processor has (or DAGCORE_SIMD allows) runs.
#pragma once

#include "../target.h"

namespace dagcore {

enum class Simd : int { baseline = 0, avx2 = 1, avx512 = 2 };

Simd simd_in_use();
Simd simd_supported();
void use_simd(Simd level);  // at most simd_supported()

#if defined(__x86_64__) && defined(__GNUC__)
#define DAGCORE_X86 1
template <auto kBody, typename... Args>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void run_avx512(Args&&... args) {
  kBody(args...);
}
template <auto kBody, typename... Args>
__attribute__((target("avx2"))) void run_avx2(Args&&... args) {
  kBody(args...);
}
#endif
// Not inlined either: each body is compiled once, however many loops call it.
template <auto kBody, typename... Args>
__attribute__((noinline)) void run_baseline(Args&&... args) {
  kBody(args...);
}

// kBody, a function, must be DAGCORE_INLINE, as must everything that it calls.
template <auto kBody, typename... Args>
void run_simd(Simd level, Args&&... args) {
#if defined(DAGCORE_X86)
  if (level == Simd::avx512) return run_avx512<kBody>(args...);
  if (level == Simd::avx2) return run_avx2<kBody>(args...);
#endif
  run_baseline<kBody>(args...);
}

}  // namespace dagcore
