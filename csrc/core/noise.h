// Stochastic rounding with counter-based noise: a function of (seed, stream, step, element), so a
// run repeats exactly, resumes from the seed, and needs no generator state.
//
// The mixer is lowbias32 of C. Wellons' hash prospector: 32-bit multiplications only, which
// vectorise on every processor. E[round(x)] = x up to the width of the noise (16 bits; 13 for
// float16).
#pragma once

#include "types.h"

namespace fastremedy {

struct NoiseKey {
  uint32_t first;
  uint32_t second;
};

FASTREMEDY_HD uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  x ^= x >> 16;
  return x;
}

// stream: the position of the parameter in the optimizer; step: how often it was updated.
FASTREMEDY_HD NoiseKey noise_key(uint64_t seed, uint32_t stream, uint32_t step) {
  const uint32_t low = mix_bits(static_cast<uint32_t>(seed) ^ mix_bits(stream));
  const uint32_t high = mix_bits(static_cast<uint32_t>(seed >> 32) ^ mix_bits(~step));
  return {mix_bits(low + high), mix_bits(low ^ (high * 0x9e3779b9u))};
}

FASTREMEDY_HD uint32_t noise_bits(NoiseKey key, uint64_t element) {
  const uint32_t low = mix_bits(static_cast<uint32_t>(element) ^ key.first);
  return mix_bits(low + key.second + static_cast<uint32_t>(element >> 32) * 0x9e3779b9u);
}

// Add noise below the last kept bit, then cut. Infinity and NaN pass; a finite value stays finite.
FASTREMEDY_HD uint16_t float_to_bfloat16_stochastic(float value, uint32_t noise) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t rounded = (magnitude + (noise & 0xffffu)) >> 16;
  rounded = rounded < 0x7f7fu ? rounded : 0x7f7fu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  return magnitude >= 0x7f800000u ? float_to_bfloat16(value)
                                  : static_cast<uint16_t>(rounded | sign);
}

// Below 2^-14 the last bit of a float16 is worth 2^-24: there floor(|x| * 2^24 + noise) rounds.
FASTREMEDY_HD uint16_t float_to_float16_stochastic(float value, uint32_t noise) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t fraction = noise & 0x1fffu;
  const bool is_subnormal = magnitude < 0x38800000u;
  const float scaled = (is_subnormal ? bit_cast<float>(magnitude) : 0.0f) * 0x1p24f;
  const uint32_t subnormal =
      static_cast<uint32_t>(scaled + static_cast<float>(fraction) * 0x1p-13f);
  uint32_t rounded = (magnitude - (112u << 23) + fraction) >> 13;
  rounded = is_subnormal ? subnormal : rounded;
  rounded = rounded < 0x7bffu ? rounded : 0x7bffu;
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  return magnitude >= 0x7f800000u ? float_to_float16(value) : static_cast<uint16_t>(rounded | sign);
}

}  // namespace fastremedy
