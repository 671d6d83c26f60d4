# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of gradient norms and clipping; :mod:`.clip_grad_norm` launches them.

Each chunk gives one partial in float64 at a fixed place, and the partials are added in a fixed
order: the norm is bitwise the same from run to run. Inside a chunk each lane adds a few elements in
float32, since float64 is slow on most GPUs; a chunk whose sum overflows or comes close to underflow
is summed again, scaled by a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import NARROW_BLOCK, aligned_pointer, locate_chunk, wide_count
from .rounding import round_nearest, widen

# 16384 squares that are lost below 2^-126 are less than 2^-24 of any larger sum.
SMALLEST_SAFE_SUM = tl.constexpr(2.0**-88)


# --- the formula, on blocks of values ---


@triton.jit
def _magnitude_bits(value):
    # As integers, magnitudes are in the order of their values, with NaN on top.
    if value.dtype.is_fp64():
        return value.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _identity(NORM: tl.constexpr):
    """Return the partial of nothing."""
    if NORM == "min":
        return float("inf")
    else:
        return 0.0


@triton.jit
def _wider_extreme(extreme, value, NORM: tl.constexpr):
    """Return the bits of the extreme magnitude so far; NaN wins."""
    bits = _magnitude_bits(value)
    if NORM == "min":
        return tl.minimum(extreme, tl.where(value == value, bits, -1))  # -1: the bits of a NaN
    else:
        return tl.maximum(extreme, bits)


@triton.jit
def _norm_term(value, norm_type, NORM: tl.constexpr):
    """Return what each element adds to the sum."""
    if NORM == "l2":
        return value * value
    elif NORM == "power":
        return tl.exp2(norm_type * tl.log2(tl.abs(value)))
    elif NORM == "count":
        return tl.where(value != 0, 1.0, 0.0).to(value.dtype)
    else:
        return tl.abs(value)


@triton.jit
def _reduce_chunk(
    address,
    begin,
    count,
    scale,
    norm_type,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the float64 sum and the extreme magnitude of ``count`` scaled elements."""
    wide_ptr = aligned_pointer(address, DTYPE) + begin
    num_wide = wide_count(count, address, BLOCK)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    extreme = _magnitude_bits(tl.full((BLOCK,), _identity(NORM), ACC))
    for start in range(0, num_wide, BLOCK):
        value = widen(tl.load(wide_ptr + start + offsets), ACC) * scale
        total += _norm_term(value, norm_type, NORM)
        extreme = _wider_extreme(extreme, value, NORM)

    grad_ptr = address.to(tl.pointer_type(DTYPE)) + begin
    padding = tl.where(norm_type < 0, float("inf"), 0.0)  # adds nothing to any norm
    offsets = tl.arange(0, NARROW_BLOCK)
    rest_total = tl.zeros((NARROW_BLOCK,), tl.float64)
    rest_extreme = _magnitude_bits(tl.full((NARROW_BLOCK,), _identity(NORM), ACC))
    for start in range(num_wide, count, NARROW_BLOCK):
        mask = start + offsets < count
        value = widen(tl.load(grad_ptr + start + offsets, mask=mask, other=padding), ACC) * scale
        rest_total += _norm_term(value.to(tl.float64), norm_type, NORM)
        rest_extreme = _wider_extreme(rest_extreme, value, NORM)

    if NORM == "min":
        bits = tl.minimum(tl.min(extreme, 0), tl.min(rest_extreme, 0))
    else:
        bits = tl.maximum(tl.max(extreme, 0), tl.max(rest_extreme, 0))
    total = tl.sum(total.to(tl.float64), 0) + tl.sum(rest_total, 0)
    return total, bits.to(ACC, bitcast=True)


@triton.jit
def _rescued_sum(
    total,
    largest,
    address,
    begin,
    count,
    norm_type,
    NORM: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return a sum; if it is lost in float32, sum again with elements scaled to about 1."""
    result = total
    is_lost = (total < SMALLEST_SAFE_SUM) | (total == float("inf"))
    if is_lost & (largest > 0) & (largest < float("inf")):
        exponent = largest.to(tl.int32, bitcast=True) >> 23
        scale = (tl.maximum(253 - exponent, 1) << 23).to(tl.float32, bitcast=True)
        scaled, _ = _reduce_chunk(
            address, begin, count, scale, norm_type, NORM, DTYPE, tl.float32, BLOCK
        )
        unscale = 1.0 / scale.to(tl.float64)
        result = scaled * unscale
        if NORM == "l2":
            result *= unscale
    return result


@triton.jit
def combine_partials(
    partials_ptr, num_partials, norm_type, NORM: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the norm, from float64 partials that are added in a fixed order."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    extreme = _magnitude_bits(tl.full((BLOCK,), _identity(NORM), tl.float64))
    for start in range(0, num_partials, BLOCK):
        mask = start + offsets < num_partials
        partial = tl.load(partials_ptr + start + offsets, mask=mask, other=_identity(NORM))
        total += partial
        extreme = _wider_extreme(extreme, partial, NORM)
    if NORM == "max":
        return tl.max(extreme, 0).to(tl.float64, bitcast=True)
    elif NORM == "min":
        return tl.min(extreme, 0).to(tl.float64, bitcast=True)
    elif NORM == "l2":
        return tl.sqrt(tl.sum(total, 0))
    elif NORM == "power":
        return tl.exp2(tl.log2(tl.sum(total, 0)) / norm_type)
    else:
        return tl.sum(total, 0)


@triton.jit
def clip_coefficient(norm, max_norm):
    """Return ``min(1, max_norm / (norm + 1e-6))``; NaN if that is NaN."""
    coefficient = max_norm / (norm + 1e-6)
    needs_none = (coefficient >= 1.0) | (max_norm == float("inf"))
    return tl.where(needs_none, 1.0, coefficient)


# --- kernels ---


@triton.jit(
    do_not_specialize=["first_row", "end_row", "first_chunk"],
    do_not_specialize_on_alignment=["options_ptr", "first_chunks_ptr", "sizes_ptr", "grads_ptr"],
)
def grad_norm_kernel(
    options_ptr,  # max_norm, norm_type
    first_chunks_ptr,
    sizes_ptr,
    grads_ptr,  # addresses, 0 where there is no gradient
    partials_ptr,  # [num_chunks]
    first_row,
    end_row,
    first_chunk,
    DTYPE: tl.constexpr,
    NORM: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the partial of each chunk."""
    chunk = first_chunk + tl.program_id(0)
    row, begin, count = locate_chunk(first_chunks_ptr, sizes_ptr, chunk, first_row, end_row, CHUNK)
    norm_type = tl.load(options_ptr + 1)
    address = tl.load(grads_ptr + row)
    if address == 0:
        tl.store(partials_ptr + chunk, _identity(NORM))
    else:
        total, extreme = _reduce_chunk(
            address, begin, count, 1.0, norm_type, NORM, DTYPE, ACC, BLOCK
        )
        if NORM == "max" or NORM == "min":
            partial = extreme.to(tl.float64)
        elif ACC.is_fp32() and NORM != "count":
            partial = _rescued_sum(
                total, extreme, address, begin, count, norm_type, NORM, DTYPE, BLOCK
            )
        else:
            partial = total
        tl.store(partials_ptr + chunk, partial)


@triton.jit(
    do_not_specialize=["num_partials"],
    do_not_specialize_on_alignment=["options_ptr"],
)
def finish_norm_kernel(
    options_ptr,  # max_norm, norm_type
    partials_ptr,
    num_partials,
    total_norm_ptr,
    coefficient_ptr,
    NORM: tl.constexpr,
    PARTIALS_BLOCK: tl.constexpr,
):
    """Write the norm and the factor that clips the gradients, 1 where nothing needs clipping."""
    norm = combine_partials(
        partials_ptr, num_partials, tl.load(options_ptr + 1), NORM, PARTIALS_BLOCK
    )
    tl.store(total_norm_ptr, norm)
    tl.store(coefficient_ptr, clip_coefficient(norm, tl.load(options_ptr)))


@triton.jit(
    do_not_specialize_on_alignment=[
        "options_ptr",
        "first_chunks_ptr",
        "sizes_ptr",
        "order_ptr",
        "norms_ptr",
    ],
)
def tensor_norms_kernel(
    options_ptr,  # max_norm, norm_type
    first_chunks_ptr,
    sizes_ptr,
    order_ptr,  # the caller's number of each row
    partials_ptr,  # [num_chunks]
    norms_ptr,  # in the caller's order
    NORM: tl.constexpr,
    CHUNK: tl.constexpr,
    PARTIALS_BLOCK: tl.constexpr,
):
    """Write the norm of each gradient."""
    row = tl.program_id(0)
    first_ptr = partials_ptr + tl.load(first_chunks_ptr + row)
    num_partials = tl.cdiv(tl.load(sizes_ptr + row), CHUNK).to(tl.int32)
    norm = combine_partials(first_ptr, num_partials, tl.load(options_ptr + 1), NORM, PARTIALS_BLOCK)
    tl.store(norms_ptr + tl.load(order_ptr + row), norm)


@triton.jit(
    do_not_specialize=["first_row", "end_row", "last_chunk"],
    do_not_specialize_on_alignment=["first_chunks_ptr", "sizes_ptr", "grads_ptr"],
)
def scale_kernel(
    first_chunks_ptr,
    sizes_ptr,
    grads_ptr,
    coefficient_ptr,
    first_row,
    end_row,
    last_chunk,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply by the coefficient, unless it is 1.

    Chunks are taken backwards: the gradients that the norm read last are still in L2.
    """
    coefficient = tl.load(coefficient_ptr)
    if coefficient != 1.0:
        chunk = last_chunk - tl.program_id(0)
        row, begin, count = locate_chunk(
            first_chunks_ptr, sizes_ptr, chunk, first_row, end_row, CHUNK
        )
        factor = coefficient.to(ACC)
        address = tl.load(grads_ptr + row)
        wide_ptr = aligned_pointer(address, DTYPE) + begin
        num_wide = wide_count(count, address, BLOCK)
        offsets = tl.arange(0, BLOCK)
        for start in range(0, num_wide, BLOCK):
            value = widen(tl.load(wide_ptr + start + offsets), ACC) * factor
            tl.store(wide_ptr + start + offsets, round_nearest(value, DTYPE))
        grad_ptr = address.to(tl.pointer_type(DTYPE)) + begin
        offsets = tl.arange(0, NARROW_BLOCK)
        for start in range(num_wide, count, NARROW_BLOCK):
            mask = start + offsets < count
            value = widen(tl.load(grad_ptr + start + offsets, mask=mask), ACC) * factor
            tl.store(grad_ptr + start + offsets, round_nearest(value, DTYPE), mask=mask)
