// Neighbours in memory that a thread loads and stores at once.
#pragma once

#include <cstdint>

namespace dagcore {

template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

template <typename T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));  // the widest load there is

inline bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace dagcore
