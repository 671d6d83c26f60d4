// One bit of every element: whether its gradient stays as it is.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace fastremedy::cpu {

// Rows of a tile; each begins with a new byte, and bit i % 8 of byte i / 8 belongs to element i.
template <class Byte>
struct MaskRows {
  Byte* bytes;     // of the first row
  int64_t stride;  // bytes from one row to the next
  int64_t row_size, num_rows;
};

// Flags are 0 or 1.
inline void pack_row(const uint8_t* flags, uint8_t* bytes, int64_t n) {
  int64_t i = 0;
#ifdef __SSE2__
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes_of_flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(flags + i));
    const int bits = _mm_movemask_epi8(_mm_slli_epi16(bytes_of_flags, 7));
    bytes[i / 8] = static_cast<uint8_t>(bits);
    bytes[i / 8 + 1] = static_cast<uint8_t>(bits >> 8);
  }
#endif
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, flags + i, 8);
    // The product moves bit 8 k of a word to bit 56 + k.
    bytes[i / 8] = static_cast<uint8_t>((word * 0x0102040810204080ull) >> 56);
  }
  if (i < n) {
    uint8_t byte = 0;
    for (int64_t k = i; k < n; ++k) byte |= static_cast<uint8_t>(flags[k] << (k - i));
    bytes[i / 8] = byte;
  }
}

inline void pack_bits(const uint8_t* flags, const MaskRows<uint8_t>& rows) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    pack_row(flags + r * rows.row_size, rows.bytes + r * rows.stride, rows.row_size);
  }
}

// g = bit ? grad : otherwise(grad)
template <class T, class Otherwise>
inline __attribute__((always_inline)) void choose_by_bits(const MaskRows<const uint8_t>& rows,
                                                          const T* __restrict grad, T* __restrict g,
                                                          const Otherwise& otherwise) {
  for (int64_t r = 0; r < rows.num_rows; ++r, grad += rows.row_size, g += rows.row_size) {
    const uint8_t* const bytes = rows.bytes + r * rows.stride;
    int64_t i = 0;
    for (; i + 8 <= rows.row_size; i += 8) {
      const int byte = bytes[i / 8];
#pragma omp simd
      for (int lane = 0; lane < 8; ++lane) {
        const T value = grad[i + lane];
        g[i + lane] = (byte & (1 << lane)) != 0 ? value : otherwise(value);
      }
    }
    for (; i < rows.row_size; ++i) {
      g[i] = (bytes[i / 8] >> (i % 8)) & 1 ? grad[i] : otherwise(grad[i]);
    }
  }
}

// The gradient of z for ReLU (negative_slope = 0) and leaky ReLU. A zero is no product: the
// gradient may be infinite.
template <class T>
FASTREMEDY_CLONES_WITHOUT_MASKS void find_masked_grads(MaskRows<const uint8_t> rows, const T* grad,
                                                       T* g, T negative_slope) {
  if (negative_slope == 0) {
    choose_by_bits(rows, grad, g, [](T) __attribute__((always_inline)) { return T(0); });
  } else {
    choose_by_bits(rows, grad, g, [negative_slope](T value) __attribute__((always_inline)) {
      return value * negative_slope;
    });
  }
}

}  // namespace fastremedy::cpu
