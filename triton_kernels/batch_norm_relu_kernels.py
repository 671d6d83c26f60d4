# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of BatchNorm with activation; :mod:`.batch_norm_relu` launches them.

The tiles of a channel are split among programs. A lane adds a few elements in float32; from there
on sums are float64 at fixed places, bitwise the same from run to run. Sums of the backward pass are
about the rounded mean, so that they need no pilot.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .batch_norm_relu_blocks import (
    FINISH_CHANNELS,
    activate,
    activation_grad,
    channels_of,
    combine_partials,
    elements_of,
    is_positive,
    keeps_grad,
    load_input_grad,
    load_normalizer,
    load_pilot,
    load_statistics,
    load_values,
    locate_tile,
    mask_bytes_of,
    mask_part_of,
    narrow,
    normalize,
    part_of,
    promise_vectors,
    store_partials,
    store_statistics,
    store_sums,
    store_values,
    sum_tile,
    tile_range,
    wide_pointer,
)
from .rounding import widen

# Rows of whole vectors are promised by VEC: nothing else is gained from the values of these.
SIZES = ["batch", "channels", "spatial", "tiles_per_split", "num_splits"]


@triton.jit(do_not_specialize=SIZES)
def moments_kernel(
    input_ptr,
    partials_ptr,  # [2 * num_splits + 1, channels]: both sums of each split, then the pilot
    batch: tl.int64,
    channels: tl.int64,
    spatial: tl.int64,
    tiles_per_split: tl.int64,
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the sums of ``x - pilot`` and of its square."""
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    channels, spatial = promise_vectors(channels, spatial, CHANNELS_LAST, VEC)
    part = part_of(batch, channels, spatial, block, CHANNELS_LAST, COLS)
    channel, inside = channels_of(channels, block, CHANNELS_LAST, COLS)
    pilot = load_pilot(input_ptr, channel, inside, batch, channels, spatial, CHANNELS_LAST, OPMATH)
    tile_pilot = pilot[None, :] if CHANNELS_LAST else pilot
    input_ptr = wide_pointer(input_ptr, VEC)
    total = tl.zeros((ROWS, COLS), OPMATH)
    squares = tl.zeros((ROWS, COLS), OPMATH)
    begin, end = tile_range(part, split, tiles_per_split, ROWS, COLS)
    for index in range(begin, end):
        tile = locate_tile(index, part, CHANNELS_LAST, VEC, ROWS, COLS)
        offsets, mask = elements_of(tile, part, ROWS, COLS)
        x = widen(tl.load(input_ptr + offsets, mask=mask, other=0), OPMATH)
        shifted = tl.where(mask, x - tile_pilot, 0.0)
        total += shifted
        squares += shifted * shifted
    store_partials(partials_ptr, split, total, squares, channel, inside, channels, CHANNELS_LAST)
    if split == 0:
        pilot_ptr = partials_ptr + 2 * tl.num_programs(1) * channels
        tl.store(pilot_ptr + channel, pilot.to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def finish_moments_kernel(
    partials_ptr,
    sums_ptr,
    saved_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    channels: tl.int64,
    num_splits: tl.int64,
    count: tl.float64,
    momentum: tl.float64,
    eps: tl.float64,
    PHASE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """Turn partials into sums about zero to "reduce", and partials or such sums into statistics."""
    channel = tl.program_id(0).to(tl.int64) * FINISH_CHANNELS + tl.arange(0, FINISH_CHANNELS)
    inside = channel < channels
    if PHASE == "finish":
        pilot = tl.zeros((FINISH_CHANNELS,), tl.float64)
        total = tl.load(sums_ptr + channel, mask=inside, other=0.0)
        squares = tl.load(sums_ptr + channels + channel, mask=inside, other=0.0)
        count = tl.load(sums_ptr + 2 * channels + tl.zeros_like(channel))
    else:
        pilot_ptr = partials_ptr + 2 * num_splits * channels
        pilot = tl.load(pilot_ptr + channel, mask=inside, other=0.0)
        total, squares = combine_partials(partials_ptr, num_splits, channel, inside, channels)
    if PHASE == "reduce":
        squares += pilot * (2.0 * total + pilot * count)
        store_sums(sums_ptr, channel, inside, channels, total + pilot * count, squares, count)
    else:
        offset = total / count
        variance = squares / count - offset * offset
        variance = tl.where(variance < 0, 0.0, variance)  # NaN stays
        store_statistics(saved_ptr, channel, inside, channels, pilot, offset, variance, eps)
        if running_mean_ptr is not None:
            if CUMULATIVE:
                # normalize_kernel writes it: another program may not have read it yet.
                momentum = 1.0 / (tl.load(num_batches_tracked_ptr) + 1).to(tl.float64)
            some = inside & (count > 0)  # not so if the batches of all ranks are empty
            mean = load_values(running_mean_ptr, channel, inside, 0.0, tl.float64)
            mean = (1.0 - momentum) * mean + momentum * (pilot + offset)
            store_values(running_mean_ptr, channel, mean, some)
            var = load_values(running_var_ptr, channel, inside, 0.0, tl.float64)
            unbiased = variance * count / (count - 1.0)
            var = (1.0 - momentum) * var + momentum * unbiased
            store_values(running_var_ptr, channel, var, some)


@triton.jit(do_not_specialize=SIZES)
def normalize_kernel(
    input_ptr,
    residual_ptr,
    output_ptr,
    mask_ptr,
    dead_ptr,
    saved_ptr,
    weight_ptr,
    bias_ptr,
    running_mean_ptr,
    running_var_ptr,
    num_batches_tracked_ptr,
    batch: tl.int64,
    channels: tl.int64,
    spatial: tl.int64,
    tiles_per_split: tl.int64,
    eps: tl.float64,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the output, from the back: what was read last for the moments is still in L2."""
    block = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    split = tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1)
    channels, spatial = promise_vectors(channels, spatial, CHANNELS_LAST, VEC)
    part = part_of(batch, channels, spatial, block, CHANNELS_LAST, COLS)
    mask_part = mask_part_of(channels, spatial, block, CHANNELS_LAST, COLS)
    channel, inside = channels_of(channels, block, CHANNELS_LAST, COLS)
    if TRAINING:
        statistics = load_statistics(saved_ptr, channel, inside, channels)
    else:
        mean = load_values(running_mean_ptr, channel, inside, 0.0, tl.float64)
        variance = load_values(running_var_ptr, channel, inside, 1.0, tl.float64)
        written = tl.where(split == 0, inside, False)
        statistics = store_statistics(
            saved_ptr, channel, written, channels, mean, tl.zeros_like(mean), variance, eps
        )
    mean, scale, shift = load_normalizer(statistics, weight_ptr, bias_ptr, channel, inside, OPMATH)
    input_ptr = wide_pointer(input_ptr, VEC)
    residual_ptr = None if residual_ptr is None else wide_pointer(residual_ptr, VEC)
    output_ptr = wide_pointer(output_ptr, VEC)
    dead = tl.zeros((ROWS, COLS), tl.int32)
    begin, end = tile_range(part, split, tiles_per_split, ROWS, COLS)
    for index in range(begin, end):
        tile = locate_tile(index, part, CHANNELS_LAST, VEC, ROWS, COLS)
        offsets, mask = elements_of(tile, part, ROWS, COLS)
        x = widen(tl.load(input_ptr + offsets, mask=mask, other=0), OPMATH)
        z = normalize(x - mean, scale, shift)
        if residual_ptr is not None:
            z += widen(tl.load(residual_ptr + offsets, mask=mask, other=0), OPMATH)
        positive = is_positive(z, DTYPE)
        y = activate(z, positive, ACTIVATION, NEGATIVE_SLOPE)
        tl.store(output_ptr + offsets, narrow(y, DTYPE), mask=mask)
        if mask_ptr is not None:
            bits = (keeps_grad(z, positive, ACTIVATION) & mask).to(tl.int32)
            octets = tl.reshape(bits, (ROWS, COLS // 8, 8))
            byte = tl.sum(octets << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)
            byte_offsets, byte_mask = mask_bytes_of(tile, mask_part, ROWS, COLS)
            tl.store(mask_ptr + byte_offsets, byte, mask=byte_mask)
        if dead_ptr is not None:
            dead += mask.to(tl.int32) - (positive & mask).to(tl.int32)
    if dead_ptr is not None:
        count = sum_tile(dead, CHANNELS_LAST).to(tl.int64)
        tl.atomic_add(dead_ptr + channel, count, mask=inside, sem="relaxed")
    if num_batches_tracked_ptr is not None:
        num_batches = tl.load(num_batches_tracked_ptr) + 1
        tl.store(num_batches_tracked_ptr, num_batches, mask=block + split == 0)


# --- backward ---


@triton.jit
def _load_gradient(
    grad_output_ptr,
    residual_ptr,
    mask_ptr,
    z,
    tile,
    part,
    mask_part,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return the gradient of z + residual for a tile."""
    offsets, mask = elements_of(tile, part, ROWS, COLS)
    grad = widen(tl.load(grad_output_ptr + offsets, mask=mask, other=0), z.dtype)
    if mask_ptr is not None:
        byte_offsets, byte_mask = mask_bytes_of(tile, mask_part, ROWS, COLS)
        byte = tl.load(mask_ptr + byte_offsets, mask=byte_mask, other=0).to(tl.int32)
        bits = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
        kept = tl.reshape(bits, (ROWS, COLS)) != 0
    else:
        if residual_ptr is not None:
            z += widen(tl.load(residual_ptr + offsets, mask=mask, other=0), z.dtype)
        kept = keeps_grad(z, is_positive(z, DTYPE), ACTIVATION)
    return activation_grad(z, kept, grad, ACTIVATION, NEGATIVE_SLOPE)


@triton.jit(do_not_specialize=SIZES)
def grad_sums_kernel(
    grad_output_ptr,
    input_ptr,
    residual_ptr,
    mask_ptr,
    saved_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,  # [2 * num_splits, channels]: both sums of each split
    batch: tl.int64,
    channels: tl.int64,
    spatial: tl.int64,
    tiles_per_split: tl.int64,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the sums of ``g`` and of ``g * (x - mean)``."""
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    channels, spatial = promise_vectors(channels, spatial, CHANNELS_LAST, VEC)
    part = part_of(batch, channels, spatial, block, CHANNELS_LAST, COLS)
    mask_part = mask_part_of(channels, spatial, block, CHANNELS_LAST, COLS)
    channel, inside = channels_of(channels, block, CHANNELS_LAST, COLS)
    statistics = load_statistics(saved_ptr, channel, inside, channels)
    mean, scale, shift = load_normalizer(statistics, weight_ptr, bias_ptr, channel, inside, OPMATH)
    grad_output_ptr = wide_pointer(grad_output_ptr, VEC)
    input_ptr = wide_pointer(input_ptr, VEC)
    residual_ptr = None if residual_ptr is None else wide_pointer(residual_ptr, VEC)
    total = tl.zeros((ROWS, COLS), OPMATH)
    products = tl.zeros((ROWS, COLS), OPMATH)
    begin, end = tile_range(part, split, tiles_per_split, ROWS, COLS)
    for index in range(begin, end):
        tile = locate_tile(index, part, CHANNELS_LAST, VEC, ROWS, COLS)
        offsets, mask = elements_of(tile, part, ROWS, COLS)
        centered = widen(tl.load(input_ptr + offsets, mask=mask, other=0), OPMATH) - mean
        g = _load_gradient(
            grad_output_ptr,
            residual_ptr,
            mask_ptr,
            normalize(centered, scale, shift),
            tile,
            part,
            mask_part,
            ACTIVATION,
            NEGATIVE_SLOPE,
            DTYPE,
            ROWS,
            COLS,
        )
        total += g
        products += g * centered
    store_partials(partials_ptr, split, total, products, channel, inside, channels, CHANNELS_LAST)


@triton.jit(do_not_specialize=SIZES)
def finish_grad_sums_kernel(
    partials_ptr,
    saved_ptr,
    sums_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    channels: tl.int64,
    num_splits: tl.int64,
    count: tl.float64,
):
    """Write the sums of ``g`` and of ``g`` times the exact ``x - mean``, and what they give."""
    channel = tl.program_id(0).to(tl.int64) * FINISH_CHANNELS + tl.arange(0, FINISH_CHANNELS)
    inside = channel < channels
    sum_g, sum_gx = combine_partials(partials_ptr, num_splits, channel, inside, channels)
    _, mean_low, invstd = load_statistics(saved_ptr, channel, inside, channels)
    sum_gx -= mean_low.to(tl.float64) * sum_g
    store_sums(sums_ptr, channel, inside, channels, sum_g, sum_gx, count)
    store_values(grad_weight_ptr, channel, sum_gx * invstd.to(tl.float64), inside)
    store_values(grad_bias_ptr, channel, sum_g, inside)


@triton.jit(do_not_specialize=SIZES)
def input_grad_kernel(
    grad_output_ptr,
    input_ptr,
    residual_ptr,
    mask_ptr,
    saved_ptr,
    weight_ptr,
    bias_ptr,
    sums_ptr,
    grad_input_ptr,
    grad_residual_ptr,
    batch: tl.int64,
    channels: tl.int64,
    spatial: tl.int64,
    tiles_per_split: tl.int64,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    NEGATIVE_SLOPE: tl.constexpr,
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Write the gradients of input and residual, from the back as :func:`normalize_kernel`."""
    block = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    split = tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1)
    channels, spatial = promise_vectors(channels, spatial, CHANNELS_LAST, VEC)
    part = part_of(batch, channels, spatial, block, CHANNELS_LAST, COLS)
    mask_part = mask_part_of(channels, spatial, block, CHANNELS_LAST, COLS)
    channel, inside = channels_of(channels, block, CHANNELS_LAST, COLS)
    statistics = load_statistics(saved_ptr, channel, inside, channels)
    mean, scale, shift = load_normalizer(statistics, weight_ptr, bias_ptr, channel, inside, OPMATH)
    g_scale, x_scale, x_shift = load_input_grad(
        statistics, weight_ptr, sums_ptr, channel, inside, channels, TRAINING
    )
    grad_output_ptr = wide_pointer(grad_output_ptr, VEC)
    input_ptr = wide_pointer(input_ptr, VEC)
    residual_ptr = None if residual_ptr is None else wide_pointer(residual_ptr, VEC)
    grad_input_ptr = None if grad_input_ptr is None else wide_pointer(grad_input_ptr, VEC)
    grad_residual_ptr = None if grad_residual_ptr is None else wide_pointer(grad_residual_ptr, VEC)
    begin, end = tile_range(part, split, tiles_per_split, ROWS, COLS)
    for index in range(begin, end):
        tile = locate_tile(index, part, CHANNELS_LAST, VEC, ROWS, COLS)
        offsets, mask = elements_of(tile, part, ROWS, COLS)
        centered = widen(tl.load(input_ptr + offsets, mask=mask, other=0), OPMATH) - mean
        g = _load_gradient(
            grad_output_ptr,
            residual_ptr,
            mask_ptr,
            normalize(centered, scale, shift),
            tile,
            part,
            mask_part,
            ACTIVATION,
            NEGATIVE_SLOPE,
            DTYPE,
            ROWS,
            COLS,
        )
        if grad_residual_ptr is not None:
            tl.store(grad_residual_ptr + offsets, narrow(g, DTYPE), mask=mask)
        if grad_input_ptr is not None:
            dx = g * g_scale
            if TRAINING:
                dx += centered * x_scale + x_shift
            tl.store(grad_input_ptr + offsets, narrow(dx, DTYPE), mask=mask)
