"""Focal loss, sigmoid and softmax: ``csrc/core/focal_loss.h`` in Triton.

Launches of the forward pass: the losses; with a reduction also one that adds up what the programs
of the first have left. Of the backward pass: the gradient. The host never waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
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

# Elements of a tile of a softmax for every thread, as many as fit the registers: of rows with one
# label, of others, and of others with vectors of classes or statistics.
PER_THREAD = (16, 8, 4)
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
    outer: int, classes: int, inner: int, dtype: torch.dtype, few: bool, aligned: bool
) -> Launch:
    """Split the elements; ``few`` is at most four for every thread at a time."""
    numel = outer * classes * inner
    block = 16 // max(dtype.itemsize, 4 if few else 2) * NUM_THREADS
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
    outer: int, classes: int, inner: int, dtype: torch.dtype, per_thread: int, aligned: bool
) -> Launch:
    """Split the rows, in tiles of so many elements for every thread."""
    rows = outer * inner
    tile_size = per_thread * NUM_THREADS // (2 if dtype == torch.float64 else 1)
    most = tile_size if inner == 1 else tile_size // MAX_ROWS
    width = min(triton.next_power_of_2(classes), most)
    tile_rows = min(tile_size // width, MAX_ROWS)
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
        "WIDTH": width,
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


def _per_thread(flags: dict[str, Any], crowded: bool) -> int:
    is_soft = _is_soft(flags)
    return PER_THREAD[is_soft + (is_soft and crowded)]


def _is_soft(flags: dict[str, Any]) -> bool:
    return not flags["LABELS"] or flags["SMOOTH"]


def _has_any(*tensors: Tensor | None) -> bool:
    return any(tensor is not None for tensor in tensors)


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
    shape, vectors = (outer, classes, inner), (alphas, weight, pos_weight)
    flags = _flags(name, labels, gamma, label_smoothing)
    options = CHECKED_OPTIONS if labels else LAUNCH_OPTIONS
    losses = loss if reduction == 0 else None
    partials = None
    elements = (input, None if labels else target)
    with torch.cuda.device_of(input):
        if softmax:
            per_thread = _per_thread(flags, _has_any(stats, *vectors))
            launch = plan_softmax(*shape, dtype, per_thread, _is_aligned(*elements))
            if reduction != 0:
                partials = input.new_empty(2 * launch.num_programs, dtype=torch.float64)
            softmax_forward_kernel[(launch.num_programs,)](
                input,
                target,
                *vectors[:2],
                losses,
                partials,
                saved,
                stats,
                *launch.sizes,
                gamma,
                alpha,
                label_smoothing,
                ignore_index,
                SINGLE=classes <= launch.constants["WIDTH"],
                **flags,
                **launch.constants,
                **options,
            )
        else:
            # A store of more than 16 bytes would change the threads of the elements.
            few = _has_any(stats, *vectors) or (losses is not None and loss.itemsize > 2)
            launch = plan_sigmoid(*shape, dtype, few, _is_aligned(*elements, losses))
            if reduction != 0:
                partials = input.new_empty(2 * launch.num_programs, dtype=torch.float64)
            sigmoid_forward_kernel[(launch.num_programs,)](
                input,
                target,
                *vectors,
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
    shape, vectors = (outer, classes, inner), (alphas, weight, pos_weight)
    flags = _flags(REDUCTIONS[reduction], labels, gamma, label_smoothing)
    elements = (input, grad_input, None if labels else target)
    with torch.cuda.device_of(input):
        if softmax:
            launch = plan_softmax(
                *shape, dtype, _per_thread(flags, _has_any(*vectors)), _is_aligned(*elements)
            )
            softmax_backward_kernel[(launch.num_programs,)](
                grad_output,
                input,
                target,
                *vectors[:2],
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
            few = _has_any(*vectors) or _is_soft(flags)
            launch = plan_sigmoid(*shape, dtype, few, _is_aligned(*elements, grads))
            sigmoid_backward_kernel[(launch.num_programs,)](
                grad_output,
                input,
                target,
                *vectors,
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


# --- ahead-of-time checks ---

ELEMENTS = ("grad_output_ptr", "input_ptr", "target_ptr", "loss_ptr", "grad_input_ptr")
TYPES = {
    **dict.fromkeys(("alphas_ptr", "weight_ptr", "pos_weight_ptr"), "*fp32"),
    **dict.fromkeys(("partials_ptr", "normalizer_ptr"), "*fp64"),
    "stats_ptr": "*i64",
    **dict.fromkeys(("rows", "numel", "tiles_per_program", "num_partials"), "i64"),
    **dict.fromkeys(("classes", "classes_magic", "classes_shift"), "i64"),
    **dict.fromkeys(("inner", "inner_magic", "inner_shift"), "i64"),
    **dict.fromkeys(("ignore_index", "background"), "i64"),
    **dict.fromkeys(("gamma", "alpha", "smoothing"), "fp64"),
}
OPTIONAL = ("alphas_ptr", "weight_ptr", "pos_weight_ptr", "stats_ptr")


def specialisations() -> Iterator[Specialisation]:
    """Yield the forms of the kernels that training uses, for ahead-of-time checks."""
    finish_types = {"partials_ptr": "*fp64", "loss_ptr": "*fp32", "normalizer_ptr": "*fp64"}
    for reduction in ("mean", "sum"):
        types = {**finish_types, "num_partials": "i64"}
        yield Specialisation(finish_kernel, types, {"REDUCTION": reduction})
    for dtype in TRITON_DTYPES:
        for flags in (
            _flags("mean", labels=True, gamma=2.0, smoothing=0.0),
            _flags("none", labels=True, gamma=1.5, smoothing=0.0),
            _flags("mean", labels=True, gamma=1.5, smoothing=0.1),
            _flags("none", labels=False, gamma=1.5, smoothing=0.1),
        ):
            yield from _sigmoid_forms(dtype, flags)
            yield from _softmax_forms(dtype, flags)


def _sigmoid_forms(dtype: torch.dtype, flags: dict[str, Any]) -> Iterator[Specialisation]:
    blocks = ELEMENTS if flags["REDUCTION"] == "none" else ELEMENTS[1:]  # grad_output is a scalar
    for inner in (1, 64):
        absent = () if inner > 1 else OPTIONAL
        for kernel in (sigmoid_forward_kernel, sigmoid_backward_kernel):
            few = inner > 1 or (kernel is sigmoid_backward_kernel and _is_soft(flags))
            constants = plan_sigmoid(100_000, 80, inner, dtype, few, True).constants
            form = _specialisation(kernel, dtype, {**flags, **constants}, absent)
            accesses = constants["BLOCK"] * dtype.itemsize // (16 * NUM_THREADS)
            num_tensors = sum(form.types.get(name) == form.types["input_ptr"] for name in blocks)
            yield replace(form, wide_accesses=accesses * num_tensors)


def _softmax_forms(dtype: torch.dtype, flags: dict[str, Any]) -> Iterator[Specialisation]:
    is_soft, num_targets = _is_soft(flags), not flags["LABELS"]
    for classes, inner in ((1000, 1), (128_000, 1), (10, 1), (80, 4096)):
        absent = () if inner > 1 else OPTIONAL
        for kernel in (softmax_forward_kernel, softmax_backward_kernel):
            is_forward = kernel is softmax_forward_kernel
            per_thread = _per_thread(flags, inner > 1)
            constants = plan_softmax(1024, classes, inner, dtype, per_thread, True).constants
            num_accesses = 2 + num_targets
            if is_forward:
                is_single = classes <= constants["WIDTH"]
                num_accesses = (1 if is_single else 3 if is_soft else 2) + num_targets
                constants = {**constants, "SINGLE": is_single}
            width = min(16, min(constants["VEC"], per_thread) * dtype.itemsize)
            tile_bytes = constants["ROWS"] * constants["WIDTH"] * dtype.itemsize
            num_accesses *= tile_bytes // (16 * NUM_THREADS) if width == 16 else 0
            form = _specialisation(kernel, dtype, {**flags, **constants}, absent)
            yield replace(form, wide_accesses=num_accesses)


def _specialisation(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], absent: Sequence[str]
) -> Specialisation:
    element = f"*{TRITON_DTYPES[dtype]}"
    types = {
        **TYPES,
        **dict.fromkeys(ELEMENTS, element),
        "saved_ptr": "*fp64" if dtype == torch.float64 else "*fp32",
    }
    if constants["LABELS"]:
        types["target_ptr"] = "*i64"
    if constants["REDUCTION"] == "none":
        absent = (*absent, "partials_ptr", "normalizer_ptr")
    else:
        absent = (*absent, "loss_ptr")
    names = [name for name in kernel.arg_names if name not in constants]
    is_checked = constants["LABELS"] and kernel in (sigmoid_forward_kernel, softmax_forward_kernel)
    return Specialisation(
        kernel,
        {name: types[name] for name in names if name not in absent},
        {**constants, **dict.fromkeys(name for name in names if name in absent)},
        options=CHECKED_OPTIONS if is_checked else LAUNCH_OPTIONS,
    )
