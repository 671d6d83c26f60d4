"""Operators ``grad_norm`` and ``clip_grad_norm_``: the definition in pure torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def norm_dtype(grads: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of a norm: float64 if any gradient is, float32 otherwise."""
    double = (torch.float64, torch.complex128)
    return torch.float64 if any(grad.dtype in double for grad in grads) else torch.float32


def total_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all gradients as one vector: a float64 scalar on the first one's device.

    Sums are taken in float64, so squares of 1e20 do not overflow.
    """
    if not grads:
        return torch.zeros((), dtype=torch.float64)
    device = grads[0].device
    norms = [
        torch.linalg.vector_norm(grad, norm_type, dtype=_wide(grad)).to(device)
        for grad in grads
        if grad.numel() > 0  # the infinity norm of nothing is an error in torch
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    if norm_type == 0.0:  # number of non-zero elements: adds up instead of counting tensors
        return torch.stack(norms).sum()
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm


def tensor_norms(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of each gradient, float64 on the first one's device; 0 of an empty one."""
    norms = torch.zeros(len(grads), dtype=torch.float64, device=grads[0].device)
    for norm, grad in zip(norms, grads, strict=True):
        if grad.numel() > 0:
            norm.copy_(torch.linalg.vector_norm(grad, norm_type, dtype=_wide(grad)))
    return norms


def _wide(grad: Tensor) -> torch.dtype:
    return torch.complex128 if grad.is_complex() else torch.float64


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return ``min(1, max_norm / (norm + 1e-6))`` in float64; NaN if the norm is NaN."""
    if max_norm == math.inf:
        return torch.ones_like(norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def grad_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Return the norm of all gradients as one vector, in :func:`norm_dtype`."""
    return total_norm(grads, norm_type).to(norm_dtype(grads))


def clip_grad_norm_(grads: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Scale the gradients so that their norm is at most ``max_norm``; return the norm before."""
    norm = total_norm(grads, norm_type)
    scale_(grads, clip_coefficient(norm, max_norm))
    return norm.to(norm_dtype(grads))


def is_on_host(value: Tensor) -> bool:
    """Whether there is a value that can be read without waiting: a FakeTensor has none."""
    return value.device.type == "cpu" and type(value) is Tensor


def scale_(grads: Sequence[Tensor], coefficient: Tensor) -> None:
    """Multiply by a float64 scalar; halves are multiplied in float32, which keeps small factors."""
    if is_on_host(coefficient) and coefficient.item() == 1.0:
        return  # elsewhere asking would wait for the device
    for grad in map(_without_repeats, grads):
        factor = coefficient.to(grad.device)
        if grad.dtype in _HALF:
            grad.copy_(grad.float().mul_(factor.float()))
        else:
            grad.mul_(factor)


def _without_repeats(grad: Tensor) -> Tensor:
    """Return a view that holds the elements of an expanded gradient once each."""
    if grad.layout == torch.strided:
        for dim, stride in enumerate(grad.stride()):
            if stride == 0 and grad.size(dim) > 1:
                grad = grad.narrow(dim, 0, 1)
    return grad
