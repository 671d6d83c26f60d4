# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels of BatchNorm with activation are made of.

The formula is that of ``csrc/core/batch_norm_relu.h``.

A program reads tiles of ``ROWS`` by ``COLS`` elements. Contiguous: the program has one channel, and
each row of a tile lies in one sample. Channels last: it has ``COLS`` channels, one in each column.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .exponential import exp_of, expm1_of, sigmoid
from .multi_tensor import aligned_pointer
from .rounding import round_nearest, widen

PILOT_ELEMENTS = tl.constexpr(16)
FINISH_CHANNELS = tl.constexpr(4)  # of one program: 32 bytes of a row of partials, a sector of L2
FINISH_SPLITS = tl.constexpr(128)  # whose partials are added at a time

# The interpreter cuts float32 to bfloat16; a GPU rounds, in one instruction.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# --- the formula of one element ---


@triton.jit
def normalize(centered, scale, shift):
    """Return z for ``x - mean``; the multiply-add is explicit: its bits decide the sign."""
    return tl.fma(centered, scale, shift)


@triton.jit
def is_positive(z, DTYPE: tl.constexpr):
    """Whether z is positive once it is rounded; true for NaN, which ReLU passes."""
    # Half of the smallest positive number of the dtype rounds to zero.
    if DTYPE.is_fp16():
        return (z <= 2.0**-25) == 0
    elif DTYPE.is_bf16():
        # As a literal it would be float64, and so would the comparison: float32 holds it subnormal.
        return (z <= tl.full((), 2.0**-134, z.dtype)) == 0
    else:
        return (z <= 0.0) == 0


@triton.jit
def keeps_grad(z, positive, ACTIVATION: tl.constexpr):
    """Whether the gradient stays as it is; at NaN leaky ReLU scales it, as torch does."""
    if ACTIVATION == "leaky_relu":
        return positive & (z == z)
    else:
        return positive


@triton.jit
def activate(z, positive, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """Return the activation of z."""
    if ACTIVATION == "relu":
        return tl.where(positive, z, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(positive, z, z * NEGATIVE_SLOPE)
    elif ACTIVATION == "elu":
        return tl.where(z > 0, z, expm1_of(z))
    elif ACTIVATION == "silu":
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def activation_grad(z, kept, grad, ACTIVATION: tl.constexpr, NEGATIVE_SLOPE: tl.constexpr):
    """Return the gradient of z; z is unused by the activations that need one bit alone."""
    if ACTIVATION == "relu":
        return tl.where(kept, grad, 0.0)  # 0 * inf would be NaN
    elif ACTIVATION == "leaky_relu":
        return tl.where(kept, grad, grad * NEGATIVE_SLOPE)
    elif ACTIVATION == "elu":
        return tl.where(z > 0, grad, grad * exp_of(z))
    elif ACTIVATION == "silu":
        s = sigmoid(z)
        return grad * (s * (1.0 + z * (1.0 - s)))
    else:
        return grad


# --- tiles of elements ---


@triton.jit
def narrow(value, DTYPE: tl.constexpr):
    """Convert to a storage dtype, ties to even."""
    if INTERPRETED:
        return round_nearest(value, DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def wide_pointer(pointer, VEC: tl.constexpr):
    """Return the pointer, with the promise of 16 bytes where there are vectors."""
    if VEC == 1:  # and not if it is None, which a function of Triton 3.6 cannot return
        return pointer
    else:
        return aligned_pointer(pointer.to(tl.int64), pointer.dtype.element_ty)


@triton.jit
def promise_vectors(channels, spatial, CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr):
    """Return both sizes, with the promise to the compiler that rows hold whole vectors."""
    if CHANNELS_LAST:
        return channels // VEC * VEC, spatial
    else:
        return channels, spatial // VEC * VEC


@triton.jit
def part_of(batch, channels, spatial, block, CHANNELS_LAST: tl.constexpr, COLS: tl.constexpr):
    """Return a program's elements: the first, number of rows, width and distance of rows."""
    if CHANNELS_LAST:
        first = block * COLS
        return first, batch * spatial, tl.minimum(channels - first, COLS), channels
    else:
        return block * spatial, batch, spatial, channels * spatial


@triton.jit
def mask_part_of(channels, spatial, block, CHANNELS_LAST: tl.constexpr, COLS: tl.constexpr):
    """Return a program's bytes of the mask: the first, and the distance of rows."""
    if CHANNELS_LAST:
        return block * (COLS // 8), tl.cdiv(channels, 8)
    else:
        row_size = tl.cdiv(spatial, 8)
        return block * row_size, channels * row_size


@triton.jit
def tile_range(part, split, tiles_per_split, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the first tile of a split and the one after its last, in int32."""
    _, num_rows, width, _ = part
    num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(width, COLS)
    begin = split * tiles_per_split
    # A channel with 2^31 tiles would have more than 2^40 elements.
    return begin.to(tl.int32), tl.minimum(begin + tiles_per_split, num_tiles).to(tl.int32)


@triton.jit
def locate_tile(
    index,
    part,
    CHANNELS_LAST: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Return first row and column of a tile, and how many of its rows and columns there are."""
    _, num_rows, width, _ = part
    tiles_per_row = 1 if CHANNELS_LAST else tl.cdiv(width, COLS).to(tl.int32)
    row = (index // tiles_per_row).to(tl.int64) * ROWS
    col = (index % tiles_per_row).to(tl.int64) * COLS
    rows_left = tl.minimum(num_rows - row, ROWS).to(tl.int32)
    cols_left = tl.minimum(width - col, COLS).to(tl.int32)
    return row, col, rows_left, tl.multiple_of(cols_left, VEC)


@triton.jit
def elements_of(tile, part, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the offsets of a tile's elements, and which of them there are."""
    row, col, rows_left, cols_left = tile
    first, _, _, stride = part
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    offsets = (row + rows) * stride + (first + col + cols)
    return offsets, (rows < rows_left) & (cols < cols_left)


@triton.jit
def mask_bytes_of(tile, mask_part, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the offsets of a tile's bytes of the mask, and which of them there are."""
    row, col, rows_left, cols_left = tile
    first, stride = mask_part
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS // 8)[None, :]
    offsets = (row + rows) * stride + (first + col // 8 + cols)
    return offsets, (rows < rows_left) & (cols * 8 < cols_left)


@triton.jit
def sum_tile(value, CHANNELS_LAST: tl.constexpr):
    """Return the sum of each channel of a program."""
    if CHANNELS_LAST:
        return tl.sum(value, 0)
    else:
        return tl.sum(tl.ravel(value), 0, keep_dims=True)


# --- values and sums of channels ---


@triton.jit
def channels_of(channels, block, CHANNELS_LAST: tl.constexpr, COLS: tl.constexpr):
    """Return a program's channels, COLS or one, and which of them there are."""
    LANES: tl.constexpr = COLS if CHANNELS_LAST else 1
    channel = block * LANES + tl.arange(0, LANES)
    return channel, channel < channels


@triton.jit
def load_values(pointer, channel, inside, absent: tl.constexpr, DTYPE: tl.constexpr):
    """Load a value for each channel; it is ``absent`` where there is no tensor."""
    if pointer is None:
        return tl.full(channel.shape, absent, DTYPE)
    else:
        return widen(tl.load(pointer + channel, mask=inside, other=0), DTYPE)


@triton.jit
def store_values(pointer, channel, value, inside):
    """Store a value for each channel, if there is a tensor."""
    if pointer is not None:
        tl.store(pointer + channel, round_nearest(value, pointer.dtype.element_ty), mask=inside)


@triton.jit
def load_normalizer(statistics, weight_ptr, bias_ptr, channel, inside, OPMATH: tl.constexpr):
    """Return mean, scale and shift of :func:`normalize`, in the same bits wherever it is called."""
    mean, mean_low, invstd = statistics
    scale = invstd * load_values(weight_ptr, channel, inside, 1.0, OPMATH)
    shift = tl.fma(-mean_low, scale, load_values(bias_ptr, channel, inside, 0.0, OPMATH))
    return mean[None, :], scale[None, :], shift[None, :]


@triton.jit
def load_statistics(saved_ptr, channel, inside, channels):
    """Return mean, mean_low and invstd."""
    mean = tl.load(saved_ptr + channel, mask=inside, other=0.0)
    mean_low = tl.load(saved_ptr + channels + channel, mask=inside, other=0.0)
    invstd = tl.load(saved_ptr + 2 * channels + channel, mask=inside, other=0.0)
    return mean, mean_low, invstd


@triton.jit
def store_statistics(saved_ptr, channel, inside, channels, pilot, offset, variance, eps):
    """Store and return the statistics of mean ``pilot + offset``; all in float64."""
    OPMATH: tl.constexpr = saved_ptr.dtype.element_ty
    exact_mean = pilot + offset
    mean = exact_mean.to(OPMATH)
    # Of an infinite or NaN mean nothing is left over: it has to reach the output as it is.
    rest = tl.where(exact_mean - exact_mean == 0, (pilot - mean.to(tl.float64)) + offset, 0.0)
    mean_low = rest.to(OPMATH)
    invstd = (1.0 / tl.sqrt(variance + eps)).to(OPMATH)
    tl.store(saved_ptr + channel, mean, mask=inside)
    tl.store(saved_ptr + channels + channel, mean_low, mask=inside)
    tl.store(saved_ptr + 2 * channels + channel, invstd, mask=inside)
    tl.store(saved_ptr + 3 * channels + channel, variance.to(OPMATH), mask=inside)
    return mean, mean_low, invstd


@triton.jit
def load_pilot(
    input_ptr,
    channel,
    inside,
    batch,
    channels,
    spatial,
    CHANNELS_LAST: tl.constexpr,
    OPMATH: tl.constexpr,
):
    """Return the mean of the first elements of each channel, of one channel as a scalar."""
    element = tl.arange(0, PILOT_ELEMENTS)
    count = tl.minimum(batch * spatial, PILOT_ELEMENTS)
    if CHANNELS_LAST:
        offsets = element[:, None] * channels + channel[None, :]
        mask = (element[:, None] < count) & inside[None, :]
    else:
        offsets = (element // spatial * channels + channel) * spatial + element % spatial
        mask = element < count
    value = widen(tl.load(input_ptr + offsets, mask=mask, other=0), tl.float64)
    return (tl.sum(value, 0) / tl.maximum(count, 1).to(tl.float64)).to(OPMATH)


@triton.jit
def store_partials(partials_ptr, split, first, second, channel, inside, channels, CHANNELS_LAST):
    """Store both sums of the tiles of a split."""
    pointer = partials_ptr + 2 * split * channels + channel
    tl.store(pointer, sum_tile(first.to(tl.float64), CHANNELS_LAST), mask=inside)
    tl.store(pointer + channels, sum_tile(second.to(tl.float64), CHANNELS_LAST), mask=inside)


@triton.jit
def combine_partials(partials_ptr, num_splits, channel, inside, channels):
    """Return both sums of each channel, added in a fixed order."""
    first = tl.zeros((FINISH_SPLITS, FINISH_CHANNELS), tl.float64)
    second = tl.zeros((FINISH_SPLITS, FINISH_CHANNELS), tl.float64)
    for start in range(0, num_splits, FINISH_SPLITS):
        split = start + tl.arange(0, FINISH_SPLITS)[:, None]
        mask = (split < num_splits) & inside[None, :]
        pointer = partials_ptr + 2 * split * channels + channel[None, :]
        first += tl.load(pointer, mask=mask, other=0.0)
        second += tl.load(pointer + channels, mask=mask, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def store_sums(sums_ptr, channel, inside, channels, first, second, count):
    """Store both sums of each channel, and the number of elements."""
    tl.store(sums_ptr + channel, first, mask=inside)
    tl.store(sums_ptr + channels + channel, second, mask=inside)
    tl.store(sums_ptr + 2 * channels, count, mask=tl.program_id(0) == 0)


@triton.jit
def load_input_grad(
    statistics, weight_ptr, sums_ptr, channel, inside, channels, TRAINING: tl.constexpr
):
    """Return what g and ``x - mean`` are multiplied by for the gradient of x, and its shift."""
    _, mean_low, invstd = statistics
    OPMATH: tl.constexpr = invstd.dtype
    invstd = invstd.to(tl.float64)
    g_scale = invstd * load_values(weight_ptr, channel, inside, 1.0, tl.float64)
    x_scale = tl.zeros_like(g_scale)
    shift = tl.zeros_like(g_scale)
    if TRAINING:
        factor = -g_scale / tl.load(sums_ptr + 2 * channels)
        sum_g = tl.load(sums_ptr + channel, mask=inside, other=0.0)
        sum_gx = tl.load(sums_ptr + channels + channel, mask=inside, other=0.0)
        x_scale = factor * invstd * invstd * sum_gx
        shift = factor * sum_g - x_scale * mean_low.to(tl.float64)
    return g_scale.to(OPMATH)[None, :], x_scale.to(OPMATH)[None, :], shift.to(OPMATH)[None, :]
