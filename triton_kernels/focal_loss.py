"""Focal loss, sigmoid and softmax: ``csrc/core/focal_loss.h`` in Triton.

Launches of the forward pass: the losses; with a reduction also one that adds up what the programs
of the first have left. Of the backward pass: the gradient. The host never waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .focal_loss_blocks import finish_kernel
from .focal_loss_sigmoid_kernels import sigmoid_backward_kernel, sigmoid_forward_kernel
from .focal_loss_softmax_kernels import softmax_backward_kernel, softmax_forward_kernel
from .multi_tensor import LAUNCH_OPTIONS, NUM_THREADS, TRITON_DTYPES
from .specialisation import Specialisation

REDUCTIONS = ("none", "mean", "sum")

# Several on each multiprocessor; they leave at most 64 KiB of partials.
PROGRAMS = 4096
# A lane adds one element of each tile in float32: the error of a sum is below 64 * 2^-24, and far
# below since errors of different lanes cancel.
MAX_TILES = 64

TILE_BYTES = 4 * 16 * NUM_THREADS  # of a softmax: four 16-byte accesses of each thread
MAX_TILE_SIZE = 2048
MAX_ROWS = 128  # of a tile: a row for each thread

# Labels are checked by assertions; overflow of integers, which comes with them, is not.
CHECKED_OPTIONS = {**LAUNCH_OPTIONS, "debug": True, "sanitize_overflow": False}


class Launch(NamedTuple):
    """How elements or rows are split among programs."""

    num_programs: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]


def _magic(divisor: int) -> tuple[int, int]:
    """Return m, s for which ``(n * m // 2**32 + n) >> s`` is ``n // divisor`` where n < 2**31."""
    shift = (divisor - 1).bit_length()
    return (((1 << shift) - divisor) << 32) // divisor + 1, shift


def _index_dtype(numel: int) -> tl.dtype:
    # Blocks end beyond the last element.
    return tl.int32 if numel + 2**16 < 2**31 else tl.int64


def _opmath(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


@functools.lru_cache(maxsize=4096)
def plan_sigmoid(
    outer: int, classes: int, inner: int, dtype: torch.dtype, widest: int, aligned: bool
) -> Launch:
    """Split the elements; ``widest`` is the size of the largest that is read or written."""
    numel = outer * classes * inner
    # More than one 16-byte store of a thread would change the threads of narrower elements.
    block = 16 // widest * NUM_THREADS * (2 if widest == dtype.itemsize > 2 else 1)
    num_tiles = triton.cdiv(numel, block)
    tiles_per_program = min(triton.cdiv(num_tiles, PROGRAMS), MAX_TILES)
    index = _index_dtype(numel)
    small = index == tl.int32
    sizes = (
        numel,
        *(classes, *(_magic(classes) if small else (0, 0))),
        *(inner, *(_magic(inner) if small else (0, 0))),
        tiles_per_program,
    )
    constants = {
        "INNER": inner > 1,
        "DTYPE": TRITON_DTYPES[dtype],
        "INDEX": index,
        "OPMATH": _opmath(dtype),
        "VEC": 16 // dtype.itemsize if aligned else 1,
        "BLOCK": block,
    }
    return Launch(triton.cdiv(num_tiles, tiles_per_program), sizes, constants)


@functools.lru_cache(maxsize=4096)
def plan_softmax(
    outer: int, classes: int, inner: int, dtype: torch.dtype, aligned: bool
) -> Launch:
    """Split the rows."""
    rows = outer * inner
    tile_size = min(TILE_BYTES // dtype.itemsize, MAX_TILE_SIZE)
    most = tile_size if inner == 1 else tile_size // MAX_ROWS
    cols = min(triton.next_power_of_2(classes), most)
    tile_rows = min(tile_size // cols, MAX_ROWS)
    num_tiles = triton.cdiv(rows, tile_rows)
    tiles_per_program = triton.cdiv(num_tiles, PROGRAMS)
    last_axis = classes if inner == 1 else inner
    constants = {
        "CLASS_AXIS": 1 if inner == 1 else 0,
        "DTYPE": TRITON_DTYPES[dtype],
        "INDEX": _index_dtype(rows * classes),
        "OPMATH": _opmath(dtype),
        "VEC": math.gcd(last_axis, 16 // dtype.itemsize) if aligned else 1,
        "ROWS": tile_rows,
        "COLS": cols,
    }
    num_programs = triton.cdiv(num_tiles, tiles_per_program)
    return Launch(num_programs, (rows, classes, inner, tiles_per_program), constants)


def _flags(reduction: str, labels: bool, gamma: float, smoothing: float) -> dict[str, Any]:
    return {
        "REDUCTION": reduction,
        "LABELS": labels,
        "SMOOTH": smoothing != 0,
        # Of most gammas the power takes an exponential.
        "GAMMA": f"{gamma:.0f}" if gamma in (0, 1, 2) else "any",
    }


def _is_aligned(*tensors: Tensor | None) -> bool:
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


def forward(
    input: Tensor,
    outer: int,
    classes: int,
    inner: int,
    target: Tensor,
    softmax: bool,
    reduction: int,
    gamma: float,
    alpha: float,
    alphas: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    background: int,
    loss: Tensor,
    saved: Tensor | None,
    normalizer: Tensor | None,
    stats: Tensor | None,
    grad_input: None,
) -> None:
    """Do what ``FocalLossArgs`` says of the forward pass; None is null.

    Memory of tensors is dense, in the order [outer, classes, inner] or [outer, inner].
    """
    name, labels, dtype = REDUCTIONS[reduction], target.dtype == torch.int64, input.dtype
    shape = outer, classes, inner
    flags = _flags(name, labels, gamma, label_smoothing)
    options = CHECKED_OPTIONS if labels else LAUNCH_OPTIONS
    losses = loss if reduction == 0 else None
    partials = None
    elements = (input, None if labels else target)
    with torch.cuda.device_of(input):
        if softmax:
            launch = plan_softmax(*shape, dtype, _is_aligned(*elements))
            if reduction != 0:
                partials = input.new_empty(2 * launch.num_programs, dtype=torch.float64)
            softmax_forward_kernel[(launch.num_programs,)](
                input,
                target,
                alphas,
                weight,
                losses,
                partials,
                saved,
                stats,
                *launch.sizes,
                gamma,
                alpha,
                label_smoothing,
                ignore_index,
                SINGLE=classes <= launch.constants["COLS"],
                **flags,
                **launch.constants,
                **options,
            )
        else:
            widest = dtype.itemsize if losses is None else max(dtype.itemsize, loss.itemsize)
            launch = plan_sigmoid(*shape, dtype, widest, _is_aligned(*elements, losses))
            if reduction != 0:
                partials = input.new_empty(2 * launch.num_programs, dtype=torch.float64)
            sigmoid_forward_kernel[(launch.num_programs,)](
                input,
                target,
                alphas,
                weight,
                pos_weight,
                losses,
                partials,
                stats,
                *launch.sizes,
                gamma,
                alpha,
                label_smoothing,
                ignore_index,
                background,
                **flags,
                **launch.constants,
                **options,
            )
        if partials is not None:
            finish_kernel[(1,)](
                partials,
                loss,
                normalizer,
                launch.num_programs,
                REDUCTION=name,
                **LAUNCH_OPTIONS,
            )


def backward(
    grad_output: Tensor,
    input: Tensor,
    outer: int,
    classes: int,
    inner: int,
    target: Tensor,
    softmax: bool,
    reduction: int,
    gamma: float,
    alpha: float,
    alphas: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    background: int,
    saved: Tensor | None,
    normalizer: Tensor | None,
    grad_input: Tensor,
) -> None:
    """Do what ``FocalLossArgs`` says of the backward pass; tensors are as in :func:`forward`."""
    labels, dtype = target.dtype == torch.int64, input.dtype
    shape = outer, classes, inner
    flags = _flags(REDUCTIONS[reduction], labels, gamma, label_smoothing)
    elements = (input, grad_input, None if labels else target)
    with torch.cuda.device_of(input):
        if softmax:
            launch = plan_softmax(*shape, dtype, _is_aligned(*elements))
            softmax_backward_kernel[(launch.num_programs,)](
                grad_output,
                input,
                target,
                alphas,
                weight,
                saved,
                normalizer,
                grad_input,
                *launch.sizes,
                gamma,
                alpha,
                label_smoothing,
                ignore_index,
                **flags,
                **launch.constants,
                **LAUNCH_OPTIONS,
            )
        else:
            grads = grad_output if reduction == 0 else None
            launch = plan_sigmoid(*shape, dtype, dtype.itemsize, _is_aligned(*elements, grads))
            sigmoid_backward_kernel[(launch.num_programs,)](
                grad_output,
                input,
                target,
                alphas,
                weight,
                pos_weight,
                normalizer,
                grad_input,
                *launch.sizes,
                gamma,
                alpha,
                label_smoothing,
                ignore_index,
                background,
                **flags,
                **launch.constants,
                **LAUNCH_OPTIONS,
            )
