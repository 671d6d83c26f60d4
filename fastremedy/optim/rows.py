"""From an optimizer's groups and state to the columns that kernels take."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops import shards
from ..ops.adamw import Columns
from ..ops.dispatch import KERNEL_DTYPES, is_dense
from ..ops.table import Group, Rows, address_of

_HALF = (torch.float16, torch.bfloat16)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
RESIDUAL_KEYS = {"kahan": "compensation", "master": "master_param"}


@dataclass
class LocalRows(Rows):
    """Rows of parameters that may be DTensors, of which the kernels see what is on this rank."""

    memory: list[Tensor] = field(default_factory=list)  # of the owners
    groups: list[shards.Groups] = field(default_factory=list)  # of the owners
    grads: dict[int, Tensor] = field(default_factory=dict)  # memory of what tables did not read

    @functools.cached_property
    def sharded(self) -> list[int]:
        """Rows of DTensors."""
        return [i for i, owner in enumerate(self.owners) if shards.is_dtensor(owner)]

    @functools.cached_property
    def _sharded_owners(self) -> list[Tensor]:
        return [self.owners[i] for i in self.sharded]

    @functools.cached_property
    def _sharded_memory(self) -> list[Tensor]:
        return [self.memory[i] for i in self.sharded]

    def norm_terms(self, read: list[Tensor | None]) -> tuple[list[Tensor], list[shards.Groups]]:
        """Return memory of this step's gradients, and the process groups that have the rest.

        ``read`` holds what the table sees of them: of complex ones pairs of reals, another norm.
        """
        memory = list(read)
        for i, grad in self.grads.items():
            memory[i] = grad
        present = [(g, of) for g, of in zip(memory, self.groups, strict=True) if g is not None]
        return [grad for grad, _ in present], [groups for _, groups in present]

    @property
    def is_in_place(self) -> bool:
        """Whether every DTensor still has the memory that it had."""
        if not self.sharded:
            return True
        now = map(operator.attrgetter("_local_tensor"), self._sharded_owners)
        return all(map(operator.is_, now, self._sharded_memory))

    def is_current(self, row: int) -> bool:
        """Whether kernels, if they do not see a parameter itself, see what it is now.

        Tables look at addresses of what kernels see: a copy, or a complex parameter's memory.
        """
        memory, work = self.memory[row], self.columns.params[row]
        if memory.dtype.to_real() != work.dtype or memory.shape != work.shape[: memory.dim()]:
            return False
        if not memory.is_complex() or row in self._repacked:
            return True
        has_same_strides = work.stride()[:-1] == tuple(2 * stride for stride in memory.stride())
        return has_same_strides and address_of(memory) == address_of(work)

    @functools.cached_property
    def _repacked(self) -> frozenset[int]:
        works = zip(self.memory, self.columns.params, self.indirect, strict=True)
        return frozenset(
            i
            for i, (memory, work, indirect) in enumerate(works)
            if indirect and address_of(work) != address_of(memory)
        )

    def packed(self) -> list[tuple[Tensor, Tensor]]:
        """Return parameters with gaps in memory and the dense copies that kernels update."""
        return [
            (
                self.memory[i],
                torch.view_as_complex(self.columns.params[i])
                if self.memory[i].is_complex()
                else self.columns.params[i],
            )
            for i in self._repacked
            if self.owners[i].grad is not None
        ]

    @property
    def version(self) -> int:
        """Changes with the memory of DTensors that have a gradient."""
        for i in self.sharded:
            if self.owners[i].grad is not None:
                return self.memory[i]._version
        return 0

    def note_update(self, version: int) -> None:
        """Tell autograd that DTensors have changed, if :attr:`version` did."""
        if self.version != version:
            torch.autograd.graph.increment_version(self._sharded_owners)


def init_state(
    params: list[tuple[Tensor, bool]],
    state: Mapping[Tensor, dict[str, Any]],
    state_dtype: torch.dtype | None,
) -> None:
    """Create the state of parameters of one device; each comes with its group's amsgrad flag.

    The steps are views of one vector: a kernel reads neighbours, and one allocation serves all.
    Moments of one name are created together, which puts them side by side in memory as a kernel
    reads them: a CPU step of 1000 x 64 elements takes 15 % less, of 1000 x 1024 7 %.
    """
    if not params:
        return
    steps = torch.zeros(len(params), dtype=torch.float32, device=params[0][0].device)
    values: list[dict[str, Tensor]] = [{"step": step} for step in steps.unbind()]
    for name in _MOMENTS:
        for (param, amsgrad), theirs in zip(params, values, strict=True):
            if name == "max_exp_avg_sq" and not amsgrad:
                continue
            moment = torch.zeros_like(
                shards.local(param),
                dtype=_moment_dtype(param, state_dtype),
                memory_format=torch.preserve_format,
            )
            theirs[name] = shards.wrap(moment, param)
    for (param, _), theirs in zip(params, values, strict=True):  # memory may run out before
        state[param].update(theirs)


def _moment_dtype(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    if state_dtype is None or param.dtype == torch.float64 or param.is_complex():
        return param.dtype
    return state_dtype


def adopt_state(param: Tensor, values: dict[str, Any], amsgrad: bool, low_precision: str) -> None:
    """Bring loaded or hand-made state into the form that kernels take; keep what already has it."""
    _check_kinds(values)
    step = values["step"]
    if (
        not isinstance(step, Tensor)
        or (step.dtype, step.device) != (torch.float32, param.device)
        or step.numel() != 1
    ):
        values["step"] = torch.as_tensor(float(step), dtype=torch.float32, device=param.device)
    if amsgrad and "max_exp_avg_sq" not in values:
        second = values["exp_avg_sq"]
        values["max_exp_avg_sq"] = shards.wrap(torch.zeros_like(shards.local(second)), second)
    names = [name for name in _MOMENTS if name in values]
    dtype = _common_dtype(param, [values[name] for name in names])
    for name in names:
        values[name] = _like(values[name], param, dtype)
    key = RESIDUAL_KEYS.get(low_precision)
    if key is None or param.dtype not in _HALF:
        return
    residual_dtype = torch.float32 if low_precision == "master" else param.dtype
    if key in values:
        values[key] = _like(values[key], param, residual_dtype)
    elif low_precision == "master":
        values[key] = shards.wrap(shards.local(param).detach().to(residual_dtype), param)
    else:
        values[key] = shards.wrap(torch.zeros_like(shards.local(param)), param)


def _check_kinds(values: dict[str, Any]) -> None:
    if not hasattr(values.get("step"), "__float__"):
        raise ValueError(f"state['step'] must be a number, got {values.get('step')!r}")
    for name in {*_MOMENTS[:2], *values.keys() & _MOMENTS}:
        if not isinstance(values.get(name), Tensor):
            raise ValueError(f"state[{name!r}] must be a Tensor, got {values.get(name)!r}")


def _common_dtype(param: Tensor, moments: list[Tensor]) -> torch.dtype:
    if param.dtype == torch.float64 or param.is_complex():
        return param.dtype
    dtypes = {moment.dtype for moment in moments}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return torch.float32 if dtype == torch.float64 else dtype


def _like(stored: Tensor, param: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``stored``, or a copy with the dtype and the (dense) strides that kernels expect."""
    if stored.shape != param.shape:
        raise ValueError(
            f"state must have the shape of its parameter, expected {tuple(param.shape)}, "
            f"got {tuple(stored.shape)}"
        )
    if shards.is_dtensor(stored) != shards.is_dtensor(param):
        raise ValueError(
            "state must be a DTensor if and only if its parameter is one: load it by "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
        )
    placed = shards.placed_as(stored, param)
    source, memory = shards.local(placed), shards.local(param)
    wanted = torch.empty_like(memory, dtype=dtype, memory_format=torch.preserve_format)
    if (source.dtype, source.device, source.stride()) == (dtype, memory.device, wanted.stride()):
        return placed
    return shards.wrap(wanted.copy_(source), param)


def make_rows(
    param_groups: list[Group],
    state: Mapping[Tensor, dict[str, Any]],
    device: torch.device,
    low_precision: str,
) -> LocalRows:
    """Collect the parameters of one device; those without state are listed apart."""
    columns = Columns([], [], [], [], [], [], [], [])
    rows = LocalRows(device, columns)
    key = RESIDUAL_KEYS.get(low_precision)
    num_params = sum(len(group["params"]) for group in param_groups)
    stream = 0
    for g, group in enumerate(param_groups):
        for param in group["params"]:
            stream += 1
            if param.device != device:
                continue
            if not state.get(param):
                rows.stateless.append(param)
                continue
            values = state[param]
            try:
                adopt_state(param, values, group["amsgrad"], low_precision)
            except ValueError as error:
                raise ValueError(f"{name_of(param, param_groups)}: {error}") from error
            memory = shards.local(param)
            dense = is_dense(memory) and not memory.is_neg()
            rows.owners.append(param)
            rows.memory.append(memory)
            rows.indirect.append(param.is_complex() or not dense)
            work = memory if dense else torch.empty_like(memory)
            residual = values[key] if key is not None and param.dtype in _HALF else None
            columns.params.append(as_real(work))
            columns.exp_avgs.append(as_real(shards.local(values["exp_avg"])))
            columns.exp_avg_sqs.append(as_real(shards.local(values["exp_avg_sq"])))
            columns.max_exp_avg_sqs.append(
                as_real(shards.local(values["max_exp_avg_sq"])) if group["amsgrad"] else None
            )
            columns.residuals.append(None if residual is None else shards.local(residual))
            columns.steps.append(values["step"])
            columns.groups.append(g)
            # Shards of one parameter draw different noise, replicas the same.
            shard = shards.index_of(param)
            columns.streams.append((stream - 1 + shard * num_params) % 2**32)
    rows.groups = shards.groups_of(rows.owners)
    return rows


def name_of(param: Tensor, param_groups: list[Group]) -> str:
    """Return how a user would find a parameter: by its place, and by its name if it has one."""
    for g, group in enumerate(param_groups):
        for i, other in enumerate(group["params"]):
            if other is param:
                place = f"param_groups[{g}]['params'][{i}]"
                names: Iterable[str] | None = group.get("param_names")
                return f"{list(names)[i]} ({place})" if names else place
    raise AssertionError("the parameter is in none of the groups")


def as_real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of reals; anything else as it is."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def fits(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient can update a parameter, whatever its strides."""
    return (
        grad.layout == torch.strided
        and shards.is_dtensor(grad) == shards.is_dtensor(param)
        and grad.shape == param.shape
        and grad.device == param.device
        and grad.is_complex() == param.is_complex()
        and (grad.dtype in KERNEL_DTYPES or grad.is_complex())
    )


def raise_misfit(param: Tensor, grad: Tensor, name: str) -> NoReturn:
    """Say what is wrong with a gradient that does not fit.

    Raises:
        RuntimeError: the gradient is sparse.
        ValueError: its shape, device or dtype is not the parameter's; the message names it.
    """
    if grad.layout != torch.strided:
        raise RuntimeError(
            "Adam does not support sparse gradients, please consider SparseAdam instead"
        )
    for what, expected, got in (
        ("shape", tuple(param.shape), tuple(grad.shape)),
        ("device", param.device, grad.device),
        ("kind", _kind(param), _kind(grad)),
    ):
        if expected != got:
            raise ValueError(
                f"gradient of {name} must have the parameter's {what}, "
                f"expected {expected}, got {got}"
            )
    kind = "complex" if param.is_complex() else "real (float32, float64, float16 or bfloat16)"
    raise ValueError(f"gradient of {name} must be {kind} as the parameter is, got {grad.dtype}")


def _kind(tensor: Tensor) -> str:
    return "DTensor" if shards.is_dtensor(tensor) else "Tensor"


def aligned_grad(grad: Tensor, work: Tensor) -> Tensor:
    """Return a copy of a gradient with the strides of the tensor that kernels update."""
    real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    dtype = work.dtype if torch.float64 in (work.dtype, real.dtype) else real.dtype
    return torch.empty_like(work, dtype=dtype, memory_format=torch.preserve_format).copy_(real)
