// Packs: neighbours in memory that a thread loads and stores at once.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace dagcore {

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));  // the widest load there is

template <int V, typename T>
__device__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}
template <typename T, int V>
__device__ void store_pack(const Pack<T, V>& pack, T* to) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

// Whether packs of `bytes` can begin at `data`; true for a null pointer.
inline bool aligned(const void* data, size_t bytes = 16) {
  return reinterpret_cast<uintptr_t>(data) % bytes == 0;
}

}  // namespace dagcore
