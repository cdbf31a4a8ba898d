// Sums over a block's threads in a fixed order.
#pragma once

namespace dagcore {

// The sum of every thread's value. All threads of the block must call this.
template <int kThreads>
__device__ double sum_of_block(double value) {
  __shared__ double values[kThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = values[0];
  __syncthreads();  // before the next call writes
  return sum;
}

}  // namespace dagcore
