"""Operator ``adamw_``: norm, clipping and the update of all parameters of one device.

The definition in pure torch (:func:`adamw_`) is the oracle of every kernel and the fallback where
there is none. ``csrc/core/adamw.h`` states the same formulas for the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .clip_grad_norm import clip_coefficient, norm_dtype, total_norm

ROUNDINGS = ("nearest", "stochastic", "kahan", "master")

# Sums over the elements of a parameter: see UpdateStats in csrc/core/adamw.h.
UPDATE_STATS = ("grad_sq", "weight_sq", "update_sq", "moved", "stuck")


@dataclass
class Columns:
    """Parameters with state, all on one device: what stays the same from step to step.

    Every list has one entry per parameter. State tensors have the parameter's shape and strides.
    """

    params: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor | None]  # None without amsgrad
    residuals: list[Tensor | None]  # Kahan compensation or float32 master, None without
    steps: list[Tensor]  # float32 scalars
    groups: list[int]  # index into the hyper-parameters
    streams: list[int]  # position in the optimizer: keys the noise of stochastic rounding


class Hyper(NamedTuple):
    """Hyper-parameters of one parameter group."""

    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool
    amsgrad: bool
    decoupled_weight_decay: bool


class Options(NamedTuple):
    """What holds for the whole call."""

    max_norm: float | None = None
    norm_type: float = 2.0
    skip_nonfinite: bool = False
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    rounding: str = "nearest"
    seed: int = 0

    @property
    def needs_norm(self) -> bool:
        """Whether the gradients have to be read before the update."""
        return self.max_norm is not None or self.skip_nonfinite


class Outcome(NamedTuple):
    """What a step tells: both are scalars on the parameters' device."""

    total_norm: Tensor | None  # norm of the unscaled gradients; None if it was not needed
    skipped: Tensor | None  # bool; None if the step could not be skipped


@torch.no_grad()
def adamw_(
    columns: Columns,
    grads: Sequence[Tensor | None],
    hypers: Sequence[Hyper],
    options: Options,
    update_stats: Tensor | None = None,
) -> Outcome:
    """Update every parameter whose gradient is not None.

    Their rows of ``update_stats``, float64 ``[P, len(UPDATE_STATS)]``, are written too, unless the
    step is skipped.
    """
    present = [grad for grad in grads if grad is not None]
    if not present:
        return Outcome(None, None)
    inv_scale: Tensor | float = 1.0
    if options.grad_scale is not None:
        inv_scale = options.grad_scale.double().reciprocal()
    grad_factor, norm, skip = inv_scale, None, None
    if options.needs_norm:
        norm = total_norm(present, options.norm_type) * inv_scale
        if options.max_norm is not None:
            grad_factor = clip_coefficient(norm, options.max_norm) * inv_scale
        if options.skip_nonfinite:
            skip = ~norm.isfinite()
        norm = norm.to(norm_dtype(present))
    if options.found_inf is not None:
        found = options.found_inf != 0  # a sum over devices: not only 1
        skip = found if skip is None else skip | found
    if skip is not None:
        skip = skip.reshape(())
    for row, grad in enumerate(grads):
        if grad is not None:
            hyper = hypers[columns.groups[row]]
            before = None if update_stats is None else _value(columns, row, options)
            _update_one(columns, row, grad, hyper, options, grad_factor, skip)
            if update_stats is not None and before is not None:
                sums = _sums_of_update(grad, before, _value(columns, row, options))
                _store(update_stats[row], sums, skip)
    return Outcome(norm, skip)


def _value(columns: Columns, row: int, options: Options) -> Tensor:
    """Return a float64 copy of what the next step would read of a parameter."""
    stored, residual = columns.params[row], columns.residuals[row]
    opmath = torch.float64 if stored.dtype == torch.float64 else torch.float32
    return _load_param(stored, residual, options.rounding, opmath).to(torch.float64, copy=True)


def _sums_of_update(grad: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return a row of :data:`UPDATE_STATS`."""
    wide = grad.double()
    moved = ~(after == before)  # NaN counts as moved
    stuck = ~moved & (wide != 0)
    squares = [values.square().sum() for values in (wide, before, after - before)]
    return torch.stack([*squares, moved.sum().double(), stuck.sum().double()])


def _update_one(
    columns: Columns,
    row: int,
    grad: Tensor,
    hyper: Hyper,
    options: Options,
    grad_factor: Tensor | float,
    skip: Tensor | None,
) -> None:
    stored = columns.params[row]
    opmath = torch.float64 if stored.dtype == torch.float64 else torch.float32
    step = columns.steps[row] + 1
    lr = hyper.lr.double().reshape(()) if isinstance(hyper.lr, Tensor) else hyper.lr
    bias_correction1 = 1 - hyper.beta1 ** step.double()
    bias_correction2 = 1 - hyper.beta2 ** step.double()
    step_size = (lr / bias_correction1).to(opmath)

    param = _load_param(stored, columns.residuals[row], options.rounding, opmath)
    exp_avg = columns.exp_avgs[row].to(opmath)
    exp_avg_sq = columns.exp_avg_sqs[row].to(opmath)
    max_exp_avg_sq = columns.max_exp_avg_sqs[row]

    grad = grad.to(opmath) * _scalar(-grad_factor if hyper.maximize else grad_factor, opmath)
    if hyper.weight_decay != 0 and not hyper.decoupled_weight_decay:
        grad = grad + hyper.weight_decay * param
    exp_avg = torch.lerp(exp_avg, grad, 1 - hyper.beta1)
    grad_sq = grad * grad
    exp_avg_sq = torch.where(
        exp_avg_sq.isinf(), exp_avg_sq + grad_sq, torch.lerp(exp_avg_sq, grad_sq, 1 - hyper.beta2)
    )
    second_moment = exp_avg_sq
    if hyper.amsgrad:
        assert max_exp_avg_sq is not None
        second_moment = torch.maximum(max_exp_avg_sq.to(opmath), exp_avg_sq)
    denom = second_moment.sqrt() * bias_correction2.rsqrt().to(opmath) + hyper.eps
    update = step_size * (exp_avg / denom)
    if hyper.decoupled_weight_decay:
        decay = _scalar(lr * hyper.weight_decay, opmath) * param
        update = update + torch.where(param.isfinite(), decay, 0.0)  # infinity stays infinity
    param = param - update

    _store_param(stored, columns.residuals[row], param, options, columns.streams[row], step, skip)
    _store(columns.exp_avgs[row], exp_avg, skip)
    _store(columns.exp_avg_sqs[row], exp_avg_sq, skip)
    if hyper.amsgrad:
        assert max_exp_avg_sq is not None
        _store(max_exp_avg_sq, second_moment, skip)
    _store(columns.steps[row], step, skip)


def _scalar(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _store(stored: Tensor, value: Tensor, skip: Tensor | None) -> None:
    value = value.to(stored.dtype)
    stored.copy_(value if skip is None else torch.where(skip, stored, value))


def _load_param(
    stored: Tensor, residual: Tensor | None, rounding: str, opmath: torch.dtype
) -> Tensor:
    param = stored.to(opmath)
    if residual is None:
        return param
    if rounding == "kahan":
        return param + residual.to(opmath)
    # A master whose rounding is not the parameter is stale: the parameter was set from outside.
    return torch.where(residual.to(stored.dtype) == stored, residual, param)


def _store_param(
    stored: Tensor,
    residual: Tensor | None,
    param: Tensor,
    options: Options,
    stream: int,
    step: Tensor,
    skip: Tensor | None,
) -> None:
    is_half = stored.dtype in (torch.float16, torch.bfloat16)
    if options.rounding == "stochastic" and is_half:
        noise = noise_bits(options.seed, stream, step, stored)
        _store(stored, round_stochastic(param, noise, stored.dtype), skip)
        return
    rounded = param.to(stored.dtype)
    if options.rounding == "master" and residual is not None:
        _store(residual, param, skip)
    elif options.rounding == "kahan" and residual is not None:
        # Infinity minus infinity: nothing is left to compensate.
        lost = torch.where(rounded.isfinite(), param - rounded.to(param.dtype), 0.0)
        _store(residual, lost, skip)
    _store(stored, rounded, skip)


# --- counter-based noise: csrc/core/noise.h in int64 arithmetic ---


def _multiply32(x: Tensor, factor: int) -> Tensor:
    return (x * factor) & 0xFFFFFFFF  # int64 wraps; the low 32 bits stay right


def _mix_bits(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = _multiply32(x, 0x7FEB352D)
    x = x ^ (x >> 15)
    x = _multiply32(x, 0x846CA68B)
    return x ^ (x >> 16)


def noise_bits(seed: int, stream: int, step: Tensor, like: Tensor) -> Tensor:
    """Return 32 random bits per element of ``like``, counted in memory order, as int64."""

    def constant(value: int) -> Tensor:
        return torch.tensor(value & 0xFFFFFFFF, dtype=torch.int64, device=like.device)

    count = step.to(torch.int64)
    low = _mix_bits(constant(seed) ^ _mix_bits(constant(stream)))
    high = _mix_bits(constant(seed >> 32) ^ _mix_bits(~count & 0xFFFFFFFF))
    first = _mix_bits((low + high) & 0xFFFFFFFF)
    second = _mix_bits(low ^ _multiply32(high, 0x9E3779B9))
    element = element_index(like)
    bits = _mix_bits((element & 0xFFFFFFFF) ^ first)
    bits = bits + second + _multiply32(element >> 32, 0x9E3779B9)
    return _mix_bits(bits & 0xFFFFFFFF)


def element_index(like: Tensor) -> Tensor:
    """Number the elements in memory order (row-major order if ``like`` has gaps)."""
    index = torch.arange(like.numel(), device=like.device)
    dense = torch.empty_like(like, memory_format=torch.preserve_format)
    return index.as_strided(dense.size(), dense.stride())


def round_stochastic(value: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 to bfloat16 or float16: up with the probability of the cut part."""
    bits = value.view(torch.int32).to(torch.int64) & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        cut = ((bits + (noise & 0xFFFF)) >> 16).clamp(max=0x7F7F)
    else:
        fraction = noise & 0x1FFF
        small = bits < 0x38800000  # below 2^-14 the last bit is worth 2^-24
        scaled = torch.where(small, value.abs(), 0.0) * 2.0**24 + fraction.float() * 2.0**-13
        cut = ((bits - (112 << 23) + fraction) >> 13).clamp(max=0x7BFF)
        cut = torch.where(small, scaled.to(torch.int64), cut)
    rounded = cut.to(torch.int16).view(dtype)
    rounded = torch.where(value.signbit(), -rounded, rounded)
    return torch.where(value.isfinite(), rounded, value.to(dtype))
