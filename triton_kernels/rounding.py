# mypy: allow-untyped-defs, allow-incomplete-defs
"""Rounding to 16 bits, to nearest and stochastic: ``csrc/core/noise.h`` and ``types.h`` in Triton.

Written on bits, so that the same noise gives the same bits on every backend, and since the
interpreter of Triton cuts float32 to bfloat16 instead of rounding it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(stored, OPMATH: tl.constexpr):
    """Convert from a storage dtype; the interpreter's own conversion spoils bfloat16 subnormals."""
    if stored.dtype.is_bf16():
        bits = stored.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(OPMATH)
    return stored.to(OPMATH)


@triton.jit
def round_nearest(value, DTYPE: tl.constexpr):
    """Convert to a storage dtype, ties to even; 16 bits are reached by way of float32."""
    if DTYPE.is_bf16():
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = (bits >> 16) | 0x40  # the carry could turn a NaN into infinity
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet_nan, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    if DTYPE.is_fp16():
        return value.to(tl.float32).to(tl.float16)
    return value.to(DTYPE)


@triton.jit
def round_stochastic(value, noise, DTYPE: tl.constexpr):
    """Round float32 to bfloat16 or float16: up with the probability of the cut part.

    Infinity and NaN pass; a finite value stays finite.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if DTYPE.is_bf16():
        rounded = tl.minimum((magnitude + (noise & 0xFFFF)) >> 16, 0x7F7F)
    else:
        fraction = noise & 0x1FFF
        is_subnormal = magnitude < 0x38800000  # below 2^-14 the last bit is worth 2^-24
        scaled = tl.where(is_subnormal, tl.abs(value), 0.0) * 16777216.0
        subnormal = (scaled + fraction.to(tl.float32) * (1.0 / 8192.0)).to(tl.int32).to(tl.uint32)
        normal = (magnitude - 0x38000000 + fraction) >> 13
        rounded = tl.minimum(tl.where(is_subnormal, subnormal, normal), 0x7BFF)
    stored = (rounded | ((bits >> 16) & 0x8000)).to(tl.uint16).to(DTYPE, bitcast=True)
    return tl.where(magnitude < 0x7F800000, stored, round_nearest(value, DTYPE))


@triton.jit
def mix_bits(x):
    """Return lowbias32 of C. Wellons' hash prospector, on uint32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, stream, step):
    """Return the key of a parameter's noise: int64 seed, uint32 stream and step."""
    low = mix_bits(seed.to(tl.uint32) ^ mix_bits(stream))
    high = mix_bits((seed >> 32).to(tl.uint32) ^ mix_bits(step ^ 0xFFFFFFFF))
    return mix_bits(low + high), mix_bits(low ^ (high * 0x9E3779B9))


@triton.jit
def noise_bits(key, begin, offsets):
    """Return 32 random bits for each element ``begin + offsets``.

    ``begin`` (int64) is a multiple of the number of offsets, so they share its upper half.
    """
    first, second = key
    low = mix_bits((begin.to(tl.uint32) + offsets.to(tl.uint32)) ^ first)
    return mix_bits(low + (second + (begin >> 32).to(tl.uint32) * 0x9E3779B9))
