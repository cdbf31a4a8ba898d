// Small kernels, each with a fault that CUDA leaves undefined, and correct ones beside them:
// `misuse NAME ORDER` runs one of them.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

namespace cuda_on_host {
extern "C" void cuda_on_host_order(int which, unsigned seed);
}

namespace {

constexpr unsigned kThreads = 64;

// --- correct

// Each thread's value, summed over its block.
__global__ void sum(const unsigned* values, unsigned* sums) {
  __shared__ unsigned of_warp[kThreads / 32];
  unsigned value = values[blockIdx.x * kThreads + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) sums[blockIdx.x] = of_warp[0] + of_warp[1];
}

// Two halves of each warp go separate ways, and meet again.
__global__ void halves(const unsigned* values, unsigned* sums) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned value = values[blockIdx.x * kThreads + threadIdx.x];
  unsigned seen = 0;
  if (lane < 16) {
    seen = __ballot_sync(0x0000ffffu, 1);
  } else {
    seen = __any_sync(0xffff0000u, lane == 20) ? 0xffff0000u : 0;
  }
  __syncwarp();
  seen |= __shfl_xor_sync(~0u, seen, 16);
  const unsigned first = __shfl_sync(~0u, value, 0);
  if (lane == 0 && seen == ~0u) atomicAdd(sums + blockIdx.x, 32 * (first + 15) + 16);
}

// --- calls that not all make

__global__ void different_calls(const unsigned*, unsigned* out) {
  if (threadIdx.x % 32 < 16) {
    out[0] = __any_sync(~0u, 1);
  } else {
    out[1] = __ballot_sync(~0u, 1);
  }
}
__global__ void different_lines(const unsigned*, unsigned*) {
  if (threadIdx.x % 32 < 16) {
    __syncwarp();
  } else {
    __syncwarp();
  }
}
__global__ void different_barriers(const unsigned*, unsigned*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void ended_lane(const unsigned*, unsigned* out) {
  if (threadIdx.x == 5) return;
  if (__any_sync(~0u, 1)) atomicAdd(out, 1);
}
__global__ void missing_lane(const unsigned*, unsigned* out) {
  if (__any_sync(~0u, 1)) atomicAdd(out, 1);
}
__global__ void not_in_its_mask(const unsigned*, unsigned* out) {
  if (__any_sync(0xfffffffeu, 1)) atomicAdd(out, 1);
}
__global__ void reads_outside_the_mask(const unsigned*, unsigned* out) {
  if (threadIdx.x % 32 < 16) atomicAdd(out, __shfl_sync(0xffffu, 1u, 16));
}
__global__ void barrier_after_an_end(const unsigned*, unsigned*) {
  if (threadIdx.x == 40) return;
  __syncthreads();
}
__global__ void deadlock(const unsigned*, unsigned*) {
  if (threadIdx.x % 32 == 0) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

// --- memory

__global__ void no_barrier(const unsigned* values, unsigned* out) {
  __shared__ unsigned tile[kThreads];
  tile[threadIdx.x] = values[threadIdx.x];
  atomicAdd(out, tile[kThreads - 1 - threadIdx.x]);
}
__global__ void no_second_barrier(const unsigned* values, unsigned* out) {
  __shared__ unsigned tile[kThreads];
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = values[threadIdx.x] + round;
    __syncthreads();
    atomicAdd(out, tile[kThreads - 1 - threadIdx.x]);
  }
}
__global__ void unwritten(const unsigned*, unsigned* out) {
  __shared__ unsigned tile[kThreads + 1];
  tile[threadIdx.x] = 1;
  __syncthreads();
  atomicAdd(out, tile[threadIdx.x + 1]);
}
__global__ void plain_sum(const unsigned* values, unsigned* out) {
  if (threadIdx.x == 0) out[0] += values[blockIdx.x];
}
__global__ void plain_beside_atomic(const unsigned*, unsigned* out) {
  if (threadIdx.x % 2) {
    atomicAdd(out, 1);
  } else if (threadIdx.x == 6) {
    out[0] = 1;
  }
}
__global__ void read_by_blocks(const unsigned*, unsigned* out) {
  if (blockIdx.x == 1 && threadIdx.x == 3) {
    out[8] = 1;
  } else if (threadIdx.x == 0) {
    atomicAdd(out, out[8]);
  }
}
__global__ void misaligned(const unsigned*, unsigned* out) {
  char* bytes = reinterpret_cast<char*>(out);
  if (blockIdx.x == 0 && threadIdx.x == 0) *reinterpret_cast<unsigned*>(bytes + 2) = 1;
}

struct Kernel {
  const char* name;
  void (*code)(const unsigned*, unsigned*);
  unsigned threads = kThreads;
  bool sums = false;
};
#define KERNEL(name) {#name, name}
const Kernel kKernels[] = {
    {"sum", sum, kThreads, true},
    {"halves", halves, kThreads, true},
    KERNEL(different_calls),
    KERNEL(different_lines),
    KERNEL(different_barriers),
    KERNEL(ended_lane),
    {"missing_lane", missing_lane, 40},
    KERNEL(not_in_its_mask),
    KERNEL(reads_outside_the_mask),
    KERNEL(barrier_after_an_end),
    KERNEL(deadlock),
    KERNEL(no_barrier),
    KERNEL(no_second_barrier),
    KERNEL(unwritten),
    KERNEL(plain_sum),
    KERNEL(plain_beside_atomic),
    KERNEL(read_by_blocks),
    KERNEL(misaligned),
};

// Three blocks: values 0, 1, 2, ... and a sum of the block's for each.
int run(const Kernel& kernel) {
  constexpr unsigned kBlocks = 3;
  std::vector<unsigned> values(kBlocks * kThreads), out(16);
  for (unsigned i = 0; i < values.size(); ++i) values[i] = i;
  const cudaLaunchConfig_t config{dim3(kBlocks), dim3(kernel.threads), 0, nullptr, nullptr, 0};
  if (cudaLaunchKernelEx(&config, kernel.code, values.data(), out.data()) != cudaSuccess) return 3;
  for (unsigned b = 0; kernel.sums && b < kBlocks; ++b) {
    if (out[b] != kThreads * kThreads * b + kThreads * (kThreads - 1) / 2) return 4;
  }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  cuda_on_host::cuda_on_host_order(std::atoi(arguments[2]), 1);
  for (const Kernel& kernel : kKernels) {
    if (arguments[1] != std::string(kernel.name)) continue;
    try {
      return run(kernel);
    } catch (const std::exception& error) {
      std::puts(error.what());
      return 1;
    }
  }
  return 2;
}
