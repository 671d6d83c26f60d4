// exp(x), exp(x) - 1 and log(1 + x) without a library call: the same bits on every backend, and
// loops that compilers turn into vectors. Relative error below 3 units in the last place.
#pragma once

#include <cmath>

#include "types.h"

namespace fastremedy {

// x = n ln 2 + r with |r| <= ln 2 / 2:  exp(x) = scale (1 + expm1_r),  scale = 2^n.
struct ReducedExp {
  float scale;
  float expm1_r;
};

// Of x + low, for -87 <= x <= 88, where scale is a normal number, and |low| < 0.1. NaN makes
// expm1_r NaN.
FASTREMEDY_HD ReducedExp reduce_exp(float x, float low = 0) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  constexpr float kRounder = 12582912.0f;
  const float shifted = x * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f + low;  // ln 2 in two parts
  // Taylor series of exp(r) - 1; the first term left out is r^8 / 40320 < 6e-9.
  float p = 1.98412698e-4f;
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  const uint32_t exponent = (bit_cast<uint32_t>(shifted) + 127u) << 23;
  return {bit_cast<float>(exponent), p * r * r + r};
}

FASTREMEDY_HD float clamp_to_exp_range(float x) {
  x = x < -87.0f ? -87.0f : x;
  return x > 88.0f ? 88.0f : x;
}

// exp(x + low): 0 below -87, where exp(x) is 1.6e-38, and infinity above 88, where it is 1.7e38.
FASTREMEDY_HD float exp_of(float x, float low = 0) {
  const ReducedExp e = reduce_exp(clamp_to_exp_range(x), low);
  const float value = x < -87.0f ? 0.0f : e.scale * e.expm1_r + e.scale;
  return x > 88.0f ? HUGE_VALF : value;
}
FASTREMEDY_HD double exp_of(double x, double low = 0) { return ::exp(x + low); }

FASTREMEDY_HD float expm1_of(float x) {
  const ReducedExp e = reduce_exp(clamp_to_exp_range(x));
  return e.scale * e.expm1_r + (e.scale - 1.0f);
}
FASTREMEDY_HD double expm1_of(double x) { return ::expm1(x); }

// For 0 <= x <= 1. The polynomial is the one of least relative error, 5e-9.
FASTREMEDY_HD float log1p_of(float x) {
  float p = -3.24401190e-3f;
  p = p * x + 1.98513996e-2f;
  p = p * x - 5.69594130e-2f;
  p = p * x + 1.06036417e-1f;
  p = p * x - 1.53055847e-1f;
  p = p * x + 1.96759358e-1f;
  p = p * x - 2.49541327e-1f;
  p = p * x + 3.33299637e-1f;
  p = p * x - 4.99999017e-1f;
  return p * x * x + x;
}
FASTREMEDY_HD double log1p_of(double x) { return ::log1p(x); }

// For normal numbers up to 1; the error is below 2e-7 + 1e-7 |log(x)|.
FASTREMEDY_HD float log_of(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const float mantissa = bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  return exponent * 0.693147181f + log1p_of(mantissa - 1);
}
FASTREMEDY_HD double log_of(double x) { return ::log(x); }

template <class T>
FASTREMEDY_HD T sigmoid(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

}  // namespace fastremedy
