// Vectors of elements between memory and registers, for every dtype.
#pragma once

#include <type_traits>

#include "../core/types.h"
#include "runtime.cuh"

namespace fastremedy::cuda {

inline constexpr int kAccessBytes = 16;  // the widest access of one thread

// Elements of one vector. 8 that are computed in float take two accesses of 16 bytes as float32 and
// one as float16 or bfloat16. Where double is computed registers are short, and 2 make one access.
template <class T>
inline constexpr int kVecSize = sizeof(T) == sizeof(float) ? 8 : 2;

static_assert(sizeof(uint4) == kAccessBytes && alignof(uint4) == kAccessBytes);

// Pointers that come out of a table in memory: tells the compiler which instructions serve them.
template <class P>
FASTREMEDY_DEVICE P* as_global(P* pointer) {
#ifndef FASTREMEDY_EMULATION
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

FASTREMEDY_DEVICE bool is_aligned(const void* data) {
  return reinterpret_cast<uintptr_t>(data) % kAccessBytes == 0;
}

FASTREMEDY_DEVICE char* element_at(void* data, DType dtype, int64_t i) {
  return static_cast<char*>(data) + i * element_size(dtype);
}
FASTREMEDY_DEVICE const char* element_at(const void* data, DType dtype, int64_t i) {
  return static_cast<const char*>(data) + i * element_size(dtype);
}

// kWidth elements as memory has them; narrower elements than T fill the front. The rest is zero,
// not undefined: ptxas keeps registers that only some dtypes write alive over the whole kernel, and
// adamw_update_kernel would spill about 500 bytes.
template <class T, int kWidth>
struct Stored {
  uint32_t words[kWidth * sizeof(T) / sizeof(uint32_t)] = {};

  FASTREMEDY_DEVICE uint16_t half(int i) const {
    return static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
  }
  FASTREMEDY_DEVICE void set_half(int i, uint16_t bits) {
    const uint32_t kept = i % 2 ? words[i / 2] & 0xffffu : 0;
    words[i / 2] = kept | static_cast<uint32_t>(bits) << (16 * (i % 2));
  }
};

// Elements are read or written once per kernel: the streaming hint (evict first) leaves the L2
// cache to what the next kernel reads again.
enum class Reuse { kNever, kByNextKernel };

template <Reuse kReuse, class Word>
FASTREMEDY_DEVICE Word load_word(const char* address) {
  const auto* word = as_global(reinterpret_cast<const Word*>(address));
  return kReuse == Reuse::kNever ? __ldcs(word) : *word;
}

template <class Word>
FASTREMEDY_DEVICE void store_word(char* address, Word word) {
  __stcs(as_global(reinterpret_cast<Word*>(address)), word);
}

// Elements [i, i + kWidth) from `data` on; kWidth is 1 or that of an aligned vector.
template <class T, int kWidth, Reuse kReuse = Reuse::kNever>
FASTREMEDY_DEVICE Stored<T, kWidth> load(const char* data, DType dtype, int32_t i) {
  const int size = element_size(dtype);
  const char* address = data + static_cast<int64_t>(i) * size;
  Stored<T, kWidth> stored;
  const auto set = [&](int first, auto word) { memcpy(stored.words + first, &word, sizeof(word)); };
  if constexpr (kWidth == 1) {
    if (size == 2) stored.words[0] = load_word<kReuse, uint16_t>(address);
    if (size == 4) stored.words[0] = load_word<kReuse, uint32_t>(address);
    if constexpr (sizeof(T) == 8) {
      if (size == 8) set(0, load_word<kReuse, uint2>(address));
    }
  } else {
    const int bytes = kWidth * size;
    if (bytes == 4) {
      set(0, load_word<kReuse, uint32_t>(address));
    } else if (bytes == 8) {
      set(0, load_word<kReuse, uint2>(address));
    } else {
      set(0, load_word<kReuse, uint4>(address));
      if constexpr (sizeof(stored) > kAccessBytes) {
        if (bytes > kAccessBytes) set(4, load_word<kReuse, uint4>(address + kAccessBytes));
      }
    }
  }
  return stored;
}

template <class T, int kWidth>
FASTREMEDY_DEVICE void store(char* data, DType dtype, int32_t i, const Stored<T, kWidth>& stored) {
  const int size = element_size(dtype);
  char* address = data + static_cast<int64_t>(i) * size;
  const uint32_t* words = stored.words;
  if constexpr (kWidth == 1) {
    if (size == 2) store_word(address, static_cast<uint16_t>(words[0]));
    if (size == 4) store_word(address, words[0]);
    if constexpr (sizeof(T) == 8) {
      if (size == 8) store_word(address, uint2{words[0], words[1]});
    }
  } else {
    const int bytes = kWidth * size;
    if (bytes == 4) {
      store_word(address, words[0]);
    } else if (bytes == 8) {
      store_word(address, uint2{words[0], words[1]});
    } else {
      store_word(address, uint4{words[0], words[1], words[2], words[3]});
      if constexpr (sizeof(stored) > kAccessBytes) {
        if (bytes > kAccessBytes) {
          store_word(address + kAccessBytes, uint4{words[4], words[5], words[6], words[7]});
        }
      }
    }
  }
}

// float64 is there only where T is double.
template <class T, int kWidth>
FASTREMEDY_DEVICE void unpack(const Stored<T, kWidth>& stored, DType dtype, T (&values)[kWidth]) {
  const auto each = [&](auto value_of) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = value_of(i);
  };
  if (dtype == DType::kBFloat16) {
    each([&](int i) { return bfloat16_to_float(stored.half(i)); });
  } else if (dtype == DType::kFloat16) {
    each([&](int i) { return float16_to_float(stored.half(i)); });
  } else if (sizeof(T) == sizeof(float) || dtype == DType::kFloat32) {
    each([&](int i) { return bit_cast<float>(stored.words[i]); });
  } else if constexpr (sizeof(T) == sizeof(double)) {
    each([&](int i) {
      const uint64_t high = stored.words[2 * i + 1];
      return bit_cast<double>(high << 32 | stored.words[2 * i]);
    });
  }
}

template <class T, int kWidth>
FASTREMEDY_DEVICE Stored<T, kWidth> pack(const T (&values)[kWidth], DType dtype) {
  Stored<T, kWidth> stored;
  const auto each = [&](auto put) {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) put(i);
  };
  if (dtype == DType::kBFloat16) {
    each([&](int i) { stored.set_half(i, float_to_bfloat16(static_cast<float>(values[i]))); });
  } else if (dtype == DType::kFloat16) {
    each([&](int i) { stored.set_half(i, float_to_float16(static_cast<float>(values[i]))); });
  } else if (sizeof(T) == sizeof(float) || dtype == DType::kFloat32) {
    each([&](int i) { stored.words[i] = bit_cast<uint32_t>(static_cast<float>(values[i])); });
  } else if constexpr (sizeof(T) == sizeof(double)) {
    each([&](int i) {
      const uint64_t bits = bit_cast<uint64_t>(values[i]);
      stored.words[2 * i] = static_cast<uint32_t>(bits);
      stored.words[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    });
  }
  return stored;
}

}  // namespace fastremedy::cuda
