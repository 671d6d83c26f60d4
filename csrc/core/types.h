// Element types as the kernels store them, and their conversion to the type they compute in.
//
// Everything is written on bits, so a value converts to the same bits on every backend.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) && !defined(FASTREMEDY_EMULATION)
#define FASTREMEDY_HD __host__ __device__ __forceinline__
#else
#define FASTREMEDY_HD inline __attribute__((always_inline))
#endif

namespace fastremedy {

// Mirrored by the constants of triton_kernels; the order is part of the table format.
enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

FASTREMEDY_HD int element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class To, class From>
FASTREMEDY_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// bfloat16 is the upper half of a float.
FASTREMEDY_HD float bfloat16_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

// Round to nearest, ties to even. NaN stays NaN: the carry could turn it into infinity.
FASTREMEDY_HD uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

// The same in the upper half of the result; the lower is to be cut off. For pairs in registers of a
// CPU, where AdamW takes 21 ms instead of 24; CUDA kernels spilled with it.
FASTREMEDY_HD uint32_t float_to_upper_bfloat16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return value != value ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
}

// The multiplication by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals.
FASTREMEDY_HD float float16_to_float(uint16_t bits) {
  const uint32_t magnitude = (bits & 0x7fffu) << 13;
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t inf_or_nan = magnitude | 0x7f800000u;
  const uint32_t value = (bits & 0x7c00u) == 0x7c00u ? inf_or_nan : finite;
  return bit_cast<float>(value | (static_cast<uint32_t>(bits & 0x8000u) << 16));
}

// Round to nearest, ties to even. Below 2^-14 a float16 is a multiple of 2^-24: adding 0.5, whose
// last bit is worth 2^-24, lets the addition itself round. Above, the carry does, as for bfloat16.
FASTREMEDY_HD uint16_t float_to_float16(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t normal = (rebased + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

}  // namespace fastremedy
