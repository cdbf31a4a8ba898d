// Found before torch's header of this name: the current device and stream where there is none.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

HIDDEN_NAMESPACE_BEGIN(torch, stable, accelerator)
using DeviceIndex = int32_t;
class DeviceGuard {
 public:
  explicit DeviceGuard(DeviceIndex) {}
};
HIDDEN_NAMESPACE_END(torch, stable, accelerator)

inline int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
