"""BatchNorm, a residual and an activation: ``csrc/core/batch_norm_relu.h`` in Triton.

Launches of the forward pass: sums of each channel, statistics and running statistics, the output;
in evaluation the output alone. Of the backward pass: sums of each channel, gradients of weight and
bias, gradients of input and residual. The host never waits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastremedy.ops.batch_norm_relu import ACTIVATIONS

from .batch_norm_relu_blocks import FINISH_CHANNELS
from .batch_norm_relu_kernels import (
    finish_grad_sums_kernel,
    finish_moments_kernel,
    grad_sums_kernel,
    input_grad_kernel,
    moments_kernel,
    normalize_kernel,
)
from .multi_tensor import LAUNCH_OPTIONS, NUM_THREADS, TRITON_DTYPES
from .specialisation import Specialisation

PHASES = ("reduce", "finish", "both")  # BatchNormPhase

TILE_BYTES = 2 * 16 * NUM_THREADS  # two 16-byte accesses of each thread
# Contiguous bytes that a tile takes of each row, where rows are that long.
CHANNELS_LAST_BYTES = (64, 256)
CONTIGUOUS_BYTES = (512, TILE_BYTES)

# A lane adds one element of each tile in float32: the error of a sum is below 64 * 2^-24, and far
# below since errors of different lanes cancel.
MAX_TILES = 64
MAX_SPLITS = 65535  # programs in the second dimension of a grid
# Several on each multiprocessor. Those that sum leave at most 2 KiB of partials each.
SUM_PROGRAMS = 1024
WRITE_PROGRAMS = 4096


class Launch(NamedTuple):
    """How the tiles of a tensor are split among programs."""

    grid: tuple[int, int]
    tiles_per_split: int
    constants: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def plan(
    batch: int,
    channels: int,
    spatial: int,
    channels_last: bool,
    dtype: torch.dtype,
    aligned: bool,
    num_programs: int,
) -> Launch:
    """Split the tiles of each channel, for about ``num_programs`` programs in all."""
    num_rows, row_size = (batch * spatial, channels) if channels_last else (batch, spatial)
    row_bytes = CHANNELS_LAST_BYTES if channels_last else CONTIGUOUS_BYTES
    rows, cols = _tile_shape(num_rows, row_size, dtype.itemsize, *row_bytes)
    num_tiles = triton.cdiv(num_rows, rows)
    if channels_last:
        num_blocks = triton.cdiv(channels, cols)
    else:
        num_blocks = channels
        num_tiles *= triton.cdiv(spatial, cols)
    tiles_per_split = triton.cdiv(num_tiles * num_blocks, num_programs)
    tiles_per_split = max(1, min(tiles_per_split, MAX_TILES), triton.cdiv(num_tiles, MAX_SPLITS))
    constants = {
        "DTYPE": TRITON_DTYPES[dtype],
        "OPMATH": tl.float64 if dtype == torch.float64 else tl.float32,
        "CHANNELS_LAST": channels_last,
        "VEC": math.gcd(row_size, 16 // dtype.itemsize) if aligned else 1,
        "ROWS": rows,
        "COLS": cols,
    }
    num_splits = max(1, triton.cdiv(num_tiles, tiles_per_split))
    return Launch((num_blocks, num_splits), tiles_per_split, constants)


def _tile_shape(
    num_rows: int, row_size: int, itemsize: int, min_bytes: int, max_bytes: int
) -> tuple[int, int]:
    """Return rows and columns of the tile that covers the least beyond the tensor."""
    size = TILE_BYTES // itemsize
    widest = max(8, min(triton.next_power_of_2(row_size), max_bytes // itemsize))
    cols = max(8, min(widest, min_bytes // itemsize))
    shapes = []
    while cols <= widest:
        rows = size // cols
        covered = triton.cdiv(num_rows, rows) * triton.cdiv(row_size, cols)
        shapes.append((covered, -cols, rows))
        cols *= 2
    _, negative_cols, rows = min(shapes)
    return rows, -negative_cols


def _is_aligned(*tensors: Tensor | None) -> bool:
    return not any(tensor.data_ptr() % 16 for tensor in tensors if tensor is not None)


def _sizes(input: Tensor) -> tuple[int, int, int]:
    """Return batch, channels and spatial."""
    shape = input.shape
    return shape[0], shape[1], math.prod(shape[2:])


def _activation(activation: int, negative_slope: float) -> dict[str, Any]:
    name = ACTIVATIONS[activation]
    # Other activations are not compiled anew for each slope.
    return {"ACTIVATION": name, "NEGATIVE_SLOPE": negative_slope if name == "leaky_relu" else 0.0}


def forward(
    input: Tensor,
    channels_last: bool,
    residual: Tensor | None,
    output: Tensor | None,
    mask: Tensor | None,
    dead: Tensor | None,
    saved: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    sums: Tensor | None,
    phase: int,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> None:
    """Do what ``BatchNormForwardArgs`` says; None is null, and as momentum cumulative.

    Tensors of elements are dense, in the order [N, C, *], or [N, *, C] if ``channels_last``.
    """
    shape = batch, channels, spatial = _sizes(input)
    dtype, phase_name = input.dtype, PHASES[phase]
    with torch.cuda.device_of(input):
        if training:
            partials, num_splits = None, 0
            if phase_name != "finish":
                aligned = _is_aligned(input)
                launch = plan(*shape, channels_last, dtype, aligned, SUM_PROGRAMS)
                num_splits = launch.grid[1]
                partials = input.new_empty((2 * num_splits + 1) * channels, dtype=torch.float64)
                moments_kernel[launch.grid](
                    input,
                    partials,
                    *shape,
                    launch.tiles_per_split,
                    **launch.constants,
                    **LAUNCH_OPTIONS,
                )
            finish_moments_kernel[(triton.cdiv(channels, FINISH_CHANNELS.value),)](
                partials,
                sums,
                saved,
                running_mean,
                running_var,
                num_batches_tracked,
                channels,
                num_splits,
                float(batch * spatial),
                0.0 if momentum is None else momentum,
                eps,
                PHASE=phase_name,
                CUMULATIVE=momentum is None and num_batches_tracked is not None,
                **LAUNCH_OPTIONS,
            )
        if phase_name == "reduce":
            return
        aligned = _is_aligned(input, residual, output)
        launch = plan(*shape, channels_last, dtype, aligned, WRITE_PROGRAMS)
        normalize_kernel[launch.grid](
            input,
            residual,
            output,
            mask,
            dead,
            saved,
            weight,
            bias,
            None if training else running_mean,
            None if training else running_var,
            num_batches_tracked if training else None,
            *shape,
            launch.tiles_per_split,
            eps,
            TRAINING=training,
            **_activation(activation, negative_slope),
            **launch.constants,
            **LAUNCH_OPTIONS,
        )


def backward(
    grad_output: Tensor,
    input: Tensor,
    channels_last: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    sums: Tensor | None,
    phase: int,
    training: bool,
    activation: int,
    negative_slope: float,
) -> None:
    """Do what ``BatchNormBackwardArgs`` says; tensors are as in :func:`forward`."""
    shape = batch, channels, spatial = _sizes(input)
    phase_name = PHASES[phase]
    aligned = _is_aligned(grad_output, input, residual, grad_input, grad_residual)
    constants = _activation(activation, negative_slope)
    writes_weights = grad_weight is not None or grad_bias is not None
    writes_elements = grad_input is not None or grad_residual is not None
    reads_sums = training and grad_input is not None
    with torch.cuda.device_of(input):
        if phase_name == "reduce" or (phase_name == "both" and (writes_weights or reads_sums)):
            launch = plan(*shape, channels_last, input.dtype, aligned, SUM_PROGRAMS)
            num_splits = launch.grid[1]
            partials = input.new_empty(2 * num_splits * channels, dtype=torch.float64)
            if phase_name == "both":
                sums = input.new_empty(2 * channels + 1, dtype=torch.float64)
            grad_sums_kernel[launch.grid](
                grad_output,
                input,
                residual,
                mask,
                saved,
                weight,
                bias,
                partials,
                *shape,
                launch.tiles_per_split,
                **constants,
                **launch.constants,
                **LAUNCH_OPTIONS,
            )
            finish_grad_sums_kernel[(triton.cdiv(channels, FINISH_CHANNELS.value),)](
                partials,
                saved,
                sums,
                grad_weight,
                grad_bias,
                channels,
                num_splits,
                float(batch * spatial),
                **LAUNCH_OPTIONS,
            )
        if phase_name == "reduce" or not writes_elements or input.numel() == 0:
            return
        launch = plan(*shape, channels_last, input.dtype, aligned, WRITE_PROGRAMS)
        input_grad_kernel[launch.grid](
            grad_output,
            input,
            residual,
            mask,
            saved,
            weight,
            bias,
            sums,
            grad_input,
            grad_residual,
            *shape,
            launch.tiles_per_split,
            TRAINING=reads_sums,
            **constants,
            **launch.constants,
            **LAUNCH_OPTIONS,
        )


# --- ahead-of-time checks ---

ELEMENTS = (
    "grad_output_ptr",
    "input_ptr",
    "residual_ptr",
    "output_ptr",
    "grad_input_ptr",
    "grad_residual_ptr",
)
TYPES = {
    "mask_ptr": "*u8",
    **dict.fromkeys(("dead_ptr", "num_batches_tracked_ptr"), "*i64"),
    **dict.fromkeys(("partials_ptr", "sums_ptr"), "*fp64"),
    **dict.fromkeys(("weight_ptr", "bias_ptr", "grad_weight_ptr", "grad_bias_ptr"), "*fp32"),
    **dict.fromkeys(("running_mean_ptr", "running_var_ptr"), "*fp32"),
    **dict.fromkeys(("batch", "channels", "spatial", "tiles_per_split", "num_splits"), "i64"),
    **dict.fromkeys(("count", "momentum", "eps"), "fp64"),
}
FORWARD_EXTRAS = ("residual_ptr", "mask_ptr", "dead_ptr")
BACKWARD_EXTRAS = ("residual_ptr", "mask_ptr", "grad_residual_ptr")
RUNNING = ("running_mean_ptr", "running_var_ptr")


def specialisations() -> Iterator[Specialisation]:
    """Yield the forms of the kernels that training and inference use, for ahead-of-time checks."""
    for phase in PHASES:
        constants = {"PHASE": phase, "CUMULATIVE": False}
        unused = ("sums_ptr",) if phase == "both" else ()
        yield _specialisation(finish_moments_kernel, torch.float32, constants, unused)
    yield _specialisation(finish_grad_sums_kernel, torch.float32, {}, ())
    for channels_last in (True, False):
        for dtype in TRITON_DTYPES:
            plain = plan(32, 256, 56 * 56, channels_last, dtype, True, SUM_PROGRAMS).constants
            yield _specialisation(moments_kernel, dtype, plain, ())
            for kernel, flags, absent in _usual_forms():
                yield _specialisation(kernel, dtype, {**flags, **plain}, absent)


def _specialisation(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], absent: Sequence[str]
) -> Specialisation:
    types = {
        **TYPES,
        **dict.fromkeys(ELEMENTS, f"*{TRITON_DTYPES[dtype]}"),
        "saved_ptr": "*fp64" if dtype == torch.float64 else "*fp32",
    }
    present = [name for name in kernel.arg_names if name in types and name not in absent]
    return Specialisation(
        kernel,
        {name: types[name] for name in present},
        {**constants, **dict.fromkeys(absent)},
        wide_accesses=TILE_BYTES // (16 * NUM_THREADS) * sum(name in ELEMENTS for name in present),
    )


def _usual_forms() -> Iterator[tuple[Any, dict[str, Any], Sequence[str]]]:
    relu, silu = _activation(1, 0.0), _activation(4, 0.0)
    training, evaluation = {"TRAINING": True, **relu}, {"TRAINING": False, **relu}
    tracked = "num_batches_tracked_ptr"
    yield normalize_kernel, training, (*FORWARD_EXTRAS, *RUNNING)
    yield normalize_kernel, training, RUNNING
    yield normalize_kernel, {**training, **silu}, ("mask_ptr", "dead_ptr", *RUNNING)
    yield normalize_kernel, evaluation, (*FORWARD_EXTRAS, tracked)
    yield normalize_kernel, evaluation, ("mask_ptr", "dead_ptr", tracked)
    yield grad_sums_kernel, relu, ("residual_ptr", "mask_ptr")
    yield grad_sums_kernel, relu, ("residual_ptr",)
    yield grad_sums_kernel, silu, ("mask_ptr",)
    yield input_grad_kernel, training, BACKWARD_EXTRAS
    yield input_grad_kernel, training, ("residual_ptr",)
    yield input_grad_kernel, {**training, **silu}, ("mask_ptr",)
    yield input_grad_kernel, evaluation, (*BACKWARD_EXTRAS, "sums_ptr")
