"""Norm, clipping and AdamW for all parameters of one device: ``csrc/core/adamw.h`` in Triton.

Launches: the norm, once per dtype of the gradients; one small kernel that turns the norm into the
factor of the gradients, decides whether to skip, advances the steps and computes the coefficients
of each parameter; the update, once per combination of dtypes; and if its statistics are wanted, one
small kernel that adds those of the chunks. The host never waits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fastremedy.ops.adamw import ROUNDINGS, Columns, Hyper, Options, Outcome
from fastremedy.ops.clip_grad_norm import norm_dtype

from .adamw_kernels import NUM_COEFFICIENTS, NUM_HYPERS, prepare_kernel, update_kernel
from .adamw_stats_kernels import NUM_UPDATE_STATS, finish_update_stats_kernel
from .clip_grad_norm import NORMS, PARTIALS_BLOCK, launch_grad_norm, norm_name
from .multi_tensor import (
    CHUNK,
    LAUNCH_OPTIONS,
    NUM_THREADS,
    TRITON_DTYPES,
    first_chunks,
    float_words,
    is_capturing,
    keep_for_graph,
    split_runs,
    stream_id,
    upload,
)
from .specialisation import Specialisation

ROWS_BLOCK = 256  # parameters whose coefficients are computed at a time
CHUNKS_BLOCK = 64  # chunks whose statistics are added at a time

# Elements that a thread updates at a time if it adds statistics, too: eight spill up to 88 bytes.
MAX_MEASURED = 4

# The address of an empty gradient, which is never read: torch gives 0, which here means None.
EMPTY_GRAD = 16

# Columns that the update reads, as its arguments are called.
TABLE = (
    "first_chunks_ptr",
    "sizes_ptr",
    "params_ptr",
    "exp_avgs_ptr",
    "exp_avg_sqs_ptr",
    "max_exp_avg_sqs_ptr",
    "residuals_ptr",
    "steps_ptr",
    "streams_ptr",
)


class Form(NamedTuple):
    """What tells one launch of the update from another."""

    grad: torch.dtype
    param: torch.dtype
    state: torch.dtype
    residual: torch.dtype | None
    amsgrad: bool

    def applied(self, rounding: str) -> str:
        """Return the rounding that this form applies: wide parameters hold the value itself."""
        is_half = self.param in (torch.float16, torch.bfloat16)
        needs_residual = rounding in ("kahan", "master")
        return "nearest" if not is_half or (needs_residual and not self.residual) else rounding

    def accesses(self, rounding: str) -> list[torch.dtype]:
        """Return the dtype of each load and store of an element."""
        num_moments = 3 if self.amsgrad else 2
        dtypes = [self.grad, *[self.param] * 2, *[self.state] * (2 * num_moments)]
        if self.residual is not None and self.applied(rounding) in ("kahan", "master"):
            dtypes += [self.residual] * 2
        return dtypes

    def constants(self, rounding: str, measures: bool) -> dict[str, object]:
        """Return the constants of the update kernel."""
        # One 16-byte access per thread for the widest dtype: with more, values of the narrower ones
        # would have to change threads through shared memory.
        widest = max(dtype.itemsize for dtype in self.accesses(rounding))
        per_thread = 16 // widest
        if measures:
            per_thread = min(per_thread, MAX_MEASURED)
        return {
            "GRAD": TRITON_DTYPES[self.grad],
            "PARAM": TRITON_DTYPES[self.param],
            "STATE": TRITON_DTYPES[self.state],
            "RESIDUAL": TRITON_DTYPES[self.residual or self.param],
            "ROUNDING": self.applied(rounding),
            "AMSGRAD": self.amsgrad,
            "OPMATH": tl.float64 if self.param == torch.float64 else tl.float32,
            "MEASURES": measures,
            "CHUNK": CHUNK,
            "BLOCK": per_thread * NUM_THREADS,
        }


class AdamW:
    """The update of a fixed set of parameters; equal in meaning to ``fastremedy.ops.adamw.adamw_``.

    Args:
        columns: parameters with state, all on one device, dense, with one layout in each row.
    """

    def __init__(self, columns: Columns) -> None:
        """Send what does not change to the device."""
        self._columns = columns  # keeps the tensors alive
        self._order = sorted(range(len(columns.params)), key=lambda row: str(self._form(row)))
        sizes = [columns.params[row].numel() for row in self._order]
        self._first_chunks = first_chunks(sizes)
        self._set_grad_dtypes([columns.params[row].dtype for row in self._order])
        self._sent: tuple[tuple[int, list[int]], Tensor] | None = None
        if not columns.params:
            return
        self._device = columns.params[0].device
        table = {
            "first_chunks_ptr": self._first_chunks[:-1],
            "sizes_ptr": sizes,
            "params_ptr": self._addresses(columns.params),
            "exp_avgs_ptr": self._addresses(columns.exp_avgs),
            "exp_avg_sqs_ptr": self._addresses(columns.exp_avg_sqs),
            "max_exp_avg_sqs_ptr": self._addresses(columns.max_exp_avg_sqs),
            "residuals_ptr": self._addresses(columns.residuals),
            "steps_ptr": self._addresses(columns.steps),
            "streams_ptr": [columns.streams[row] for row in self._order],
            "groups_ptr": [columns.groups[row] for row in self._order],
            "order_ptr": self._order,
        }
        with torch.cuda.device_of(columns.params[0]):
            self._words = upload([*itertools.chain(*table.values())], self._device)
        self._table = dict(zip(table, self._words.view(len(table), -1).unbind(), strict=True))
        self._groups, self._rows = map(self._table.pop, ("groups_ptr", "order_ptr"))

    def _addresses(self, column: Sequence[Tensor | None]) -> list[int]:
        tensors = (column[row] for row in self._order)
        return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def _form(self, row: int, grad: torch.dtype | None = None) -> Form:
        columns = self._columns
        param, residual = columns.params[row].dtype, columns.residuals[row]
        return Form(
            param if grad is None else grad,
            param,
            columns.exp_avgs[row].dtype,
            None if residual is None else residual.dtype,
            columns.max_exp_avg_sqs[row] is not None,
        )

    def _set_grad_dtypes(self, dtypes: list[torch.dtype]) -> None:
        forms = [self._form(row, dtype) for row, dtype in zip(self._order, dtypes, strict=True)]
        self._grad_dtypes = dtypes
        self._norm_runs = split_runs(dtypes, self._first_chunks)
        self._update_runs = split_runs(forms, self._first_chunks)

    @torch.no_grad()
    def step(
        self,
        grads: Sequence[Tensor | None],
        hypers: Sequence[Hyper],
        options: Options,
        update_stats: Tensor | None = None,
    ) -> Outcome:
        """Update every parameter whose gradient is not None.

        Args:
            grads: of any supported dtype, each with the layout of its parameter.
            hypers: one for each group that the columns name. A tensor as ``lr`` is a float32
                scalar on the parameters' device, or on the CPU.
            options: what holds for the whole call.
            update_stats: contiguous float64 of shape [P, NUM_UPDATE_STATS]; the rows of updated
                parameters are written.
        """
        present = [grad for grad in grads if grad is not None]
        if not present:
            return Outcome(None, None)
        rows = [grads[row] for row in self._order]
        known = zip(rows, self._grad_dtypes, strict=True)
        dtypes = [dtype if grad is None else grad.dtype for grad, dtype in known]
        if dtypes != self._grad_dtypes:
            self._set_grad_dtypes(dtypes)
        reads_grads = options.needs_norm and any(grad.numel() > 0 for grad in present)
        norm = norm_name(options.norm_type) if reads_grads else "none"
        total_norm = skipped = None
        with torch.cuda.device_of(present[0]):
            limits, seed, lrs, addresses, hyper_rows = self._send(rows, hypers, options)
            if options.needs_norm:
                total_norm = self._empty(norm_dtype(present))
                if not reads_grads:
                    total_norm.zero_()
            if options.skip_nonfinite or options.found_inf is not None:
                skipped = self._empty(torch.bool)
            num_chunks, measures = self._first_chunks[-1], update_stats is not None
            # Of the norm; once that is known, of the update.
            size = num_chunks * NUM_UPDATE_STATS.value if measures else num_chunks
            partials = self._empty(torch.float64, size)
            coefficients = self._empty(torch.float64, len(rows), NUM_COEFFICIENTS.value)
            if reads_grads:
                launch_grad_norm(limits, self._table, addresses, partials, self._norm_runs, norm)
            prepare_kernel[(1,)](
                limits,
                hyper_rows,
                lrs,
                addresses,
                self._groups,
                self._table["steps_ptr"],
                partials,
                num_chunks,
                len(rows),
                options.grad_scale,
                options.found_inf,
                total_norm,
                skipped,
                coefficients,
                NORM=norm,
                SKIP_NONFINITE=options.skip_nonfinite,
                PARTIALS_BLOCK=PARTIALS_BLOCK,
                ROWS_BLOCK=ROWS_BLOCK,
                **LAUNCH_OPTIONS,
            )
            for form, run in reversed(self._update_runs):
                update_kernel[(run.num_chunks,)](
                    **self._table,
                    grads_ptr=addresses,
                    seed_ptr=seed,
                    coefficients_ptr=coefficients,
                    skipped_ptr=skipped,
                    partials_ptr=partials,
                    first_row=run.first_row,
                    end_row=run.end_row,
                    last_chunk=run.first_chunk + run.num_chunks - 1,
                    **form.constants(options.rounding, measures),
                    **LAUNCH_OPTIONS,
                )
            if measures:
                finish_update_stats_kernel[(len(rows),)](
                    self._table["first_chunks_ptr"],
                    self._table["sizes_ptr"],
                    addresses,
                    self._rows,
                    partials,
                    skipped,
                    update_stats,
                    CHUNK=CHUNK,
                    CHUNKS_BLOCK=CHUNKS_BLOCK,
                    **LAUNCH_OPTIONS,
                )
        return Outcome(total_norm, skipped)

    def _empty(self, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _send(
        self, rows: Sequence[Tensor | None], hypers: Sequence[Hyper], options: Options
    ) -> tuple[Tensor, ...]:
        """Return what changes from step to step; it is sent again only if it has changed."""
        max_norm = math.inf if options.max_norm is None else options.max_norm
        lrs = [_lr_words(hyper.lr, self._device) for hyper in hypers]
        words = [
            *float_words(max_norm, options.norm_type),
            (options.seed + 2**63) % 2**64 - 2**63,
            *(address for _, address in lrs),
            *(0 if grad is None else grad.data_ptr() or EMPTY_GRAD for grad in rows),
        ]
        for hyper, (lr, _) in zip(hypers, lrs, strict=True):
            words += float_words(
                lr,
                hyper.beta1,
                hyper.beta2,
                hyper.eps,
                hyper.weight_decay,
                hyper.maximize,
                hyper.decoupled_weight_decay,
            )
        key = stream_id(self._device), words
        if is_capturing(self._device):
            keep_for_graph(self._words)
            sent = upload(words, self._device)
        elif self._sent is not None and self._sent[0] == key:
            sent = self._sent[1]
        else:
            sent = upload(words, self._device)
            self._sent = key, sent
        parts = sent.split([2, 1, len(hypers), len(rows), len(hypers) * NUM_HYPERS.value])
        limits, seed, lr_addresses, grad_addresses, hyper_rows = parts
        floats = torch.float64
        return limits.view(floats), seed, lr_addresses, grad_addresses, hyper_rows.view(floats)


def _lr_words(lr: float | Tensor, device: torch.device) -> tuple[float, int]:
    """Return a learning rate as a number, or else as an address."""
    if not isinstance(lr, Tensor):
        return lr, 0
    if lr.numel() == 1 and lr.device == device and lr.dtype == torch.float32:
        return 0.0, lr.data_ptr()
    if lr.numel() == 1 and lr.device.type == "cpu":
        return float(lr), 0
    raise ValueError(
        f"lr as a tensor must have one element and be float32 on {device}, or be on the CPU, got "
        f"{lr.dtype} of shape {list(lr.shape)} on {lr.device}"
    )


def specialisations() -> Iterator[Specialisation]:
    """Yield the forms of the kernels that training uses, for ahead-of-time checks."""
    prepare_types = {
        "options_ptr": "*fp64",
        "hypers_ptr": "*fp64",
        "lrs_ptr": "*i64",
        "grads_ptr": "*i64",
        "groups_ptr": "*i64",
        "steps_ptr": "*i64",
        "partials_ptr": "*fp64",
        "num_partials": "i32",
        "num_rows": "i32",
        "grad_scale_ptr": "*fp32",
        "found_inf_ptr": "*fp32",
        "total_norm_ptr": "*fp32",
        "skipped_ptr": "*i1",
        "coefficients_ptr": "*fp64",
    }
    for norm in ("none", *NORMS):
        constants = {
            "NORM": norm,
            "SKIP_NONFINITE": True,
            "PARTIALS_BLOCK": PARTIALS_BLOCK,
            "ROWS_BLOCK": ROWS_BLOCK,
        }
        yield Specialisation(prepare_kernel, prepare_types, constants)
        constants = {**constants, "SKIP_NONFINITE": False}
        absent: tuple[str, ...] = ("grad_scale_ptr", "found_inf_ptr", "skipped_ptr")
        absent += ("total_norm_ptr",) if norm == "none" else ()
        yield _without(absent, Specialisation(prepare_kernel, prepare_types, constants))
    update_types = {
        **dict.fromkeys(TABLE, "*i64"),
        "grads_ptr": "*i64",
        "seed_ptr": "*i64",
        "coefficients_ptr": "*fp64",
        "skipped_ptr": "*i1",
        "partials_ptr": "*fp64",
        "first_row": "i32",
        "end_row": "i32",
        "last_chunk": "i32",
    }
    for measures, (form, rounding) in itertools.product((False, True), _usual_forms()):
        accesses = form.accesses(rounding)
        widest = max(dtype.itemsize for dtype in accesses)
        wide_accesses = sum(dtype.itemsize == widest for dtype in accesses)
        if measures and widest * MAX_MEASURED < 16:
            wide_accesses = 0
        constants = form.constants(rounding, measures)
        one = Specialisation(update_kernel, update_types, constants, wide_accesses)
        yield one if measures or form.amsgrad else _without(("skipped_ptr",), one)
    finish_types = {
        **dict.fromkeys(("first_chunks_ptr", "sizes_ptr", "grads_ptr", "order_ptr"), "*i64"),
        "partials_ptr": "*fp64",
        "skipped_ptr": "*i1",
        "update_stats_ptr": "*fp64",
    }
    constants = {"CHUNK": CHUNK, "CHUNKS_BLOCK": CHUNKS_BLOCK}
    yield Specialisation(finish_update_stats_kernel, finish_types, constants)


def _without(absent: Sequence[str], form: Specialisation) -> Specialisation:
    types = {name: kind for name, kind in form.types.items() if name not in absent}
    return replace(form, types=types, constants={**form.constants, **dict.fromkeys(absent)})


def _usual_forms() -> Iterator[tuple[Form, str]]:
    for amsgrad in (False, True):
        for dtype in (torch.float32, torch.float64):
            yield Form(dtype, dtype, dtype, None, amsgrad), "nearest"
        yield Form(torch.float32, torch.float32, torch.bfloat16, None, amsgrad), "nearest"
        for half in (torch.bfloat16, torch.float16):
            for state in (half, torch.float32):
                for rounding in ROUNDINGS:
                    residual = {"kahan": half, "master": torch.float32}.get(rounding)
                    yield Form(half, half, state, residual, amsgrad), rounding
