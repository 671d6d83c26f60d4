# mypy: allow-untyped-defs, allow-incomplete-defs
"""The p-norm of all gradients as one vector, and clipping: ``csrc/core/clip_grad_norm.h`` in Triton.

Each chunk gives one partial in float64 at a fixed place, and the partials are added in a fixed
order: the norm is bitwise the same from run to run. Inside a chunk sums are float32, because float64
is slow on most GPUs; a chunk whose sum overflows or comes close to underflow is summed again, scaled
by a power of two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.clip_grad_norm import norm_dtype
from .multi_tensor import (
    CHUNK,
    TRITON_DTYPES,
    Run,
    first_chunks,
    float_words,
    locate_chunk,
    split_runs,
    upload,
)
from .rounding import round_nearest
from .specialisation import Specialisation

NUM_WARPS = 8
BLOCK_BYTES = 8192  # of one iteration: 256 threads with two 16-byte accesses each
PARTIALS_BLOCK = 1024

# 16384 squares that are flushed below 2^-126 are less than 2^-24 of any larger sum.
SMALLEST_SAFE_SUM = tl.constexpr(2.0**-88)


# --- the formula, on blocks of values ---


@triton.jit
def _magnitude_bits(value):
    # As integers, magnitudes are in the order of their values, with NaN on top.
    if value.dtype == tl.float64:
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
def _reduce_extreme(extreme, DTYPE: tl.constexpr, NORM: tl.constexpr):
    if NORM == "min":
        return tl.min(extreme, 0).to(DTYPE, bitcast=True)
    else:
        return tl.max(extreme, 0).to(DTYPE, bitcast=True)


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
    grad_ptr, count, scale, norm_type, NORM: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the sum and the extreme magnitude of ``count`` scaled elements."""
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    extreme = _magnitude_bits(tl.full((BLOCK,), _identity(NORM), ACC))
    num_full = count // BLOCK * BLOCK
    for start in range(0, num_full, BLOCK):
        value = tl.load(grad_ptr + start + offsets).to(ACC) * scale
        total += _norm_term(value, norm_type, NORM)
        extreme = _wider_extreme(extreme, value, NORM)
    if num_full < count:
        mask = num_full + offsets < count
        padding = tl.where(norm_type < 0, float("inf"), 0.0)  # adds nothing to any norm
        value = tl.load(grad_ptr + num_full + offsets, mask=mask, other=padding).to(ACC) * scale
        total += _norm_term(value, norm_type, NORM)
        extreme = _wider_extreme(extreme, value, NORM)
    return tl.sum(total, 0), _reduce_extreme(extreme, ACC, NORM)


@triton.jit
def _rescued_sum(grad_ptr, count, largest, norm_type, NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum in float64, of elements scaled so that the largest comes close to 1."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    scale_bits = tl.maximum(253 - exponent, 1) << 23
    scale = scale_bits.to(tl.float32, bitcast=True)
    total, _ = _reduce_chunk(grad_ptr, count, scale, norm_type, NORM, tl.float32, BLOCK)
    unscale = 1.0 / scale.to(tl.float64)
    total = total.to(tl.float64) * unscale
    if NORM == "l2":
        total *= unscale
    return total


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
    if NORM == "max" or NORM == "min":
        return _reduce_extreme(extreme, tl.float64, NORM)
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
    row, begin, count = locate_chunk(
        first_chunks_ptr, sizes_ptr, chunk, first_row, end_row, CHUNK
    )
    norm_type = tl.load(options_ptr + 1)
    address = tl.load(grads_ptr + row)
    if address == 0:
        tl.store(partials_ptr + chunk, _identity(NORM))
    else:
        grad_ptr = address.to(tl.pointer_type(DTYPE))
        if address % 16 == 0:
            aligned_ptr = tl.multiple_of(grad_ptr, 16) + begin
            total, extreme = _reduce_chunk(aligned_ptr, count, 1.0, norm_type, NORM, ACC, BLOCK)
        else:
            total, extreme = _reduce_chunk(
                grad_ptr + begin, count, 1.0, norm_type, NORM, ACC, BLOCK
            )
        if NORM == "max" or NORM == "min":
            partial = extreme.to(tl.float64)
        else:
            partial = total.to(tl.float64)
            if ACC == tl.float32 and (NORM == "l1" or NORM == "l2"):
                if (total < SMALLEST_SAFE_SUM) | (total == float("inf")):
                    partial = extreme.to(tl.float64)  # 0 or infinity
                    if (extreme > 0) & (extreme < float("inf")):
                        partial = _rescued_sum(
                            grad_ptr + begin, count, extreme, norm_type, NORM, BLOCK
                        )
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


@triton.jit
def _scale_chunk(
    grad_ptr, count, factor, DTYPE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.arange(0, BLOCK)
    num_full = count // BLOCK * BLOCK
    for start in range(0, num_full, BLOCK):
        value = tl.load(grad_ptr + start + offsets).to(ACC) * factor
        tl.store(grad_ptr + start + offsets, round_nearest(value, DTYPE))
    if num_full < count:
        mask = num_full + offsets < count
        value = tl.load(grad_ptr + num_full + offsets, mask=mask).to(ACC) * factor
        tl.store(grad_ptr + num_full + offsets, round_nearest(value, DTYPE), mask=mask)


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
        grad_ptr = address.to(tl.pointer_type(DTYPE))
        if address % 16 == 0:
            _scale_chunk(tl.multiple_of(grad_ptr, 16) + begin, count, factor, DTYPE, ACC, BLOCK)
        else:
            _scale_chunk(grad_ptr + begin, count, factor, DTYPE, ACC, BLOCK)


# --- launchers ---


def norm_name(norm_type: float) -> str:
    """Return what the kernels call a norm."""
    special = {1.0: "l1", 2.0: "l2", math.inf: "max", -math.inf: "min", 0.0: "count"}
    return special.get(norm_type, "power")


def dtype_constants(dtype: torch.dtype, norm: str = "l2") -> dict[str, object]:
    """Return the constants of a kernel that reads gradients of a dtype."""
    is_double = dtype == torch.float64 or norm == "power"
    return {
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": tl.float64 if is_double else tl.float32,
        "CHUNK": CHUNK,
        "BLOCK": BLOCK_BYTES // dtype.itemsize,
    }


def launch_grad_norm(
    options: Tensor,
    first_chunks: Tensor,
    sizes: Tensor,
    grads: Tensor,
    partials: Tensor,
    runs: Sequence[tuple[torch.dtype, Run]],
    norm: str,
) -> None:
    """Write the partials of all chunks, one launch for each dtype."""
    for dtype, run in runs:
        grad_norm_kernel[(run.num_chunks,)](
            options,
            first_chunks,
            sizes,
            grads,
            partials,
            run.first_row,
            run.end_row,
            run.first_chunk,
            NORM=norm,
            num_warps=NUM_WARPS,
            **dtype_constants(dtype, norm),
        )


def grad_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all gradients as one vector; see ``fastremedy.ops.clip_grad_norm``.

    Args:
        grads: at least one; dense, real, all on one device.
        norm_type: any p of a p-norm.
    """
    return clip_grad_norm_(grads, math.inf, norm_type)


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; return the norm before.

    Args:
        grads: at least one; dense, real, all on one device.
        max_norm: infinity reads the gradients only.
        norm_type: any p of a p-norm.
    """
    device = grads[0].device
    total_norm = torch.zeros((), dtype=norm_dtype(grads), device=device)
    rows = sorted((grad for grad in grads if grad.numel() > 0), key=lambda grad: str(grad.dtype))
    if not rows:
        return total_norm
    sizes = [grad.numel() for grad in rows]
    starts = first_chunks(sizes)
    runs = split_runs([grad.dtype for grad in rows], starts)
    norm = norm_name(norm_type)
    with torch.cuda.device_of(total_norm):
        words = upload(
            [
                *float_words(max_norm, norm_type),
                *starts[:-1],
                *sizes,
                *(grad.data_ptr() for grad in rows),
            ],
            device,
        )
        options = words[:2].view(torch.float64)
        table = words[2:].view(3, len(rows)).unbind()
        partials = torch.empty(starts[-1], dtype=torch.float64, device=device)
        coefficient = torch.empty((), dtype=torch.float64, device=device)
        launch_grad_norm(options, *table, partials, runs, norm)
        finish_norm_kernel[(1,)](
            options,
            partials,
            starts[-1],
            total_norm,
            coefficient,
            NORM=norm,
            PARTIALS_BLOCK=PARTIALS_BLOCK,
            num_warps=NUM_WARPS,
        )
        if max_norm != math.inf:
            for dtype, run in reversed(runs):
                scale_kernel[(run.num_chunks,)](
                    *table,
                    coefficient,
                    run.first_row,
                    run.end_row,
                    run.first_chunk + run.num_chunks - 1,
                    num_warps=NUM_WARPS,
                    **dtype_constants(dtype),
                )
    return total_norm


def specialisations() -> Iterator[Specialisation]:
    """Yield the forms of the kernels that training uses, for ahead-of-time checks."""
    table = {"first_chunks_ptr": "*i64", "sizes_ptr": "*i64", "grads_ptr": "*i64"}
    rows = {"first_row": "i32", "end_row": "i32"}
    for dtype in TRITON_DTYPES:
        for norm in ("l1", "l2", "max", "min", "count", "power"):
            yield Specialisation(
                grad_norm_kernel,
                {
                    "options_ptr": "*fp64",
                    **table,
                    "partials_ptr": "*fp64",
                    **rows,
                    "first_chunk": "i32",
                },
                {"NORM": norm, **dtype_constants(dtype, norm)},
                NUM_WARPS,
                wide_accesses=BLOCK_BYTES // (16 * 32 * NUM_WARPS),
            )
        yield Specialisation(
            scale_kernel,
            {**table, "coefficient_ptr": "*fp64", **rows, "last_chunk": "i32"},
            dtype_constants(dtype),
            NUM_WARPS,
            wide_accesses=2 * BLOCK_BYTES // (16 * 32 * NUM_WARPS),
        )
    for norm in ("l1", "l2", "max", "min", "count", "power"):
        yield Specialisation(
            finish_norm_kernel,
            {
                "options_ptr": "*fp64",
                "partials_ptr": "*fp64",
                "num_partials": "i32",
                "total_norm_ptr": "*fp32",
                "coefficient_ptr": "*fp64",
            },
            {"NORM": norm, "PARTIALS_BLOCK": PARTIALS_BLOCK},
            NUM_WARPS,
        )
