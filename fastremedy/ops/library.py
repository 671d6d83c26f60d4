"""Registration: schema, fake and implementation of every operator.

The implementation is one function for all devices: it asks :mod:`fastremedy.backends` at run time.
Gradients do not flow through these operators; they run where the step of an optimizer runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backends
from . import dispatch
from .adamw import Columns, Options
from .clip_grad_norm import norm_dtype
from .table import Rows, make_table

_library = torch.library.Library("fastremedy", "FRAGMENT")
_library.define("grad_norm(Tensor[] grads, float norm_type=2.0) -> Tensor")
_library.define(
    "clip_grad_norm_(Tensor(a!)[] grads, float max_norm, float norm_type=2.0) -> Tensor"
)
_library.define(
    "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] residuals, Tensor(f!)[] state_steps, *, float lr, "
    "float beta1, float beta2, float eps, float weight_decay, bool maximize=False, "
    "bool decoupled_weight_decay=True, float? max_norm=None, float norm_type=2.0, "
    "bool skip_nonfinite=False, Tensor? grad_scale=None, Tensor? found_inf=None, "
    'str rounding="nearest", int seed=0) -> Tensor'
)


def _fake_norm(grads: list[Tensor], *_: object, **__: object) -> Tensor:
    if not grads:
        return torch.empty(())
    return torch.empty((), dtype=norm_dtype(grads), device=grads[0].device)


def _grad_norm(grads: list[Tensor], norm_type: float = 2.0) -> Tensor:
    return dispatch.clip_grad_norm_(list(grads), math.inf, norm_type, from_grad=False)


def _clip_grad_norm_(grads: list[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    return dispatch.clip_grad_norm_(list(grads), max_norm, norm_type, from_grad=False)


def _fake_adamw_(params: list[Tensor], grads: list[Tensor], *_: object, **__: object) -> Tensor:
    return _fake_norm(params)


def _adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    residuals: list[Tensor],
    state_steps: list[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    decoupled_weight_decay: bool = True,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    skip_nonfinite: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> Tensor:
    """Update dense parameters of one device with one set of hyper-parameters.

    Lists have one entry per parameter; ``max_exp_avg_sqs`` and ``residuals`` may be empty. Returns
    the norm of the gradients, 0 if neither ``max_norm`` nor ``skip_nonfinite`` needs it.
    """
    if not params:
        return torch.zeros(())
    count, device = len(params), params[0].device
    group = {
        "params": list(params),
        "lr": lr,
        "betas": (beta1, beta2),
        "eps": eps,
        "weight_decay": weight_decay,
        "amsgrad": bool(max_exp_avg_sqs),
        "maximize": maximize,
        "decoupled_weight_decay": decoupled_weight_decay,
    }
    columns = Columns(
        list(params),
        list(exp_avgs),
        list(exp_avg_sqs),
        list(max_exp_avg_sqs) if max_exp_avg_sqs else [None] * count,
        list(residuals) if residuals else [None] * count,
        list(state_steps),
        [0] * count,
        list(range(count)),
    )
    rows = Rows(device, columns, list(params), [False] * count)
    table = make_table(backends.active("adamw", device), rows, [group], {})
    for row, grad in enumerate(grads):
        table.set_grad(row, grad)
    options = Options(max_norm, norm_type, skip_nonfinite, grad_scale, found_inf, rounding, seed)
    num_skipped = torch.zeros((), dtype=torch.int64, device=device)
    norm = table.step(options, num_skipped).total_norm
    return torch.zeros((), dtype=norm_dtype(params), device=device) if norm is None else norm


for _name, _implementation, _fake in (
    ("grad_norm", _grad_norm, _fake_norm),
    ("clip_grad_norm_", _clip_grad_norm_, _fake_norm),
    ("adamw_", _adamw_, _fake_adamw_),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastremedy::{_name}", _fake, lib=_library)
