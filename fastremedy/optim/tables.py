"""The tables of an optimizer: one for every device, built anew when something has changed."""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from .. import backends
from ..ops import shards
from ..ops.dispatch import KERNEL_DTYPES, is_capturing
from ..ops.table import Group, Table, make_table
from .rows import LocalRows, aligned_grad, fits, init_state, make_rows, name_of, raise_misfit

State = MutableMapping[Tensor, dict[str, Any]]


class Tables:
    """Builds and keeps the tables; hands them out with this step's gradients in them."""

    def __init__(self) -> None:
        """Build nothing yet."""
        self.lock = threading.RLock()  # gradients wait in a table from gathering to the update
        self._tables: list[tuple[LocalRows, Table]] | None = None
        self._built_for: tuple[str | None, str, torch.dtype | None] | None = None
        #: Process groups of all parameters, in their order, which ranks share.
        self.everyone: dict[shards.Groups, torch.device] = {}
        self._captured: list[Table] = []  # a CUDA graph uses their memory as long as it lives

    @property
    def are_built(self) -> bool:
        """Whether there are tables, which may be out of date."""
        return self._tables is not None

    def gather(
        self,
        param_groups: list[Group],
        state: State,
        low_precision: str,
        state_dtype: torch.dtype | None,
    ) -> list[tuple[LocalRows, Table]]:
        """Return tables that have read the gradients; create the state of new parameters.

        Raises:
            RuntimeError: a gradient is sparse, or a CUDA graph cannot capture the step.
            ValueError: a parameter or gradient does not fit; the message names it.
        """
        wanted = backends.choice(), low_precision, state_dtype
        for _ in range(2):
            if self._tables is None or self._built_for != wanted:
                self._tables = None
                self._tables = self._build(param_groups, state, low_precision, state_dtype)
                self._built_for = wanted
            if all(self._read(*pair, param_groups, state) for pair in self._tables):
                return self._tables
            self._tables = None
        raise RuntimeError("param_groups or state changed while the step was reading them")

    def _read(self, rows: LocalRows, table: Table, param_groups: list[Group], state: State) -> bool:
        unread = table.gather(param_groups, state) if rows.is_in_place else None
        if unread is None:
            return False
        rows.grads.clear()
        for row in unread:
            owner = rows.owners[row]
            grad = owner.grad
            assert grad is not None
            if not rows.is_current(row):
                return False
            memory = shards.memory_as(grad, owner)
            if memory is None or not _takes(table, row, memory):
                if not fits(owner, grad):
                    raise_misfit(owner, grad, name_of(owner, param_groups))
                memory = shards.local(shards.placed_as(grad, owner))
                if not _takes(table, row, aligned_grad(memory, rows.columns.params[row])):
                    return False  # an empty parameter of another dtype, which has no address
            rows.grads[row] = memory
        if is_capturing():
            if rows.device.type != "cuda":
                raise RuntimeError(
                    f"parameters are on the {rows.device.type.upper()}, where a CUDA graph replays "
                    "nothing: step them outside the capture"
                )
            self._captured.append(table)
        return True

    def _build(
        self,
        param_groups: list[Group],
        state: State,
        low_precision: str,
        state_dtype: torch.dtype | None,
    ) -> list[tuple[LocalRows, Table]]:
        fresh: dict[torch.device, list[tuple[Tensor, bool]]] = {}
        chosen: dict[torch.device, str] = {}
        for group in param_groups:
            for param in group["params"]:
                if param.device not in chosen:
                    chosen[param.device] = _backend_for(param)
                check_param(param, param_groups)
                if param.grad is not None:
                    if not fits(param, param.grad):
                        raise_misfit(param, param.grad, name_of(param, param_groups))
                    if not state.get(param):
                        fresh.setdefault(param.device, []).append((param, group["amsgrad"]))
        if is_capturing():
            raise RuntimeError(
                "the optimizer has memory to set up, which a CUDA graph cannot capture: run "
                "at least one step with all gradients before the capture"
            )
        for params in fresh.values():
            init_state(params, state, state_dtype)
        all_params = [param for group in param_groups for param in group["params"]]
        self.everyone = shards.everyone(all_params, shards.groups_of(all_params))
        tables = []
        for device, backend in chosen.items():
            rows = make_rows(param_groups, state, device, low_precision)
            tables.append((rows, make_table(backend, rows, param_groups, state)))
        return tables


def _backend_for(param: Tensor) -> str:
    # Where the memory of a training step is estimated there is none for kernels.
    is_fake = isinstance(shards.local(param), FakeTensor)
    return "torch" if is_fake else backends.active("adamw", param.device)


def _takes(table: Table, row: int, grad: Tensor) -> bool:
    try:
        table.set_grad(row, grad)
    except ValueError:  # other strides, or another kind of number
        return False
    return True


def check_param(param: Tensor, param_groups: list[Group]) -> None:
    """Refuse a parameter that no kernel can update.

    Raises:
        ValueError: its dtype is not a float or complex one, or its elements share memory.
    """
    if is_lazy(param):  # nothing to update before its module's first forward
        return
    if param.dtype not in (*KERNEL_DTYPES, torch.complex64, torch.complex128):
        raise ValueError(
            f"{name_of(param, param_groups)} must be float32, float64, float16, bfloat16, "
            f"complex64 or complex128, got {param.dtype}"
        )
    memory = shards.local(param)
    dims = zip(memory.shape, memory.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in dims):
        raise ValueError(
            f"{name_of(param, param_groups)} must have memory for every element, "
            f"got shape {tuple(param.shape)} with strides {param.stride()}"
        )


def raise_if_nonfinite(norm: Tensor, param_groups: list[Group]) -> None:
    """Name the first gradient that is to blame for a norm, which all ranks have.

    Raises:
        RuntimeError: the norm is NaN or infinite because a gradient is, or it cannot be read now.
    """
    if is_capturing():
        raise RuntimeError(
            "nonfinite='error' reads the norm, which a CUDA graph cannot capture: use 'skip'"
        )
    if bool(norm.isfinite()):
        return
    is_sharded = False
    for group in param_groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            is_sharded |= shards.is_dtensor(param)
            grad = shards.local(param.grad)
            if not bool(grad.isfinite().all()):
                raise RuntimeError(
                    f"gradient of {name_of(param, param_groups)} must be finite, "
                    f"got {int((~grad.isfinite()).sum())} NaN or infinite of {grad.numel()} "
                    "elements; nothing was changed"
                )
    if is_sharded:
        raise RuntimeError("gradients must be finite, got another rank's NaN or infinity")
