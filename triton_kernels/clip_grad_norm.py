"""Norms of gradients as one vector, and clipping: ``csrc/core/clip_grad_norm.h`` in Triton.

Launches: the norm, once per dtype; one small kernel that adds the partials, and one for those of
each gradient if their norms are wanted; the scaling, once per dtype, which ends at once where
nothing needs clipping. The host never waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastremedy.ops.clip_grad_norm import norm_dtype

from .clip_grad_norm_kernels import (
    finish_norm_kernel,
    grad_norm_kernel,
    scale_kernel,
    tensor_norms_kernel,
)
from .multi_tensor import (
    CHUNK,
    LAUNCH_OPTIONS,
    NUM_THREADS,
    TRITON_DTYPES,
    Run,
    first_chunks,
    float_words,
    split_runs,
    upload,
)
from .specialisation import Specialisation

BLOCK_BYTES = 2 * 16 * NUM_THREADS  # of one iteration: two 16-byte accesses of each thread
PARTIALS_BLOCK = 1024

NORMS = ("l1", "l2", "max", "min", "count", "power")


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
    table: Mapping[str, Tensor],
    grads: Tensor,
    partials: Tensor,
    runs: Sequence[tuple[torch.dtype, Run]],
    norm: str,
) -> None:
    """Write the partials of all chunks, one launch for each dtype.

    Args:
        options: ``max_norm`` and ``norm_type``, float64.
        table: holds ``first_chunks_ptr`` and ``sizes_ptr``, one int64 for each gradient.
        grads: addresses, one int64 for each gradient.
        partials: float64, one for each chunk.
        runs: rows of one dtype.
        norm: from :func:`norm_name`.
    """
    for dtype, run in runs:
        grad_norm_kernel[(run.num_chunks,)](
            options,
            table["first_chunks_ptr"],
            table["sizes_ptr"],
            grads,
            partials,
            run.first_row,
            run.end_row,
            run.first_chunk,
            NORM=norm,
            **dtype_constants(dtype, norm),
            **LAUNCH_OPTIONS,
        )


def grad_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all gradients as one vector; see ``fastremedy.ops.clip_grad_norm``.

    Args:
        grads: at least one; dense, real, all on one device.
        norm_type: any p of a p-norm.
    """
    return clip_grad_norm_(grads, math.inf, norm_type)


def clip_grad_norm_(
    grads: Sequence[Tensor], max_norm: float, norm_type: float, norms: Tensor | None = None
) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; return the norm before.

    Args:
        grads: at least one; dense, real, all on one device.
        max_norm: infinity reads the gradients only.
        norm_type: any p of a p-norm.
        norms: contiguous float64 zeros, one for each gradient: are given the norms before.
    """
    device, result_dtype = grads[0].device, norm_dtype(grads)
    order = [i for i, grad in enumerate(grads) if grad.numel() > 0]
    order.sort(key=lambda i: str(grads[i].dtype))
    if not order:
        return torch.zeros((), dtype=result_dtype, device=device)
    rows = [grads[i] for i in order]
    sizes = [grad.numel() for grad in rows]
    starts = first_chunks(sizes)
    runs = split_runs([grad.dtype for grad in rows], starts)
    norm = norm_name(norm_type)
    words = [
        *float_words(max_norm, norm_type),
        *starts[:-1],
        *sizes,
        *(grad.data_ptr() for grad in rows),
        *order,
    ]
    with torch.cuda.device_of(rows[0]):
        total_norm = torch.empty((), dtype=result_dtype, device=device)
        options, columns = upload(words, device).split([2, 4 * len(rows)])
        options = options.view(torch.float64)
        first_chunk_numbers, numels, addresses, places = columns.view(4, len(rows)).unbind()
        table = {"first_chunks_ptr": first_chunk_numbers, "sizes_ptr": numels}
        partials = torch.empty(starts[-1], dtype=torch.float64, device=device)
        coefficient = torch.empty((), dtype=torch.float64, device=device)
        launch_grad_norm(options, table, addresses, partials, runs, norm)
        finish_norm_kernel[(1,)](
            options,
            partials,
            starts[-1],
            total_norm,
            coefficient,
            NORM=norm,
            PARTIALS_BLOCK=PARTIALS_BLOCK,
            **LAUNCH_OPTIONS,
        )
        if norms is not None:
            tensor_norms_kernel[(len(rows),)](
                options,
                **table,
                order_ptr=places,
                partials_ptr=partials,
                norms_ptr=norms,
                NORM=norm,
                CHUNK=CHUNK,
                PARTIALS_BLOCK=PARTIALS_BLOCK,
                **LAUNCH_OPTIONS,
            )
        if max_norm != math.inf:
            for dtype, run in reversed(runs):
                scale_kernel[(run.num_chunks,)](
                    **table,
                    grads_ptr=addresses,
                    coefficient_ptr=coefficient,
                    first_row=run.first_row,
                    end_row=run.end_row,
                    last_chunk=run.first_chunk + run.num_chunks - 1,
                    **dtype_constants(dtype),
                    **LAUNCH_OPTIONS,
                )
    return total_norm


def specialisations() -> Iterator[Specialisation]:
    """Yield the forms of the kernels that training uses, for ahead-of-time checks."""
    options = {"options_ptr": "*fp64"}
    table = {"first_chunks_ptr": "*i64", "sizes_ptr": "*i64", "grads_ptr": "*i64"}
    rows = {"first_row": "i32", "end_row": "i32"}
    norm_types = {**options, **table, "partials_ptr": "*fp64", **rows, "first_chunk": "i32"}
    scale_types = {**table, "coefficient_ptr": "*fp64", **rows, "last_chunk": "i32"}
    finish_types = {
        **options,
        "partials_ptr": "*fp64",
        "num_partials": "i32",
        "total_norm_ptr": "*fp32",
        "coefficient_ptr": "*fp64",
    }
    tensor_norms_types = {
        **options,
        **dict.fromkeys(("first_chunks_ptr", "sizes_ptr", "order_ptr"), "*i64"),
        **dict.fromkeys(("partials_ptr", "norms_ptr"), "*fp64"),
    }
    wide_accesses = BLOCK_BYTES // (16 * NUM_THREADS)
    for dtype in TRITON_DTYPES:
        for norm in NORMS:
            constants = {"NORM": norm, **dtype_constants(dtype, norm)}
            sweeps = 2 if norm in ("l1", "l2") and dtype != torch.float64 else 1  # a lost sum
            yield Specialisation(grad_norm_kernel, norm_types, constants, sweeps * wide_accesses)
        constants = dtype_constants(dtype)
        yield Specialisation(scale_kernel, scale_types, constants, 2 * wide_accesses)
    for norm in NORMS:
        constants = {"NORM": norm, "PARTIALS_BLOCK": PARTIALS_BLOCK}
        yield Specialisation(finish_norm_kernel, finish_types, constants)
        yield Specialisation(tensor_norms_kernel, tensor_norms_types, {**constants, "CHUNK": CHUNK})
