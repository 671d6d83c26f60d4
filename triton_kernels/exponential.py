# mypy: allow-untyped-defs, allow-incomplete-defs
"""exp(x), exp(x) - 1, log(x) and log(1 + x): ``csrc/core/exponential.h`` in Triton.

``tl.exp`` is not accurate enough: its error grows with the argument, and exp(x) - 1 cancels at 0,
as does log(1 + x).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _reduce_exp(x, low=None):
    """Return ``scale = 2^n`` and ``exp(r) - 1``, where x + low is ``n ln 2 + r``, in float32.

    Below -87.7 the scale is 0.
    """
    x = tl.where(x < -88.0, -88.0, x)
    x = tl.where(x > 88.0, 88.0, x)
    # Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    shifted = x * 1.44269504 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693145752) - n * 1.42860677e-6  # ln 2 in two parts
    if low is not None:
        r += low
    p = 1.38144671e-3 * r + 8.36878041e-3
    p = p * r + 4.16683942e-2
    p = p * r + 1.66665201e-1
    p = p * r + 4.99999934e-1
    exponent = (shifted.to(tl.uint32, bitcast=True) + 127) << 23
    return exponent.to(tl.float32, bitcast=True), p * r * r + r


@triton.jit
def exp_of(x, low=None):
    """Return exp(x + low), |low| < 0.1; in float32 it is 0 below -87.7 and infinity above 88."""
    if x.dtype.is_fp64():
        if low is not None:
            x += low
        return tl.exp(x)
    else:
        scale, expm1_r = _reduce_exp(x, low)
        return tl.where(x > 88.0, float("inf"), scale * expm1_r + scale)


@triton.jit
def expm1_of(x):
    """Return exp(x) - 1 for x up to 0."""
    if x.dtype.is_fp64():
        x = tl.where(x < -40.0, -40.0, x)  # exp(-40) is less than half of the last bit of 1
        # W. Kahan: log(exp(x)) has the error of the rounded exp(x), and the quotient loses it.
        u = tl.exp(x)
        return tl.where(u == 1.0, x, (u - 1.0) * (x / tl.log(u)))
    else:
        scale, expm1_r = _reduce_exp(x)
        return scale * expm1_r + (scale - 1.0)


@triton.jit
def log1p_of(x):
    """Return log(1 + x) for x from 0, in float32 to 1."""
    if x.dtype.is_fp64():
        # W. Kahan, as above.
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
    else:
        # Without the division of csrc/core: the polynomial of least relative error, 5e-9.
        p = -3.24401190e-3 * x + 1.98513996e-2
        p = p * x - 5.69594130e-2
        p = p * x + 1.06036417e-1
        p = p * x - 1.53055847e-1
        p = p * x + 1.96759358e-1
        p = p * x - 2.49541327e-1
        p = p * x + 3.33299637e-1
        p = p * x - 4.99999017e-1
        return p * x * x + x


@triton.jit
def log_parts(x):
    """Return two numbers whose sum is log(x), in float32 of a normal x the first without error."""
    if x.dtype.is_fp64():
        return tl.log(x), tl.zeros_like(x)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
        exponent = ((bits >> 23).to(tl.int32) - 127).to(tl.float32)
        # ln 2 in two parts; the product with the first is exact.
        return exponent * 0.693145752, exponent * 1.42860677e-6 + log1p_of(mantissa - 1.0)


@triton.jit
def log_of(x):
    """Return log(x) of a normal x; the error is below 2e-7 + 1e-7 abs(log(x)) in float32."""
    high, low = log_parts(x)
    return high + low


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + exp_of(-x))
