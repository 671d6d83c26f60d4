// How a 16-bit parameter is stored, so that small updates are not lost (Rounding, see adamw.h):
//
//   nearest      param = round(value)
//   stochastic   param = value rounded up or down at random, right on average (noise.h)
//   Kahan        param = round(value), residual = value - param     value = param + residual
//   master       param = round(value), residual = value             value = residual
//
// Wider parameters hold the value itself.
#pragma once

#include "noise.h"
#include "types.h"

namespace fastremedy {

struct BFloat16 {
  static constexpr uint32_t kInfinity = 0x7f80;
  static FASTREMEDY_HD float to_float(uint16_t bits) { return bfloat16_to_float(bits); }
  static FASTREMEDY_HD uint16_t round(float value) { return float_to_bfloat16(value); }
  static FASTREMEDY_HD uint16_t round_stochastic(float value, uint32_t noise) {
    return float_to_bfloat16_stochastic(value, noise);
  }
};

struct Float16 {
  static constexpr uint32_t kInfinity = 0x7c00;
  static FASTREMEDY_HD float to_float(uint16_t bits) { return float16_to_float(bits); }
  static FASTREMEDY_HD uint16_t round(float value) { return float_to_float16(value); }
  static FASTREMEDY_HD uint16_t round_stochastic(float value, uint32_t noise) {
    return float_to_float16_stochastic(value, noise);
  }
};

template <class Format>
FASTREMEDY_HD float load_kahan(uint16_t param, uint16_t residual) {
  return Format::to_float(param) + Format::to_float(residual);
}

// Infinity minus infinity would be NaN: there nothing is left to compensate.
template <class Format>
FASTREMEDY_HD void store_kahan(float value, uint16_t& param, uint16_t& residual) {
  const uint16_t rounded = Format::round(value);
  const bool is_finite = (rounded & Format::kInfinity) != Format::kInfinity;
  param = rounded;
  residual = Format::round(is_finite ? value - Format::to_float(rounded) : 0.0f);
}

// A master whose rounding is not the parameter is stale: the parameter was set from outside. Values
// are compared, not bits, since zero has two signs.
template <class Format>
FASTREMEDY_HD float load_master(uint16_t param, float residual) {
  const float value = Format::to_float(param);
  return Format::to_float(Format::round(residual)) == value ? residual : value;
}

template <class Format>
FASTREMEDY_HD void store_master(float value, uint16_t& param, float& residual) {
  param = Format::round(value);
  residual = value;
}

}  // namespace fastremedy
