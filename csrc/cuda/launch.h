// The only way to launch a kernel: on the tensor's device, on torch's current stream, with an error
// if it fails. Neither this file nor the kernels need CUDA's own syntax, so that they also compile
// for the host, where CUDA's keywords are defined away.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "../checks.h"
#include "../registration.h"

namespace dagcore {

// Makes the tensor's device current for its lifetime, and launches there.
class Launcher {
 public:
  Launcher(const char* op, const Tensor& tensor)
      : op_(op), guard_(tensor.get_device_index()), stream_(nullptr) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // kernel(arguments...) on `blocks` > 0 blocks of `threads` threads.
  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads,
                  Arguments&&... arguments) const {
    STD_TORCH_CHECK(blocks < (int64_t{1} << 31), op_, " needs ", blocks,
                    " blocks, and CUDA launches fewer than 2^31: pass fewer images at once");
    const cudaLaunchConfig_t config{dim3(static_cast<unsigned>(blocks)),
                                    dim3(static_cast<unsigned>(threads)),
                                    /*dynamicSmemBytes=*/0,
                                    stream_,
                                    /*attrs=*/nullptr,
                                    /*numAttrs=*/0};
    const cudaError_t error =
        cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
    if (error == cudaSuccess) return;
    cudaGetLastError();  // clears the error, which is reported here
    STD_TORCH_CHECK(false, op_, " could not be launched: ", cudaGetErrorString(error));
  }

 private:
  const char* op_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// A launch with the same number of blocks for each image: the image of a block, and the block's
// index in its image. Divides in 32 bits, as a 64-bit division would be a call.
struct ImageBlocks {
  uint32_t per_image;

  explicit ImageBlocks(int64_t per_image) : per_image(static_cast<uint32_t>(per_image)) {}
  __device__ int64_t image() const { return blockIdx.x / per_image; }
  __device__ int64_t index() const { return blockIdx.x % per_image; }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dagcore
