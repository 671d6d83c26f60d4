"""Statistics of tensors: ``csrc/core/activation_stats.h`` in Triton.

Launches: the sums, once for tensors of one dtype and form of tiles; one small kernel that merges
them into the rows. The host never waits.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation_stats_kernels import NUM_COUNTS, NUM_MOMENTS, merge_kernel, sum_kernel
from .multi_tensor import LAUNCH_OPTIONS, NUM_THREADS, TRITON_DTYPES, split_runs, upload
from .specialisation import Specialisation

TILE_BYTES = 2 * 16 * NUM_THREADS  # two 16-byte accesses of each thread
CHANNELS_LAST_BYTES = 256  # of a row of a tile, at most
MIN_COLS = 8
MAX_CHANNELS_LAST_VEC = 2  # each element of a vector has its own accumulators

# A lane adds what its thread has loaded of each tile, at most 16 elements, in float32: the error of
# a sum is below (32 + 16) * 2^-24, and far below since errors of different lanes cancel.
MAX_TILES = 32
PROGRAMS = 1024  # several on each multiprocessor


class Form(NamedTuple):
    """What tensors of one launch have in common."""

    dtype: torch.dtype
    channels_last: bool
    vec: int
    rows: int
    cols: int

    def constants(self) -> dict[str, Any]:
        """Return the constants of the kernel."""
        return {
            "DTYPE": TRITON_DTYPES[self.dtype],
            "OPMATH": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "CHANNELS_LAST": self.channels_last,
            "VEC": self.vec,
            "ROWS": self.rows,
            "COLS": self.cols,
        }


class Plan(NamedTuple):
    """How the tiles of a tensor are split among programs."""

    form: Form
    shape: tuple[int, int, int]
    num_blocks: int
    num_splits: int
    tiles_per_split: int


@functools.lru_cache(maxsize=4096)
def plan(
    outer: int,
    channels: int,
    inner: int,
    dtype: torch.dtype,
    aligned: bool,
    has_histogram: bool,
) -> Plan:
    """Split the tiles of each channel, for about ``PROGRAMS`` programs in all."""
    if channels == 1:
        outer, inner = 1, outer * inner
    channels_last = inner == 1 and channels > 1
    num_rows, row_size = (outer, channels) if channels_last else (outer, inner)
    # With a histogram the registers are enough for eight elements of a thread.
    tile_bytes = min(TILE_BYTES, 8 * NUM_THREADS * dtype.itemsize) if has_histogram else TILE_BYTES
    widest = CHANNELS_LAST_BYTES if channels_last else tile_bytes
    rows, cols = _tile_shape(
        num_rows, row_size, tile_bytes // dtype.itemsize, widest // dtype.itemsize
    )
    num_tiles = triton.cdiv(num_rows, rows)
    if channels_last:
        num_blocks = triton.cdiv(channels, cols)
    else:
        num_blocks = channels
        num_tiles *= triton.cdiv(inner, cols)
    tiles_per_split = min(triton.cdiv(num_tiles * num_blocks, PROGRAMS), MAX_TILES)
    num_splits = triton.cdiv(num_tiles, tiles_per_split)
    vec = math.gcd(row_size, 16 // dtype.itemsize) if aligned else 1
    if channels_last:
        vec = min(vec, MAX_CHANNELS_LAST_VEC)
    form = Form(dtype, channels_last, vec, rows, cols)
    return Plan(form, (outer, channels, inner), num_blocks, num_splits, tiles_per_split)


def _tile_shape(num_rows: int, row_size: int, size: int, widest: int) -> tuple[int, int]:
    """Return rows and columns of the tile that covers the least beyond the tensor."""
    shapes = []
    cols = MIN_COLS
    while cols <= widest:
        covered = triton.cdiv(num_rows, size // cols) * triton.cdiv(row_size, cols)
        shapes.append((covered, -cols))
        cols *= 2
    cols = -min(shapes)[1]
    return size // cols, cols


def _starts(numbers: Iterable[int]) -> list[int]:
    return list(itertools.accumulate(numbers, initial=0))


def update(
    tensors: Sequence[Tensor],
    shapes: Sequence[tuple[int, int, int]],
    first_rows: Sequence[int],
    armed: Tensor | None,
    moments: Tensor,
    counts: Tensor,
    histogram: Tensor | None,
) -> None:
    """Do what ``ActivationStatsArgs`` says; None is null.

    Memory of tensors is dense, in the order [outer, channels, inner] of their shapes.
    """
    parts = [
        (
            plan(*shape, tensor.dtype, tensor.data_ptr() % 16 == 0, histogram is not None),
            first_row,
            tensor.data_ptr(),
        )
        for tensor, shape, first_row in zip(tensors, shapes, first_rows, strict=True)
        if tensor.numel() > 0
    ]
    if not parts:
        return
    parts.sort(key=lambda part: str(part[0].form))
    plans = [part[0] for part in parts]
    first_programs = _starts(plan.num_blocks * plan.num_splits for plan in plans)
    first_channels = _starts(plan.shape[1] for plan in plans)
    first_partials = _starts(plan.shape[1] * plan.num_splits for plan in plans)
    num_tensors, num_partials = len(plans), first_partials[-1]
    tensor_rows = [
        (*firsts, first_row, address, *plan.shape, plan.num_splits, plan.tiles_per_split)
        for (plan, first_row, address), *firsts in zip(
            parts, first_programs, first_channels, first_partials, strict=False
        )
    ]
    device = moments.device
    with torch.cuda.device_of(moments):
        table = upload(
            [word for column in zip(*tensor_rows, strict=True) for word in column], device
        )
        partials = moments.new_empty((NUM_MOMENTS.value + NUM_COUNTS.value, num_partials))
        for form, run in split_runs([plan.form for plan in plans], first_programs):
            sum_kernel[(run.num_chunks,)](
                table,
                armed,
                partials,
                histogram,
                run.first_row,
                run.end_row,
                run.first_chunk,
                num_tensors,
                num_partials,
                **form.constants(),
                **LAUNCH_OPTIONS,
            )
        merge_kernel[(first_channels[-1],)](
            table,
            armed,
            partials,
            moments,
            counts,
            num_tensors,
            num_partials,
            **LAUNCH_OPTIONS,
        )


# --- ahead-of-time checks ---

TYPES = {
    "table_ptr": "*i64",
    "armed_ptr": "*i32",
    **dict.fromkeys(("partials_ptr", "moments_ptr"), "*fp64"),
    **dict.fromkeys(("counts_ptr", "histogram_ptr"), "*i64"),
    **dict.fromkeys(("first_tensor", "end_tensor", "first_program", "num_tensors"), "i32"),
    "num_partials": "i64",
}


def specialisations() -> Iterator[Specialisation]:
    """Yield the forms of the kernels that training uses, for ahead-of-time checks."""
    yield _specialisation(merge_kernel, {}, ())
    for dtype in TRITON_DTYPES:
        sweeps = 3 if dtype in (torch.float32, torch.bfloat16) else 2  # pilot, sums, sums again
        for channels, inner in ((1, 1), (256, 1), (256, 56 * 56)):
            for absent in ((), ("histogram_ptr",), ("armed_ptr", "histogram_ptr")):
                form = plan(32, channels, inner, dtype, True, not absent).form
                accesses = form.rows * form.cols // (form.vec * NUM_THREADS)
                one = _specialisation(sum_kernel, form.constants(), absent)
                is_wide = form.vec * dtype.itemsize == 16
                yield replace(one, wide_accesses=sweeps * accesses if is_wide else 0)


def _specialisation(
    kernel: Any, constants: dict[str, Any], absent: Sequence[str]
) -> Specialisation:
    present = [name for name in kernel.arg_names if name in TYPES and name not in absent]
    types = {name: TYPES[name] for name in present}
    return Specialisation(kernel, types, {**constants, **dict.fromkeys(absent)})
