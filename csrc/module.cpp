// The Python module: loading it registers the kernels with torch; it reports what was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/memory.h"
#include "cpu/simd.h"

#ifndef DAGCORE_CUDA_ARCHS
#define DAGCORE_CUDA_ARCHS ""
#endif

namespace dagcore {
namespace {

const char* const kSimdNames[] = {"baseline", "avx2", "avx512"};

Simd simd_named(const std::string& name) {
  for (int level = 0; level < 3; ++level) {
    if (name == kSimdNames[level]) return static_cast<Simd>(level);
  }
  throw std::invalid_argument("DAGCORE_SIMD must be baseline, avx2 or avx512, got " + name);
}

Simd& current() {
  static Simd level = simd_supported();
  return level;
}

}  // namespace

Simd simd_supported() {
#if defined(DAGCORE_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Simd::avx512;
  }
  if (__builtin_cpu_supports("avx2")) return Simd::avx2;
#endif
  return Simd::baseline;
}

Simd simd_in_use() { return current(); }

void use_simd(Simd level) { current() = level < simd_supported() ? level : simd_supported(); }

}  // namespace dagcore

PYBIND11_MODULE(_native, module) {
  using namespace dagcore;
  module.doc() = "Native kernels of dagcore. Importing this module registers them with torch.";
  module.attr("cuda_architectures") = DAGCORE_CUDA_ARCHS;
  if (const char* name = std::getenv("DAGCORE_SIMD")) use_simd(simd_named(name));
  module.def("simd_in_use", [] { return kSimdNames[static_cast<int>(simd_in_use())]; });
  module.def("simd_supported", [] { return kSimdNames[static_cast<int>(simd_supported())]; });
  module.def(
      "use_simd", [](const std::string& name) { use_simd(simd_named(name)); },
      pybind11::arg("name"),
      "Run the CPU kernels at this level, or at the highest that the processor has.");
  module.def("keep_freed_memory", &keep_freed_memory, pybind11::arg("keep"),
             pybind11::call_guard<pybind11::gil_scoped_release>(),
             "Keep freed memory for later allocations, or give it back to the system.");
}
