// Memory movement: a block of a tensor as an array of the type the formula computes in.
#pragma once

#include "../core/multi_tensor.h"
#include "../core/param_storage.h"
#include "simd.h"

namespace fastremedy::cpu {

// 4 KiB of float: the blocks of all operands stay in L1 between conversion and formula.
inline constexpr int64_t kBlockSize = 1024;

// Format: BFloat16 or Float16 of core/param_storage.h.
template <class Format>
void load_half(const uint16_t* stored, float* values, int64_t n);
template <class Format>
void store_half(const float* values, uint16_t* stored, int64_t n);

// How many chunks ahead one is asked for: a small one takes 30 ns, memory 100 ns to answer.
inline constexpr int32_t kFetchAhead = 4;

// Asks for the beginning of an array: the hardware goes on from there, but cannot know where the
// next tensor lies.
inline void fetch(const void* data) {
  for (int line = 0; line < 4; ++line) {
    __builtin_prefetch(static_cast<const char*>(data) + line * 64);
  }
}

inline void* element_at(void* data, DType dtype, int64_t i) {
  return static_cast<char*>(data) + i * element_size(dtype);
}
inline const void* element_at(const void* data, DType dtype, int64_t i) {
  return static_cast<const char*>(data) + i * element_size(dtype);
}

// The tensor's own memory where it already has the type T, otherwise a converted copy.
template <class T>
class Block {
 public:
  T* load(void* data, DType dtype, int64_t begin, int64_t n) {
    T* const values = place(data, dtype, begin);
    if (values == copy_) convert(n);
    return values;
  }

  // As load, for elements that are written and not read.
  T* place(void* data, DType dtype, int64_t begin) {
    address_ = element_at(data, dtype, begin);
    dtype_ = dtype;
    const bool is_half = dtype == DType::kBFloat16 || dtype == DType::kFloat16;
    return is_half ? copy_ : static_cast<T*>(address_);
  }

  // Writes a converted copy back; the tensor's own memory needs nothing.
  void store(int64_t n) {
    if constexpr (sizeof(T) == sizeof(float)) {
      auto* stored = static_cast<uint16_t*>(address_);
      if (dtype_ == DType::kBFloat16) store_half<BFloat16>(copy_, stored, n);
      if (dtype_ == DType::kFloat16) store_half<Float16>(copy_, stored, n);
    }
  }

 private:
  void convert(int64_t n) {
    if constexpr (sizeof(T) == sizeof(float)) {
      const auto* stored = static_cast<const uint16_t*>(address_);
      // The next block arrives while this one is worked on: the hardware does not see several
      // tensors, read in turns, as streams.
      for (int64_t i = 0; i < kBlockSize; i += kLine) __builtin_prefetch(stored + n + i);
      if (dtype_ == DType::kBFloat16) load_half<BFloat16>(stored, copy_, n);
      if (dtype_ == DType::kFloat16) load_half<Float16>(stored, copy_, n);
    }
  }

  static constexpr int64_t kLine = 64 / sizeof(uint16_t);

  void* address_ = nullptr;
  DType dtype_ = DType::kFloat32;
  alignas(64) T copy_[kBlockSize];
};

}  // namespace fastremedy::cpu
