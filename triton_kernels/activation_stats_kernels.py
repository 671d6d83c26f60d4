# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of tensor statistics; :mod:`.activation_stats` launches them.

The tiles of a channel are split among programs. A lane adds a few elements in float32 about a pilot
near the mean, scaled by a power of two; from there on everything is float64 at fixed places,
bitwise the same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_stats_blocks import (
    NUM_BUCKETS,
    WINDOW,
    count_buckets,
    first_values,
    fits_unscaled,
    flush_window,
    load_tile,
    scale_for,
    to_channels,
    to_lanes,
    window_base,
)
from .batch_norm_relu_blocks import channels_of, part_of, promise_vectors, tile_range, wide_pointer
from .multi_tensor import NARROW_BLOCK, locate_chunk

NUM_MOMENTS = tl.constexpr(8)
NUM_COUNTS = tl.constexpr(5)

# Sums of fourth powers below it may have lost terms below 2^-126.
SMALLEST_SAFE_SUM = tl.constexpr(2.0**-88)

MERGED_SPLITS = tl.constexpr(128)  # at a time

EVEN_FIELDS = tl.constexpr(0x1F | 0x1F << 10 | 0x1F << 20)  # of five bits

SIZES = ["first_tensor", "end_tensor", "first_program", "num_tensors", "num_partials"]
BUFFERS = ["table_ptr", "armed_ptr", "partials_ptr", "moments_ptr", "counts_ptr", "histogram_ptr"]


# --- sums of a program ---


@triton.jit
def _add_tiles(
    input_ptr,
    row_ptr,
    part,
    begin,
    end,
    pilot,
    scale,
    base,
    OPMATH: tl.constexpr,
    L1_DTYPE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return for each channel the sums of powers, sum of magnitudes, extremes and counts.

    A lane takes less than 32 elements of a tile and less than 1024 in all: six counts of five bits
    share an integer, and then three of ten bits.
    """
    WIDTH: tl.constexpr = COLS if CHANNELS_LAST else 1
    LANE_VEC: tl.constexpr = 1 if CHANNELS_LAST else VEC
    LANES: tl.constexpr = NARROW_BLOCK * (2 if CHANNELS_LAST else 1)
    s1 = tl.zeros((LANES,), OPMATH)
    s2 = tl.zeros((LANES,), OPMATH)
    s3 = tl.zeros((LANES,), OPMATH)
    s4 = tl.zeros((LANES,), OPMATH)
    l1 = tl.zeros((LANES,), L1_DTYPE)
    low = tl.full((LANES,), float("inf"), OPMATH)
    high = tl.full((LANES,), float("-inf"), OPMATH)
    finite_counts = tl.zeros((LANES,), tl.int32)
    other_counts = tl.zeros((LANES,), tl.int32)
    window = tl.zeros((2 * WINDOW,), tl.int32)
    num_beyond = 0
    center = pilot[None, :]
    factor = scale[None, :]
    offset = -center * factor
    for index in range(begin, end):
        x, finite, beyond = load_tile(
            input_ptr, index, part, OPMATH, CHANNELS_LAST, VEC, ROWS, COLS
        )
        if row_ptr is not None:
            window = count_buckets(window, row_ptr, x, finite, base, CHANNELS_LAST, VEC)
        num_beyond += beyond
        finite_kind = tl.where(x == 0, 1 + (1 << 10), tl.where(x < 0, 1 + (1 << 20), 1))
        other_kind = tl.where(x > 0, 1 << 15, tl.where(x < 0, 1 << 25, 1 << 5))
        kinds = to_lanes(tl.where(finite, finite_kind, other_kind), "sum", LANES, LANE_VEC)
        finite_counts += kinds & EVEN_FIELDS
        other_counts += (kinds >> 5) & EVEN_FIELDS
        magnitude = tl.where(finite, tl.abs(x), 0.0).to(L1_DTYPE)
        l1 += to_lanes(magnitude, "sum", LANES, LANE_VEC)
        value = tl.where(finite, x, center)
        low = tl.minimum(low, to_lanes(value, "min", LANES, LANE_VEC))
        high = tl.maximum(high, to_lanes(value, "max", LANES, LANE_VEC))
        d = tl.fma(value, factor, offset)  # exact before its rounding, as x - pilot is
        d2 = d * d
        s1 += to_lanes(d, "sum", LANES, LANE_VEC)
        s2 += to_lanes(d2, "sum", LANES, LANE_VEC)
        s3 += to_lanes(d2 * d, "sum", LANES, LANE_VEC)
        s4 += to_lanes(d2 * d2, "sum", LANES, LANE_VEC)
    if row_ptr is not None and not CHANNELS_LAST:
        flush_window(window, row_ptr, base)
    sums = (
        to_channels(s1.to(tl.float64), "sum", WIDTH),
        to_channels(s2.to(tl.float64), "sum", WIDTH),
        to_channels(s3.to(tl.float64), "sum", WIDTH),
        to_channels(s4.to(tl.float64), "sum", WIDTH),
        to_channels(l1.to(tl.float64), "sum", WIDTH),
    )
    low = to_channels(low, "min", WIDTH).to(tl.float64)
    high = to_channels(high, "max", WIDTH).to(tl.float64)
    counts = (
        to_channels(finite_counts & 1023, "sum", WIDTH),
        to_channels((finite_counts >> 10) & 1023, "sum", WIDTH),
        to_channels(finite_counts >> 20, "sum", WIDTH),
        to_channels(other_counts & 1023, "sum", WIDTH) - num_beyond,
        to_channels((other_counts >> 10) & 1023, "sum", WIDTH),
        to_channels(other_counts >> 20, "sum", WIDTH),
    )
    return sums, (low, high), counts


@triton.jit
def _is_lost(sums, extremes, DTYPE: tl.constexpr):
    """Whether sums in float32 have overflowed or come close to underflow in any channel."""
    if fits_unscaled(DTYPE):
        return False
    else:
        _, _, _, s4, l1 = sums
        low, high = extremes
        fits = (s4 + l1 < float("inf")) & ((s4 > SMALLEST_SAFE_SUM) | (low == high))
        return tl.min(fits.to(tl.int32), 0) == 0


@triton.jit
def _moments_of(sums, extremes, count, pilot, unscale):
    """Return ``Moments``, from sums of powers of ``(x - pilot) / unscale``."""
    s1, s2, s3, s4, l1 = sums
    low, high = extremes
    d = s1 / tl.maximum(count, 1.0)
    m2 = s2 - count * d * d
    m3 = s3 - 3 * d * s2 + 2 * count * d * d * d
    m4 = s4 - 4 * d * s3 + 6 * d * d * s2 - 3 * count * d * d * d * d
    m2 = tl.where(m2 > 0, m2, 0.0) * unscale * unscale  # rounding
    m3 = m3 * unscale * unscale * unscale
    m4 = tl.where(m4 > 0, m4, 0.0) * unscale * unscale * unscale * unscale
    low = tl.where(count > 0, low, float("inf"))
    high = tl.where(count > 0, high, float("-inf"))
    return count, pilot + d * unscale, m2, m3, m4, l1, low, high


# --- kernels ---


@triton.jit
def _is_armed(armed_ptr):
    if armed_ptr is None:
        return True
    else:
        return tl.load(armed_ptr) != 0


@triton.jit
def _load_tensor(table_ptr, num_tensors, tensor):
    """Return first partial, first row, address, shape and splits; before them are first numbers."""
    pointer = table_ptr + tensor
    return (
        tl.load(pointer + 2 * num_tensors),
        tl.load(pointer + 3 * num_tensors),
        tl.load(pointer + 4 * num_tensors),
        (
            tl.load(pointer + 5 * num_tensors),
            tl.load(pointer + 6 * num_tensors),
            tl.load(pointer + 7 * num_tensors),
        ),
        tl.load(pointer + 8 * num_tensors),
        tl.load(pointer + 9 * num_tensors),
    )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BUFFERS)
def sum_kernel(
    table_ptr,
    armed_ptr,
    partials_ptr,  # [NUM_MOMENTS + NUM_COUNTS, num_partials]
    histogram_ptr,
    first_tensor,
    end_tensor,
    first_program,
    num_tensors,
    num_partials: tl.int64,
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write moments and counts of each split of each channel; add to the histogram."""
    if _is_armed(armed_ptr):
        tensor, index, _ = locate_chunk(
            table_ptr,
            table_ptr,
            first_program + tl.program_id(0),
            first_tensor,
            end_tensor,
            CHUNK=1,
        )
        first_partial, first_row, address, shape, num_splits, tiles_per_split = _load_tensor(
            table_ptr, num_tensors, tensor
        )
        block = index // num_splits
        split = index % num_splits
        outer, channels, inner = shape
        channels, inner = promise_vectors(channels, inner, CHANNELS_LAST, VEC)
        first, num_rows, width, stride = part_of(outer, channels, inner, block, CHANNELS_LAST, COLS)
        part = (0, num_rows, width, stride)
        _, inside = channels_of(channels, block, CHANNELS_LAST, COLS)
        begin, end = tile_range(part, split, tiles_per_split, ROWS, COLS)
        input_ptr = wide_pointer(address.to(tl.pointer_type(DTYPE)), VEC) + first
        WIDTH: tl.constexpr = COLS if CHANNELS_LAST else 1
        partials_row_ptr = partials_ptr + (first_partial + split * channels + block * WIDTH)
        pilot, low, high = first_values(
            input_ptr, part, begin, end, inside, OPMATH, CHANNELS_LAST, VEC, ROWS, COLS, WIDTH
        )
        scale = scale_for(high - low, DTYPE)
        row_ptr = histogram_ptr
        if histogram_ptr is not None:
            row_ptr = histogram_ptr + (first_row + block * WIDTH) * NUM_BUCKETS
        base = window_base(low, high)
        sums, extremes, counts = _add_tiles(
            input_ptr,
            row_ptr,
            part,
            begin,
            end,
            pilot,
            scale,
            base,
            OPMATH,
            OPMATH,
            CHANNELS_LAST,
            VEC,
            ROWS,
            COLS,
        )
        if _is_lost(sums, extremes, DTYPE):
            # The first tile is smaller or larger by far: the scale has to be of them all.
            scale = scale_for((extremes[1] - extremes[0]).to(OPMATH), DTYPE)
            sums, extremes, counts = _add_tiles(
                input_ptr,
                None,
                part,
                begin,
                end,
                pilot,
                scale,
                base,
                OPMATH,
                tl.float64,
                CHANNELS_LAST,
                VEC,
                ROWS,
                COLS,
            )
        count = counts[0].to(tl.float64)
        unscale = 1.0 / scale.to(tl.float64)
        results = _moments_of(sums, extremes, count, pilot.to(tl.float64), unscale) + counts[1:]
        pointer = partials_row_ptr + tl.arange(0, WIDTH)
        for i in tl.static_range(NUM_MOMENTS + NUM_COUNTS):
            tl.store(pointer + i * num_partials, results[i].to(tl.float64), mask=inside)


@triton.jit
def _load_moments(pointer, stride, mask):
    return (
        tl.load(pointer, mask=mask, other=0.0),
        tl.load(pointer + stride, mask=mask, other=0.0),
        tl.load(pointer + 2 * stride, mask=mask, other=0.0),
        tl.load(pointer + 3 * stride, mask=mask, other=0.0),
        tl.load(pointer + 4 * stride, mask=mask, other=0.0),
        tl.load(pointer + 5 * stride, mask=mask, other=0.0),
        tl.load(pointer + 6 * stride, mask=mask, other=float("inf")),
        tl.load(pointer + 7 * stride, mask=mask, other=float("-inf")),
    )


@triton.jit
def _about(center, moments):
    """Return the sums of powers of ``x - center``."""
    count, mean, m2, m3, m4, _, _, _ = moments
    d = tl.where(count > 0, mean - center, 0.0)
    d2 = d * d
    about3 = m3 + 3 * d * m2 + count * d2 * d
    about4 = m4 + 4 * d * m3 + 6 * d2 * m2 + count * d2 * d2
    return m2 + count * d2, about3, about4


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BUFFERS)
def merge_kernel(
    table_ptr,
    armed_ptr,
    partials_ptr,
    moments_ptr,
    counts_ptr,
    num_tensors,
    num_partials: tl.int64,
):
    """Merge the splits of one channel into its row, about the mean of them all."""
    if _is_armed(armed_ptr):
        tensor, channel, _ = locate_chunk(
            table_ptr + num_tensors, table_ptr, tl.program_id(0), 0, num_tensors, CHUNK=1
        )
        first_partial, first_row, _, shape, num_splits, _ = _load_tensor(
            table_ptr, num_tensors, tensor
        )
        channels = shape[1]
        first_ptr = partials_ptr + first_partial + channel
        row_ptr = moments_ptr + (first_row + channel) * NUM_MOMENTS
        row_counts_ptr = counts_ptr + (first_row + channel) * NUM_COUNTS
        row = _load_moments(row_ptr, 1, True)
        count, total, _, _, _, l1, low, high = row
        total *= count
        for start in range(0, num_splits, MERGED_SPLITS):
            split = start + tl.arange(0, MERGED_SPLITS)
            pointer = first_ptr + split * channels
            piece = _load_moments(pointer, num_partials, split < num_splits)
            count += tl.sum(piece[0], 0)
            total += tl.sum(piece[0] * piece[1], 0)
            low = tl.minimum(low, tl.min(piece[6], 0))
            high = tl.maximum(high, tl.max(piece[7], 0))
        # Rounding must not move the mean of equal values.
        mean = tl.minimum(tl.maximum(total / tl.maximum(count, 1.0), low), high)
        mean = tl.where(count > 0, mean, 0.0)
        m2, m3, m4 = _about(mean, row)
        for start in range(0, num_splits, MERGED_SPLITS):
            split = start + tl.arange(0, MERGED_SPLITS)
            pointer = first_ptr + split * channels
            piece = _load_moments(pointer, num_partials, split < num_splits)
            about2, about3, about4 = _about(mean, piece)
            m2 += tl.sum(about2, 0)
            m3 += tl.sum(about3, 0)
            m4 += tl.sum(about4, 0)
            l1 += tl.sum(piece[5], 0)
        results = (count, mean, m2, m3, m4, l1, low, high)
        for i in tl.static_range(NUM_MOMENTS):
            tl.store(row_ptr + i, results[i])
        for i in tl.static_range(NUM_COUNTS):
            number = tl.load(row_counts_ptr + i)
            for start in range(0, num_splits, MERGED_SPLITS):
                split = start + tl.arange(0, MERGED_SPLITS)
                pointer = first_ptr + (NUM_MOMENTS + i) * num_partials + split * channels
                piece = tl.load(pointer, mask=split < num_splits, other=0.0)
                number += tl.sum(piece.to(tl.int64), 0)
            tl.store(row_counts_ptr + i, number)
