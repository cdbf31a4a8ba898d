// Found in place of CUDA's header of this name: what csrc/cuda uses of CUDA, for a host compiler.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...) __attribute__((noinline))
// Blocks run one after the other and share these. Nothing else in the module is thread-local, which
// is how the scheduler knows them; AddressSanitizer wants to put its red zones between them.
#if defined(__SANITIZE_ADDRESS__)
#define __shared__ static constinit
#else
#define __shared__ static constinit thread_local
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

extern uint3 threadIdx, blockIdx;  // of the thread that runs
extern dim3 blockDim, gridDim;

namespace cuda_on_host {

struct Place {
  const char* file;
  int line;
};

enum class Call { syncthreads, syncwarp, shfl, shfl_down, shfl_xor, ballot, any };

// What a thread gets once every lane of `mask`, or for syncthreads every thread, has come.
uint64_t wait(Call call, unsigned mask, uint64_t value, int argument, Place place);

// Runs body(argument) once for each thread. `kernel` is its address, for messages.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                   void* argument);

template <typename T>
T shuffle(Call call, unsigned mask, T value, int argument, Place place) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4, "CUDA shuffles no such type");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = wait(call, mask, bits, argument, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_host

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  std::pair call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto body = [](void* data) {
    const auto& [kernel, arguments] = *static_cast<decltype(call)*>(data);
    std::apply(kernel, arguments);
  };
  return cuda_on_host::launch(*config, reinterpret_cast<const void*>(kernel), body, &call);
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

// Each function below knows where it is called.
#define CUDA_ON_HOST_PLACE cuda_on_host::Place place = {__builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_ON_HOST_PLACE) {
  cuda_on_host::wait(cuda_on_host::Call::syncthreads, ~0u, 0, 0, place);
}
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_HOST_PLACE) {
  cuda_on_host::wait(cuda_on_host::Call::syncwarp, mask, 0, 0, place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, CUDA_ON_HOST_PLACE) {
  return static_cast<unsigned>(
      cuda_on_host::wait(cuda_on_host::Call::ballot, mask, vote != 0, 0, place));
}
inline int __any_sync(unsigned mask, int vote, CUDA_ON_HOST_PLACE) {
  return cuda_on_host::wait(cuda_on_host::Call::any, mask, vote != 0, 0, place) != 0;
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, CUDA_ON_HOST_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Call::shfl, mask, value, lane, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, CUDA_ON_HOST_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Call::shfl_down, mask, value, by, place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int by, CUDA_ON_HOST_PLACE) {
  return cuda_on_host::shuffle(cuda_on_host::Call::shfl_xor, mask, value, by, place);
}

unsigned atomicAdd(unsigned* to, unsigned by);
unsigned atomicOr(unsigned* to, unsigned by);
unsigned atomicMax(unsigned* to, unsigned by);
unsigned long long atomicAdd(unsigned long long* to, unsigned long long by);
unsigned long long atomicMax(unsigned long long* to, unsigned long long by);

inline int __ffs(int value) { return __builtin_ffs(value); }
inline long long __double2ll_rn(double value) { return std::llrint(value); }

// CUDA's own overloads: of two floats a NaN loses.
template <typename T>
T min(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(a, b);
  return a < b ? b : a;
}
