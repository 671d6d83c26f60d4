# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels of tensor statistics are made of: tiles, pilots and histograms.

The formula is that of ``csrc/core/activation_stats.h``; tiles are those of
:mod:`.batch_norm_relu_blocks`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .batch_norm_relu_blocks import elements_of, locate_tile
from .multi_tensor import NARROW_BLOCK
from .rounding import widen

NUM_BUCKETS = tl.constexpr(4096)
SIGN_BUCKET = tl.constexpr(2048)  # the first of negative values
FIRST_NON_FINITE_BUCKET = tl.constexpr(255 << 3)  # of either sign

# Buckets counted without atomics: for each sign zero and the 63 up to the largest magnitude of the
# first tile, eight octaves. Of normal values they hold 99 %.
WINDOW = tl.constexpr(64)


# --- reductions of tiles ---


@triton.jit
def _reduce(value, AXIS: tl.constexpr, OP: tl.constexpr):
    if OP == "min":
        return tl.min(value, AXIS)
    elif OP == "max":
        return tl.max(value, AXIS)
    else:
        return tl.sum(value, AXIS)


@triton.jit
def to_lanes(value, OP: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr):
    """Reduce the elements that one thread has loaded, so that accumulators take few registers."""
    LOADS: tl.constexpr = value.numel // (LANES * VEC)
    parts = tl.reshape(value, (LOADS, LANES, VEC))
    return _reduce(_reduce(parts, 2, OP), 0, OP)


@triton.jit
def by_threads(value, VEC: tl.constexpr):
    """Return the elements in a row, one of each thread, then the next of each: none has to move."""
    parts = tl.reshape(value, (value.numel // (NARROW_BLOCK * VEC), NARROW_BLOCK, VEC))
    return tl.reshape(tl.permute(parts, (0, 2, 1)), (value.numel,))


@triton.jit
def to_channels(value, OP: tl.constexpr, WIDTH: tl.constexpr):
    """Reduce lanes or a tile to one value for each of ``WIDTH`` channels."""
    return _reduce(tl.reshape(value, (value.numel // WIDTH, WIDTH)), 0, OP)


@triton.jit
def load_tile(
    input_ptr,
    index,
    part,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return elements, NaN beyond the tensor, which of them are finite and how many are beyond."""
    tile = locate_tile(index, part, CHANNELS_LAST, VEC, ROWS, COLS)
    offsets, mask = elements_of(tile, part, ROWS, COLS)
    x = widen(tl.load(input_ptr + offsets, mask=mask, other=float("nan")), OPMATH)
    _, _, rows_left, cols_left = tile
    if CHANNELS_LAST:
        beyond = ROWS - rows_left
    else:
        beyond = ROWS * COLS - rows_left * tl.minimum(cols_left, COLS)
    return x, tl.abs(x) < float("inf"), beyond


# --- what a program knows before it adds ---


@triton.jit
def first_values(
    input_ptr,
    part,
    begin,
    end,
    inside,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return mean, minimum and maximum of the first tile with finite values, or zeros.

    A share p of the values has its mean within ``sqrt(1 / p - 1)`` standard deviations of theirs,
    in whatever order they are: a tile of a program is a good pilot, a few elements may be none.
    """
    count = tl.zeros((WIDTH,), tl.int32)
    total = tl.zeros((WIDTH,), tl.float64)
    low = tl.full((WIDTH,), float("inf"), OPMATH)
    high = tl.full((WIDTH,), float("-inf"), OPMATH)
    index = begin
    missing = begin < end
    while missing:
        x, finite, _ = load_tile(input_ptr, index, part, OPMATH, CHANNELS_LAST, VEC, ROWS, COLS)
        count += to_channels(finite.to(tl.int32), "sum", WIDTH)
        total += to_channels(tl.where(finite, x, 0.0).to(tl.float64), "sum", WIDTH)
        low = tl.minimum(low, to_channels(tl.where(finite, x, float("inf")), "min", WIDTH))
        high = tl.maximum(high, to_channels(tl.where(finite, x, float("-inf")), "max", WIDTH))
        index += 1
        missing = (index < end) & (tl.max((inside & (count == 0)).to(tl.int32), 0) > 0)
    some = count > 0
    mean = (total / tl.maximum(count, 1).to(tl.float64)).to(OPMATH)
    # A pilot within the extremes can stand for masked elements, as it changes neither.
    mean = tl.minimum(tl.maximum(mean, low), high)
    return tl.where(some, mean, 0.0), tl.where(some, low, 0.0), tl.where(some, high, 0.0)


@triton.constexpr_function
def fits_unscaled(DTYPE):
    """Whether fourth powers need no scale: those of float16 fit in float32 as they are."""
    return DTYPE.is_fp16() or DTYPE.is_fp64()


@triton.jit
def scale_for(spread, DTYPE: tl.constexpr):
    """Return the power of two that brings a spread to about 1: a gradient's d^4 may underflow."""
    if fits_unscaled(DTYPE):
        return tl.full(spread.shape, 1.0, spread.dtype)
    else:
        exponent = spread.to(tl.int32, bitcast=True) >> 23
        exponent = tl.where(spread > 0, tl.minimum(tl.maximum(exponent, 1), 253), 127)
        return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


# --- the histogram ---


@triton.jit
def _bucket_of(x):
    return (x.to(tl.float32).to(tl.int32, bitcast=True) >> 20) & (NUM_BUCKETS - 1)


@triton.jit
def window_base(low, high):
    """Return the number of the bucket below the window, the same for both signs."""
    top = _bucket_of(tl.maximum(tl.abs(low), tl.abs(high)))
    return tl.maximum((top | 7) - (WINDOW - 1), 0)


@triton.jit
def count_buckets(window, row_ptr, x, finite, base, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr):
    """Return the window with a tile added to it; what is outside goes to its row at once."""
    bucket = _bucket_of(x)
    finite = finite & ((bucket & (SIGN_BUCKET - 1)) < FIRST_NON_FINITE_BUCKET)  # as a float
    if CHANNELS_LAST:
        bucket += tl.arange(0, x.shape[1])[None, :] * NUM_BUCKETS
        outside = tl.where(finite, bucket, -1)
    else:
        magnitude = bucket & (SIGN_BUCKET - 1)
        place = tl.where(magnitude == 0, 0, magnitude - base[None, :])
        fits = (place < WINDOW) & ((place > 0) | (magnitude == 0)) & finite
        outside = tl.where(finite & (fits == 0), bucket, -1)
    # The histogram takes the most registers: it is last, when the addresses are out of the way.
    outside = by_threads(outside, VEC)
    one = tl.full(outside.shape, 1, tl.int64)
    tl.atomic_add(row_ptr + outside, one, mask=outside >= 0, sem="relaxed")
    if not CHANNELS_LAST:
        place = tl.where(fits, place + bucket // SIGN_BUCKET * WINDOW, -1)
        place = by_threads(place, VEC)
        window += tl.histogram(place, 2 * WINDOW, mask=place >= 0)
    return window


@triton.jit
def flush_window(window, row_ptr, base):
    """Add the window to the row."""
    place = tl.arange(0, 2 * WINDOW) % WINDOW
    sign = tl.arange(0, 2 * WINDOW) // WINDOW
    bucket = tl.where(place == 0, 0, base + place) + sign * SIGN_BUCKET
    tl.atomic_add(row_ptr + bucket, window.to(tl.int64), mask=window > 0, sem="relaxed")
