"""Operators ``focal_loss_forward`` and ``_backward``: the definition in pure torch.

:func:`composite` is the loss in torch's own operators, with derivatives of every order.
:func:`forward` and :func:`backward` take what kernels take (``csrc/core/arguments.h``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# The place of a name is its number in csrc/core/focal_loss.h.
REDUCTIONS = ("none", "mean", "sum")

NO_BACKGROUND = -(2**63)
PROBABILITY_UNIT = 2.0**-32


class Options(NamedTuple):
    """What a call asks for beside its tensors; kernels take the values in this order."""

    softmax: bool
    reduction: int
    gamma: float
    alpha: float  # sigmoid: below 0 for none; softmax: a factor
    label_smoothing: float
    ignore_index: int
    background: int


class ClassVectors(NamedTuple):
    """Values of the classes, each ``[C]`` or None."""

    alpha: Tensor | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None


def composite(input: Tensor, target: Tensor, classes: ClassVectors, options: Options) -> Tensor:
    """Return the loss of ``input`` ``[N, C, *]`` in its dtype.

    Args:
        input: logits, in the dtype to compute in.
        target: int64 labels ``[N, *]`` or probabilities ``[N, C, *]``.
        classes: vectors of the classes.
        options: the rest.
    """
    return reduce(*terms(input, target, classes, options), options)


def terms(
    input: Tensor, target: Tensor, classes: ClassVectors, options: Options
) -> tuple[Tensor, Tensor]:
    """Return the losses before reduction, and what their mean divides by."""
    form = _softmax if options.softmax else _sigmoid
    return form(input, target, classes, options)


def reduce(losses: Tensor, normalizer: Tensor, options: Options) -> Tensor:
    """Return the losses, their sum or their mean."""
    reduction = REDUCTIONS[options.reduction]
    if reduction == "none":
        return losses
    return losses.sum() / normalizer if reduction == "mean" else losses.sum()


def _sigmoid(
    x: Tensor, target: Tensor, classes: ClassVectors, options: Options
) -> tuple[Tensor, Tensor]:
    alpha, weight, pos_weight = (_per_class(v, x) for v in classes)
    if is_labels(target):
        ignored = (target == options.ignore_index).unsqueeze(1).expand_as(x)
        target = is_label(target, x, options).to(x.dtype)
    else:
        ignored = target == options.ignore_index
    x = x.masked_fill(ignored, 0.0)
    t = target.to(x.dtype).masked_fill(ignored, 0.0)
    t = t * (1 - options.label_smoothing) + options.label_smoothing / 2
    q = t * (-x).sigmoid() + (1 - t) * x.sigmoid()  # 1 - p_t, without a difference
    log_q = F.logsigmoid(torch.where(t > 0.5, -x, x))  # where q is so small that t is 0 or 1
    log_p = F.logsigmoid(x) if pos_weight is None else pos_weight * F.logsigmoid(x)
    ce = -(t * log_p + (1 - t) * F.logsigmoid(-x))
    losses = _power(q, log_q, options.gamma) * ce
    share = alpha if alpha is not None else options.alpha
    if alpha is not None or options.alpha >= 0:
        losses = losses * (share * t + (1 - share) * (1 - t))
    if weight is not None:
        losses = losses * weight
    return losses.masked_fill(ignored, 0.0), (~ignored).sum()


def _softmax(
    x: Tensor, target: Tensor, classes: ClassVectors, options: Options
) -> tuple[Tensor, Tensor]:
    alpha, weight, _ = (_per_class(v, x) for v in classes)
    smoothing, num_classes = options.label_smoothing, x.shape[1]
    factor = options.alpha if alpha is None else alpha
    if not is_labels(target):
        ignored = torch.zeros_like(target[:, 0], dtype=torch.bool)
        normalizer = (~ignored).sum()
        t = target.to(x.dtype) * (1 - smoothing) + smoothing / num_classes
    else:
        ignored = target == options.ignore_index
        x = x.masked_fill(ignored.unsqueeze(1), 0.0)
        label = is_label(target, x, options)
        normalizer = (~ignored).sum()
        if weight is not None:
            normalizer = (label * weight).sum()
        t = label * (1 - smoothing) + smoothing / num_classes
    if weight is not None:
        factor = factor * weight
    if is_labels(target) and smoothing == 0:
        q, log_q, ce = _one_class(x, label)
        losses = _power(q, log_q, options.gamma) * ce * (label * factor).sum(1)
    else:
        top = torch.zeros_like(x, dtype=torch.bool).scatter(1, x.argmax(1, keepdim=True), True)
        q, log_q, ce = _one_class(x, top)
        log_p = F.log_softmax(x, 1)
        p = log_p.exp().masked_fill(top, 0.0)
        q, log_q, ce = (
            torch.where(top, of_top.unsqueeze(1), of_others)
            for of_top, of_others in ((q, 1 - p), (log_q, (-p).log1p()), (ce, -log_p))
        )
        # A class that is not in the target adds nothing, whatever its logit is.
        terms = torch.where(t == 0, 0.0, t * _power(q, log_q, options.gamma) * ce)
        losses = (terms * factor).sum(1)
    return losses.masked_fill(ignored, 0.0), normalizer


def _one_class(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return 1 - p, its logarithm and -log(p) of one class in every row: two of a sigmoid."""
    if x.shape[1] == 1:  # there is no other
        zero = x[:, 0] * 0
        return zero, zero - math.inf, zero
    u = x.masked_fill(chosen, -math.inf).logsumexp(1) - (x * chosen).sum(1)
    return u.sigmoid(), F.logsigmoid(u), -F.logsigmoid(-u)


def _power(q: Tensor, log_q: Tensor, gamma: float) -> Tensor:
    """Return ``q ** gamma``, with finite derivatives of first and second order for every q."""
    if gamma == 0:
        return torch.ones_like(q)
    small = q < torch.finfo(q.dtype).smallest_normal ** 0.5
    return torch.where(small, (gamma * log_q).exp(), q.masked_fill(small, 1.0) ** gamma)


def _per_class(vector: Tensor | None, x: Tensor) -> Tensor | None:
    return None if vector is None else vector.to(x.dtype).view(1, -1, *[1] * (x.dim() - 2))


def is_labels(target: Tensor) -> bool:
    """Whether a target holds labels, not probabilities."""
    return not target.dtype.is_floating_point


def is_label(target: Tensor, x: Tensor, options: Options) -> Tensor:
    """Return for labels ``[N, *]`` which elements of ``[N, C, *]`` are those of the label."""
    of_class = torch.arange(x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))
    target = target.unsqueeze(1)
    counts = target != options.ignore_index
    if not options.softmax:
        counts = counts & (target != options.background)
    return (target == of_class) & counts


def check_labels(target: Tensor, num_classes: int, options: Options) -> None:
    """Fail if a label is no class; on other devices than the CPU it is they who fail, later."""
    if not is_labels(target):
        return
    good = (target >= 0) & (target < num_classes) | (target == options.ignore_index)
    if not options.softmax:
        good |= target == options.background
    if target.device.type != "cpu":
        torch._assert_async(good.all())
    elif not good.all():
        position = int(good.flatten().byte().argmin())
        raise IndexError(
            f"Target {int(target.flatten()[position])} is out of bounds: "
            f"target.flatten()[{position}] must be in [0, {num_classes}) or ignore_index "
            f"({options.ignore_index})"
        )


def measure(input: Tensor, target: Tensor, options: Options) -> Tensor:
    """Return ``stats`` of ``csrc/core/arguments.h`` as int64 ``[2 * C + 1]``."""
    if is_labels(target):
        ignored = target == options.ignore_index
        chosen = is_label(target, input, options)
    elif options.softmax:
        ignored = torch.zeros_like(target[:, 0], dtype=torch.bool)
        chosen = torch.zeros_like(target, dtype=torch.bool)
        chosen = chosen.scatter(1, target.argmax(1, keepdim=True), True)
    else:
        ignored = target == options.ignore_index
        chosen = (target > 0.5) & ~ignored
    if options.softmax:
        p_t = input.softmax(1)
    else:
        p_t = input.sigmoid()
        if not is_labels(target):
            p_t = target * p_t + (1 - target) * (1 - p_t)
    dims = [dim for dim in range(input.dim()) if dim != 1]
    units = (torch.where(chosen, p_t, 0.0).double() / PROBABILITY_UNIT).nan_to_num(0.0)
    parts = (chosen.sum(dims), units.round().long().sum(dims), ignored.sum().reshape(1))
    return torch.cat(parts)


def _in_order(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return memory as it lies in another shape."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    return tensor.detach().as_strided(shape, strides)


def forward(
    input: Tensor,
    outer: int,
    num_classes: int,
    inner: int,
    target: Tensor,
    softmax: bool,
    reduction: int,
    gamma: float,
    alpha: float,
    alphas: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    background: int,
    loss: Tensor,
    saved: Tensor | None,
    normalizer: Tensor | None,
    stats: Tensor | None,
    grad_input: Tensor | None,
) -> None:
    """Write ``loss`` and what else is not None, but ``saved``: ``FocalLossArgs`` in torch."""
    options = Options(softmax, reduction, gamma, alpha, label_smoothing, ignore_index, background)
    classes = ClassVectors(alphas, weight, pos_weight)
    x, target = _rows(input, target, outer, num_classes, inner)
    check_labels(target, num_classes, options)
    x = x.double().requires_grad_(grad_input is not None)
    with torch.set_grad_enabled(grad_input is not None):
        losses, divisor = terms(x, target, classes, options)
        total = reduce(losses, divisor, options)
    if grad_input is not None:
        (grad,) = torch.autograd.grad(total, x)
        _in_order(grad_input, x.shape).copy_(grad)
    _in_order(loss, losses.shape if reduction == 0 else ()).copy_(total.detach())
    if normalizer is not None:
        normalizer.copy_(divisor)
    if stats is not None:
        stats.copy_(measure(x.detach(), target, options))


def backward(
    grad_output: Tensor,
    input: Tensor,
    outer: int,
    num_classes: int,
    inner: int,
    target: Tensor,
    softmax: bool,
    reduction: int,
    gamma: float,
    alpha: float,
    alphas: Tensor | None,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    background: int,
    saved: Tensor | None,
    normalizer: Tensor | None,
    grad_input: Tensor,
) -> None:
    """Write ``grad_input``; ``saved`` and ``normalizer`` are not needed here."""
    options = Options(softmax, reduction, gamma, alpha, label_smoothing, ignore_index, background)
    x, target = _rows(input, target, outer, num_classes, inner)
    with torch.enable_grad():
        x = x.double().requires_grad_()
        losses, divisor = terms(x, target, ClassVectors(alphas, weight, pos_weight), options)
        total = reduce(losses, divisor, options)
    (grad,) = torch.autograd.grad(total, x, _in_order(grad_output, total.shape).double())
    _in_order(grad_input, x.shape).copy_(grad)


def _rows(
    input: Tensor, target: Tensor, outer: int, num_classes: int, inner: int
) -> tuple[Tensor, Tensor]:
    shape = (outer, num_classes, inner)
    labels = (outer, inner)
    return _in_order(input, shape), _in_order(target, labels if is_labels(target) else shape)
