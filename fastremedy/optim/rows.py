"""From an optimizer's groups and state to the columns that kernels take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops.adamw import Columns
from ..ops.dispatch import is_dense
from ..ops.table import Group, Rows

_HALF = (torch.float16, torch.bfloat16)
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
RESIDUAL_KEYS = {"kahan": "compensation", "master": "master_param"}


def init_state(
    params: list[tuple[Tensor, bool]],
    state: Mapping[Tensor, dict[str, Any]],
    state_dtype: torch.dtype | None,
) -> None:
    """Create the state of parameters of one device; each comes with its group's amsgrad flag.

    The steps are views of one vector: a kernel reads neighbours, and one allocation serves all.
    """
    if not params:
        return
    steps = torch.zeros(len(params), dtype=torch.float32, device=params[0][0].device)
    for (param, amsgrad), step in zip(params, steps.unbind(), strict=True):
        values = state[param]
        values["step"] = step
        for name in _MOMENTS[: 3 if amsgrad else 2]:
            values[name] = torch.zeros_like(
                param, dtype=_moment_dtype(param, state_dtype), memory_format=torch.preserve_format
            )


def _moment_dtype(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    if state_dtype is None or param.dtype == torch.float64 or param.is_complex():
        return param.dtype
    return state_dtype


def adopt_state(param: Tensor, values: dict[str, Any], amsgrad: bool, low_precision: str) -> None:
    """Bring loaded or hand-made state into the form that kernels take; keep what already has it."""
    step = values["step"]
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.device != param.device:
        values["step"] = torch.as_tensor(float(step), dtype=torch.float32, device=param.device)
    if amsgrad and "max_exp_avg_sq" not in values:
        values["max_exp_avg_sq"] = torch.zeros_like(values["exp_avg_sq"])
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
        values[key] = param.detach().to(residual_dtype)
    else:
        values[key] = torch.zeros_like(param, memory_format=torch.preserve_format)


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
    wanted = torch.empty_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if (stored.dtype, stored.device, stored.stride()) == (dtype, param.device, wanted.stride()):
        return stored
    return wanted.copy_(stored)


def make_rows(
    param_groups: list[Group],
    state: Mapping[Tensor, dict[str, Any]],
    device: torch.device,
    low_precision: str,
) -> Rows:
    """Collect the parameters of one device; those without state are listed apart."""
    columns = Columns([], [], [], [], [], [], [], [])
    rows = Rows(device, columns)
    key = RESIDUAL_KEYS.get(low_precision)
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
            adopt_state(param, values, group["amsgrad"], low_precision)
            dense = is_dense(param)
            rows.owners.append(param)
            rows.indirect.append(param.is_complex() or not dense)
            work = param if dense else torch.empty_like(param, memory_format=torch.preserve_format)
            residual = values[key] if key is not None and param.dtype in _HALF else None
            columns.params.append(as_real(work))
            columns.exp_avgs.append(as_real(values["exp_avg"]))
            columns.exp_avg_sqs.append(as_real(values["exp_avg_sq"]))
            columns.max_exp_avg_sqs.append(
                as_real(values["max_exp_avg_sq"]) if group["amsgrad"] else None
            )
            columns.residuals.append(residual)
            columns.steps.append(values["step"])
            columns.groups.append(g)
            columns.streams.append(stream - 1)
    return rows


def as_real(tensor: Tensor) -> Tensor:
    """Return complex numbers as pairs of reals; anything else as it is."""
    return torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor


def fits(param: Tensor, grad: Tensor) -> bool:
    """Whether a gradient can update a parameter, whatever its strides."""
    return (
        grad.layout == torch.strided
        and grad.shape == param.shape
        and grad.device == param.device
        and grad.is_complex() == param.is_complex()
        and (grad.is_floating_point() or grad.is_complex())
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
    ):
        if expected != got:
            raise ValueError(
                f"gradient of {name} must have the parameter's {what}, "
                f"expected {expected}, got {got}"
            )
    kind = "complex" if param.is_complex() else "real floating point"
    raise ValueError(f"gradient of {name} must be {kind} as the parameter is, got {grad.dtype}")


def aligned_grad(grad: Tensor, work: Tensor) -> Tensor:
    """Return a copy of a gradient with the strides of the tensor that kernels update."""
    real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    dtype = work.dtype if torch.float64 in (work.dtype, real.dtype) else real.dtype
    return torch.empty_like(work, dtype=dtype, memory_format=torch.preserve_format).copy_(real)
