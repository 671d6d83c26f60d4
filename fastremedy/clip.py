"""Gradient clipping, as in :mod:`torch.nn.utils`, with norms that do not overflow."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from .ops import dispatch, shards


class Observer(Protocol):
    """Sees what :func:`clip_` clips."""

    def before_clipping(self, tensors: list[Tensor]) -> None:
        """See the parameters whose gradients are about to be clipped."""

    def after_clipping(self, tensors: list[Tensor], norms: Tensor) -> None:
        """See the 2-norms before clipping, float64, of those tensors that have a gradient."""


observers: list[Observer] = []

_clip_uncompiled = _disable_dynamo(dispatch.clip_grad_norm_)


def clip_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Clip the norm of the gradients of ``parameters``, seen as one vector, in place.

    Equivalent to: :func:`torch.nn.utils.clip_grad_norm_`.

    Differs in:
        - The norm is float32 (float64 if a gradient is) and its sums do not overflow: float16
          gradients of 1e4 and float32 gradients of 1e20 are clipped instead of set to zero.
          (Sums are float64: the squares of float64 gradients above 1e154 overflow, as in torch.)
        - Gradients stay untouched, to the bit, when the norm + 1e-6 is within ``max_norm``.
        - Empty gradients are fine for every ``norm_type``; ``norm_type=0`` counts elements.
        - A negative or NaN ``max_norm`` is an error. An infinite one measures only.
        - The result is bitwise the same for any number of threads.
        - DTensors, as FSDP2 and tensor parallelism make them, have one norm of the whole model: a
          plain tensor on every rank, where torch returns a DTensor. So ``norm.item()`` needs no
          ``full_tensor()`` before it, and ``if isinstance(norm, DTensor)`` around one stays right.
          Every rank must make the call. Shards are scaled in place.

    Args:
        parameters: a tensor or an iterable of tensors, of any device, dtype, strides and placement.
            Those without gradient are passed over.
        max_norm: largest norm allowed, at least 0.
        norm_type: p of the p-norm, any number or ``inf`` or ``-inf``; 1, 2 and inf are fast.
        error_if_nonfinite: raise if the norm is NaN or infinite; this waits for the device.
        foreach: accepted as torch does, without effect.

    Returns:
        The norm before clipping: a scalar on the device of the first gradient; 0 if there is none.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
        NotImplementedError: a gradient is sparse, as in torch.
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set, or a CUDA graph is
            captured with it. Nothing is changed.

    Example:
        >>> import torch, fastremedy
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> fastremedy.clip_(weight, max_norm=1.0)
        tensor(5.)
        >>> weight.grad
        tensor([0.6000, 0.8000])
    """
    max_norm = float(max_norm)
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be a number >= 0, got {max_norm}")
    tensors = _as_list(parameters)
    norm_type = float(norm_type)
    with torch.no_grad():
        if error_if_nonfinite:
            if dispatch.is_capturing():
                raise RuntimeError(
                    "error_if_nonfinite=True reads the norm, which a CUDA graph cannot capture"
                )
            norm = _clip(tensors, math.inf, norm_type)
            if not norm.isfinite():
                raise RuntimeError(
                    f"The total norm of order {norm_type} for gradients from "
                    "`parameters` is non-finite, so it cannot be clipped. To disable "
                    "this error and scale the gradients by the non-finite norm anyway, "
                    "set `error_if_nonfinite=False`"
                )
        if not observers or norm_type != 2.0:
            return _clip(tensors, max_norm, norm_type)
        return _clip_observed(tensors, max_norm)


def _clip(tensors: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    if not torch.compiler.is_compiling():
        return dispatch.clip_grad_norm_(tensors, max_norm, norm_type, from_grad=True)
    if any(map(shards.is_dtensor, tensors)):
        return _clip_uncompiled(tensors, max_norm, norm_type, from_grad=True)
    grads = [tensor.grad for tensor in tensors if tensor.grad is not None]
    operators = torch.ops.fastremedy
    norm: Tensor = (
        operators.grad_norm(grads, norm_type)
        if max_norm == math.inf
        else operators.clip_grad_norm_(grads, max_norm, norm_type)
    )
    return norm


@_disable_dynamo
def _clip_observed(tensors: list[Tensor], max_norm: float) -> Tensor:
    watching = list(observers)
    for observer in watching:
        observer.before_clipping(tensors)

    def observe(norms: Tensor) -> None:
        for observer in watching:
            observer.after_clipping(tensors, norms)

    return dispatch.clip_grad_norm_(tensors, max_norm, 2.0, from_grad=True, observe=observe)


def grad_norm(parameters: Tensor | Iterable[Tensor], norm_type: float = 2.0) -> Tensor:
    """Return the norm of the gradients of ``parameters``, seen as one vector; change nothing.

    Equivalent to: ``torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not
    None], norm_type)``, with the differences of :func:`clip_`.

    Args:
        parameters: a tensor or an iterable of tensors.
        norm_type: p of the p-norm.

    Returns:
        A scalar on the device of the first gradient, float32 (float64 if a gradient is); a plain
        one, equal on all ranks, for DTensors.

    Example:
        >>> import torch, fastremedy
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> fastremedy.grad_norm([weight])
        tensor(5.)
    """
    with torch.no_grad():
        return _clip(_as_list(parameters), math.inf, float(norm_type))


def clip_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamp every element of the gradients to ``[-clip_value, clip_value]``, in place.

    Equivalent to: :func:`torch.nn.utils.clip_grad_value_`, which does the work.

    Differs in: a negative or NaN ``clip_value`` is an error.

    Args:
        parameters: a tensor or an iterable of tensors.
        clip_value: largest magnitude allowed, at least 0.
        foreach: as in torch.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.

    Example:
        >>> import torch, fastremedy
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([-3.0, 0.5])
        >>> fastremedy.clip_value_(weight, 1.0)
        >>> weight.grad
        tensor([-1.0000,  0.5000])
    """
    clip_value = float(clip_value)
    if not clip_value >= 0:
        raise ValueError(f"clip_value must be a number >= 0, got {clip_value}")
    tensors = _as_list(parameters)
    if any(tensor.grad is not None for tensor in tensors):
        torch.nn.utils.clip_grad_value_(tensors, clip_value, foreach)


def _as_list(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    if isinstance(parameters, Tensor):
        return [parameters]
    tensors = list(parameters)
    if not tensors and isinstance(parameters, types.GeneratorType):
        warnings.warn(
            "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3
        )
    return tensors
