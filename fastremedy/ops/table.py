"""Tensor tables: what a backend keeps of the parameters of one device from step to step.

:class:`NativeTable` hands it to the native library, which reads the gradients itself;
:class:`PythonTable` serves the backends that are written in Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import _native
from . import adamw as definition
from . import dispatch, shards
from .adamw import Columns, Hyper, Options, Outcome

Group = dict[str, Any]


@dataclass
class Rows:
    """The parameters with state of one device."""

    device: torch.device
    columns: Columns
    owners: list[Tensor] = field(default_factory=list)  # as the param groups hold them
    indirect: list[bool] = field(default_factory=list)  # the kernels see a copy or a real view
    stateless: list[Tensor] = field(default_factory=list)  # have had no gradient so far


class Table(Protocol):
    """What the optimizer needs of a backend."""

    def gather(
        self, param_groups: list[Group], state: Mapping[Tensor, dict[str, Any]]
    ) -> list[int] | None:
        """Read gradients; return rows to hand over by set_grad, or None if out of date."""

    def set_grad(self, row: int, grad: Tensor) -> None:
        """Set a gradient with the layout of the row's parameter."""

    def grads(self) -> list[Tensor | None]:
        """Return this step's gradients as the kernels see them, None where there is none."""

    def step(
        self, options: Options, num_skipped: Tensor, update_stats: Tensor | None = None
    ) -> Outcome:
        """Update all parameters that have a gradient; see ``adamw_`` for ``update_stats``."""


def make_table(
    backend: str, rows: Rows, param_groups: list[Group], state: Mapping[Tensor, dict[str, Any]]
) -> Table:
    """Return the table of a backend."""
    if backend in ("cpu", "cuda"):
        return NativeTable(backend, rows, param_groups, state)
    return PythonTable(backend, rows, param_groups, state)


def one_of_each_storage(steps: list[Tensor]) -> list[Tensor]:
    """Return those steps that have to be looked at to see that none has got other memory.

    Steps that lie in one vector are given other memory all at once, if at all: to look at each of
    1000 takes 0.3 ms where they are in no cache.
    """
    return list({step.untyped_storage()._cdata: step for step in steps}.values())


def address_of(tensor: Tensor) -> int:
    """Return where the elements are; 0 where there are none, as in a FakeTensor, which warns."""
    return 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()


class NativeTable:
    """A table in the native library."""

    def __init__(
        self,
        backend: str,
        rows: Rows,
        param_groups: list[Group],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        """Build the table; it holds references to all tensors."""
        module = _native.module_for(backend)
        columns = rows.columns
        retained = 0
        if module is _native.library() and columns.params:
            state_columns = (
                columns.exp_avgs,
                columns.exp_avg_sqs,
                columns.max_exp_avg_sqs,
                columns.residuals,
                one_of_each_storage(columns.steps),
            )
            tensors = [tensor for column in state_columns for tensor in column]
            retained = torch.ops.fastremedy._retain_tensors(
                columns.params, [tensor for tensor in tensors if tensor is not None]
            )
        self._table = module.AdamWTable(
            owners=rows.owners,
            specs=[p._spec if shards.is_dtensor(p) else None for p in rows.owners],
            params=columns.params,
            exp_avgs=columns.exp_avgs,
            exp_avg_sqs=columns.exp_avg_sqs,
            max_exp_avg_sqs=columns.max_exp_avg_sqs,
            residuals=columns.residuals,
            steps=columns.steps,
            groups=columns.groups,
            streams=columns.streams,
            indirect=rows.indirect,
            stateless=rows.stateless,
            param_groups=param_groups,
            state=state,
            retained=retained,
            note_update=functools.partial(torch.autograd.graph.increment_version, columns.params),
        )
        # To make another one like it takes half the time that it takes to name dtype and device.
        self._norms = [
            torch.empty((), dtype=dtype, device=rows.device)
            for dtype in (torch.float32, torch.float64)
        ]
        num_bytes = self._table.workspace_bytes()
        # Owned by the table, not shared: a captured graph keeps using it.
        self._workspace = (
            torch.zeros(num_bytes, dtype=torch.uint8, device=rows.device) if num_bytes else None
        )
        self.gather = self._table.gather
        self.set_grad = self._table.set_grad
        self.grads = self._table.grads

    def step(
        self, options: Options, num_skipped: Tensor, update_stats: Tensor | None = None
    ) -> Outcome:
        """Update all parameters that have a gradient."""
        table = self._table
        if table.num_grads == 0:
            return Outcome(None, None)
        norm = None
        if options.needs_norm:
            norm = torch.empty_like(self._norms[table.has_float64_grad])
        table.step(
            math.inf if options.max_norm is None else options.max_norm,
            options.norm_type,
            options.needs_norm,
            options.skip_nonfinite,
            options.grad_scale,
            options.found_inf,
            definition.ROUNDINGS.index(options.rounding),
            options.seed,
            0 if norm is None else norm.data_ptr(),
            num_skipped.data_ptr(),
            0 if update_stats is None else update_stats.data_ptr(),
            0 if self._workspace is None else self._workspace.data_ptr(),
        )
        return Outcome(norm, None)


class PythonTable:
    """A table for the Triton kernels or for the definition in torch."""

    def __init__(
        self,
        backend: str,
        rows: Rows,
        param_groups: list[Group],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        """Remember what the columns were built from."""
        self._rows = rows
        self._steps = one_of_each_storage(rows.columns.steps)
        self._signature = self._sign(param_groups, state)
        self._grads: list[Tensor | None] = [None] * len(rows.owners)
        self._hypers = [hyper_of(group) for group in param_groups]
        owners = zip(rows.owners, rows.indirect, strict=True)
        self._indirect = [indirect or shards.is_dtensor(owner) for owner, indirect in owners]
        self._kernels = None
        if backend == "triton":
            self._kernels = dispatch.triton_kernels("adamw").AdamW(rows.columns)

    def _sign(
        self, param_groups: list[Group], state: Mapping[Tensor, dict[str, Any]]
    ) -> list[object]:
        """Name everything that the columns depend on: they are current while this stays equal."""
        signature: list[object] = []
        for group in param_groups:
            signature += [id(param) for param in group["params"]]
            signature.append(_flag("amsgrad", group["amsgrad"]))
        for param, values in state.items():
            signature.append(id(param))
            if isinstance(values, dict):  # torch lets users keep anything in `state`
                signature += [id(value) for value in values.values()]
        columns = self._rows.columns
        signature += [(address_of(p), p.shape, p.stride()) for p in columns.params]
        moments = (columns.exp_avgs, columns.exp_avg_sqs, columns.max_exp_avg_sqs)
        states = (*moments, columns.residuals, self._steps)
        signature += [address_of(t) for column in states for t in column if t is not None]
        return signature

    def gather(
        self, param_groups: list[Group], state: Mapping[Tensor, dict[str, Any]]
    ) -> list[int] | None:
        """Read gradients; return rows to hand over by set_grad, or None if out of date."""
        if self._sign(param_groups, state) != self._signature:
            return None
        if any(param.grad is not None for param in self._rows.stateless):
            return None
        self._hypers = [hyper_of(group) for group in param_groups]
        self._grads = [owner.grad for owner in self._rows.owners]
        rows = zip(self._grads, self._rows.columns.params, self._indirect, strict=True)
        return [
            i
            for i, (grad, param, indirect) in enumerate(rows)
            if grad is not None and (indirect or not _matches(grad, param))
        ]

    def set_grad(self, row: int, grad: Tensor) -> None:
        """Set a gradient with the layout of the row's parameter."""
        if not _matches(grad, self._rows.columns.params[row]):
            raise ValueError(
                f"gradient of row {row} must have the parameter's device, dtype, shape and strides"
            )
        self._grads[row] = grad

    def grads(self) -> list[Tensor | None]:
        """Return this step's gradients as the kernels see them, None where there is none."""
        return self._grads

    def step(
        self, options: Options, num_skipped: Tensor, update_stats: Tensor | None = None
    ) -> Outcome:
        """Update all parameters that have a gradient."""
        columns, grads = self._rows.columns, self._grads
        self._grads = [None] * len(grads)
        if self._kernels is None:
            outcome = definition.adamw_(columns, grads, self._hypers, options, update_stats)
        else:
            outcome = self._kernels.step(grads, self._hypers, options, update_stats)
            torch.autograd.graph.increment_version(columns.params)
        if outcome.skipped is not None:
            num_skipped += outcome.skipped
        return outcome


def _matches(grad: Tensor, param: Tensor) -> bool:
    same_kind = (grad.dtype == torch.float64) == (param.dtype == torch.float64)
    return (
        same_kind
        and grad.dtype in dispatch.KERNEL_DTYPES
        and grad.layout == torch.strided
        and grad.device == param.device
        and grad.shape == param.shape
        and grad.stride() == param.stride()
        and not grad.is_neg()
    )


def hyper_of(group: Group) -> Hyper:
    """Return the hyper-parameters of a param group.

    Raises:
        TypeError: one is not a number; the message names it.
        ValueError: ``betas`` is not a pair.
    """
    lr, betas = group["lr"], group["betas"]
    if not hasattr(betas, "__len__") or len(betas) != 2:
        raise ValueError(f"betas must be a pair of numbers, got {betas!r}")
    return Hyper(
        lr if isinstance(lr, Tensor) and lr.numel() == 1 else _number("lr", lr),
        _number("betas[0]", betas[0]),
        _number("betas[1]", betas[1]),
        _number("eps", group["eps"]),
        _number("weight_decay", group["weight_decay"]),
        _flag("maximize", group["maximize"]),
        _flag("amsgrad", group["amsgrad"]),
        _flag("decoupled_weight_decay", group["decoupled_weight_decay"]),
    )


def _number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        pass
    raise TypeError(f"{name} must be a number or a 1-element float tensor, got {value!r}")


def _flag(name: str, value: Any) -> bool:
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be True or False, got {value!r}") from None
