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

// Of x + low, for -88 <= x <= 88 and |low| < 0.1. Below -87.7 scale is 0, and above that a normal
// number. NaN makes expm1_r NaN.
FASTREMEDY_HD ReducedExp reduce_exp(float x, float low = -0.0f) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  constexpr float kRounder = 12582912.0f;
  const float shifted = x * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f + low;  // ln 2 in two parts
  // exp(r) - 1 = r + r^2 p; the polynomial of least error, 3e-9 of exp(r).
  float p = 1.38144671e-3f;
  p = p * r + 8.36878041e-3f;
  p = p * r + 4.16683942e-2f;
  p = p * r + 1.66665201e-1f;
  p = p * r + 4.99999934e-1f;
  const uint32_t exponent = (bit_cast<uint32_t>(shifted) + 127u) << 23;
  return {bit_cast<float>(exponent), p * r * r + r};
}

// For x <= 0: 0 below -87.7, where exp(x) is 8e-39. A magnitude has no sign to decide about.
FASTREMEDY_HD float exp_of_negative(float magnitude, float low = -0.0f) {
  const ReducedExp e = reduce_exp(magnitude > 88.0f ? -88.0f : -magnitude, low);
  return e.scale * e.expm1_r + e.scale;
}
FASTREMEDY_HD double exp_of_negative(double magnitude, double low = 0) {
  return ::exp(low - magnitude);
}

// exp(x - high) for x <= high. The difference rounds by up to half a unit in the last place of a
// large number, which an exponential makes a relative error of 5e-6: `low` is what was lost.
FASTREMEDY_HD float exp_of_difference(float x, float high) {
  const float magnitude = high - x;
  const float back = magnitude - high;
  const float low = (x + back) - (high - (magnitude - back));
  const bool is_zero = magnitude > 88.0f;
  const ReducedExp e = reduce_exp(is_zero ? -88.0f : -magnitude, is_zero ? -0.0f : low);
  return e.scale * e.expm1_r + e.scale;
}
FASTREMEDY_HD double exp_of_difference(double x, double high) { return ::exp(x - high); }

// Infinity above 88, where exp(x) is 1.7e38.
FASTREMEDY_HD float exp_of(float x) {
  const float low_end = x < -88.0f ? -88.0f : x;
  const ReducedExp e = reduce_exp(low_end > 88.0f ? 88.0f : low_end);
  return x > 88.0f ? HUGE_VALF : e.scale * e.expm1_r + e.scale;
}
FASTREMEDY_HD double exp_of(double x) { return ::exp(x); }

FASTREMEDY_HD float expm1_of(float x) {
  const float low_end = x < -88.0f ? -88.0f : x;
  const ReducedExp e = reduce_exp(low_end > 88.0f ? 88.0f : low_end);
  return e.scale * e.expm1_r + (e.scale - 1.0f);
}
FASTREMEDY_HD double expm1_of(double x) { return ::expm1(x); }

// For 1 <= x <= 4. A division in CUDA branches for divisors that are not normal, and a branch keeps
// the compiler from taking several elements at once.
FASTREMEDY_HD float reciprocal(float x) {
#ifdef __CUDA_ARCH__
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));  // off by 1 unit in the last place
  return ::fmaf(r, ::fmaf(-x, r, 1.0f), r);
#else
  return 1.0f / x;
#endif
}
FASTREMEDY_HD double reciprocal(double x) { return 1.0 / x; }

// x / y for 1 <= y <= 4, with one rounding where a division is not slow.
FASTREMEDY_HD float ratio(float x, float y) {
#ifdef __CUDA_ARCH__
  return x * reciprocal(y);
#else
  return x / y;
#endif
}

// For 0 <= x <= 1: 2 atanh(s) with s = x / (2 + x) <= 1/3, a series in s^2 of which four terms give
// an error of 5e-9. A division costs less than the ten terms of a polynomial in x.
FASTREMEDY_HD float log1p_of(float x) {
  const float s = ratio(x, 2.0f + x);
  const float z = s * s;
  float p = 2.80244590e-1f;
  p = p * z + 2.79991410e-1f;
  p = p * z + 4.00216991e-1f;
  p = p * z + 6.66664131e-1f;
  return p * (s * z) + (s + s);
}
FASTREMEDY_HD double log1p_of(double x) { return ::log1p(x); }

// A logarithm as a sum; of a float, `high` has no error.
template <class T>
struct LogParts {
  T high, low;
};

// For normal numbers; 0 <= low <= log(2) for those up to 1, and its error is below 1.1e-7.
FASTREMEDY_HD LogParts<float> log_parts(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const float mantissa = bit_cast<float>((bits & 0x7fffffu) | 0x3f800000u);
  const float exponent = static_cast<float>(static_cast<int32_t>(bits >> 23) - 127);
  // ln 2 in two parts; the product with the first is exact.
  return {exponent * 0.693145752f, exponent * 1.42860677e-6f + log1p_of(mantissa - 1)};
}
FASTREMEDY_HD LogParts<double> log_parts(double x) { return {::log(x), 0}; }

template <class T>
FASTREMEDY_HD T log_of(T x) {
  const LogParts<T> parts = log_parts(x);
  return parts.high + parts.low;
}

template <class T>
FASTREMEDY_HD T sigmoid(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

}  // namespace fastremedy
