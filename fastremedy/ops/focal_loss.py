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


def class_factors(alpha: Sequence[float], device: torch.device | None = None) -> Tensor:
    """Return a factor for each class as float32."""
    try:
        return torch.tensor(alpha, dtype=torch.float32, device=device)
    except (TypeError, ValueError) as error:
        raise TypeError(f"alpha must be one number or one for each class, got {alpha!r}") from error


def compute_dtype(input: Tensor) -> torch.dtype:
    """Return what :func:`composite` needs for 1e-6 in float32: torch's own operators round log(q).

    Where there is no float64 the error is 4e-6.
    """
    return torch.float32 if input.device.type == "mps" else torch.float64


def composite(input: Tensor, target: Tensor, classes: ClassVectors, options: Options) -> Tensor:
    """Return the loss of ``input`` ``[N, C, *]`` in its dtype.

    Args:
        input: logits, in the dtype to compute in.
        target: int64 labels ``[N, *]`` or probabilities ``[N, C, *]``.
        classes: vectors of the classes.
        options: the rest.
    """
    call = problem(input, target, classes, options)
    return reduce(call.losses(options.gamma), call.normalizer, options)


def reduce(losses: Tensor, normalizer: Tensor, options: Options) -> Tensor:
    """Return the losses, their sum or their mean."""
    reduction = REDUCTIONS[options.reduction]
    if reduction == "none":
        return losses
    return losses.sum() / normalizer if reduction == "mean" else losses.sum()


class Terms(NamedTuple):
    """What the loss of an element or class consists of."""

    q: Tensor  # 1 - p_t, not as a difference
    log_q: Tensor
    ce: Tensor  # cross entropy

    def power(self, gamma: float) -> Tensor:
        """Return ``q ** gamma``, with finite derivatives of first and second order."""
        if gamma == 0:
            return torch.ones_like(self.q)
        small = is_small(self.q)
        of_small = (gamma * self.log_q).exp()
        return torch.where(small, of_small, self.q.masked_fill(small, 1.0) ** gamma)


def is_small(q: Tensor) -> Tensor:
    """Whether q may have lost its digits, or a power of it would overflow."""
    return q < math.sqrt(torch.finfo(q.dtype).smallest_normal)


class Sigmoid(NamedTuple):
    """Every element of ``[N, C, *]`` with its target."""

    x: Tensor
    t: Tensor
    factor: Tensor | float  # alpha_t and weight
    pos_weight: Tensor | float
    ignored: Tensor
    normalizer: Tensor

    def terms(self) -> Terms:
        """Return what the loss consists of."""
        x, t = self.x, self.t
        q = t * (-x).sigmoid() + (1 - t) * x.sigmoid()
        log_q = F.logsigmoid(torch.where(t > 0.5, -x, x))  # where q is so small that t is 0 or 1
        ce = -(t * self.pos_weight * F.logsigmoid(x) + (1 - t) * F.logsigmoid(-x))
        return Terms(q, log_q, ce)

    def losses(self, gamma: float) -> Tensor:
        """Return the loss of every element."""
        terms = self.terms()
        return (terms.power(gamma) * terms.ce * self.factor).masked_fill(self.ignored, 0.0)

    def grads(self, gamma: float, grad_losses: Tensor) -> Tensor:
        """Return the gradient of ``x``."""
        t, terms, p, not_p = self.t, self.terms(), self.x.sigmoid(), (-self.x).sigmoid()
        slope = (1 - t) * p - self.pos_weight * t * not_p
        if gamma != 0:
            ratio = torch.where(is_small(terms.q), 1.0, p * not_p / terms.q)
            slope = slope + gamma * (1 - 2 * t) * ratio * terms.ce
        slope = terms.power(gamma) * slope * self.factor
        return (slope * grad_losses).masked_fill(self.ignored, 0.0)


class Softmax(NamedTuple):
    """Every row of ``[N, C, *]`` with the probabilities of its classes."""

    x: Tensor
    t: Tensor
    factor: Tensor | float  # alpha and weight
    ignored: Tensor
    normalizer: Tensor

    def terms(self) -> tuple[Terms, Tensor]:
        """Return what the loss consists of, and the probabilities."""
        x = self.x - self.x.detach().amax(1, keepdim=True)
        top = torch.zeros_like(x, dtype=torch.bool).scatter(1, x.argmax(1, keepdim=True), 1)
        log_p = F.log_softmax(x, 1)
        p = log_p.exp()
        others = p.masked_fill(top, 0.0)
        of_top, of_others = one_class(x, top), Terms(1 - others, (-others).log1p(), -log_p)
        q, log_q, ce = (torch.where(top, a, b) for a, b in zip(of_top, of_others, strict=True))
        # A class that is not in the target adds nothing, whatever its logit is.
        return Terms(q, log_q, ce.masked_fill((self.t == 0) & (log_p == -math.inf), 0.0)), p

    def losses(self, gamma: float) -> Tensor:
        """Return the loss of every row."""
        terms, _ = self.terms()
        losses = (self.t * terms.power(gamma) * terms.ce * self.factor).sum(1)
        return losses.masked_fill(self.ignored, 0.0)

    def grads(self, gamma: float, grad_losses: Tensor) -> Tensor:
        """Return the gradient of ``x``."""
        terms, p = self.terms()
        ce_by_q = torch.where(terms.q > 0, terms.ce / terms.q, 1.0)
        times = torch.where(p == 0, 1.0, 1 + gamma * p * ce_by_q)
        slopes = self.t * self.factor * terms.power(gamma) * times
        grads = p * (slopes.sum(1, keepdim=True) - slopes) - terms.q * slopes
        return (grads * grad_losses.unsqueeze(1)).masked_fill(self.ignored.unsqueeze(1), 0.0)


def one_class(x: Tensor, chosen: Tensor) -> Terms:
    """Return the terms of one class in every row, ``[N, 1, *]``: those of a sigmoid."""
    if x.shape[1] == 1:  # there is no other
        zero = x * 0
        return Terms(zero, zero - math.inf, zero)
    others = x.masked_fill(chosen, -math.inf).logsumexp(1, keepdim=True)
    u = others - x.masked_fill(~chosen, 0.0).sum(1, keepdim=True)
    return Terms(u.sigmoid(), F.logsigmoid(u), -F.logsigmoid(-u))


def problem(
    x: Tensor, target: Tensor, classes: ClassVectors, options: Options
) -> Sigmoid | Softmax:
    """Return logits and targets ``[N, C, *]`` in the dtype of ``x``, and what they count."""
    alpha, weight, pos_weight = (_per_class(v, x) for v in classes)
    share = options.alpha if alpha is None else alpha
    smoothing = options.label_smoothing
    ignored = target == options.ignore_index  # rows with labels, otherwise elements
    has_labels = is_labels(target)
    if has_labels:
        rows, ignored = ignored, ignored.unsqueeze(1).expand_as(x)
        t = is_label(target, x, options).to(x.dtype)
    else:
        if options.softmax:
            ignored = torch.zeros_like(ignored)
        rows = ignored[:, 0]
        t = target.to(x.dtype)
    x, t = x.masked_fill(ignored, 0.0), t.masked_fill(ignored, 0.0)
    if options.softmax:
        normalizer = (~rows).sum()
        if weight is not None and has_labels:
            normalizer = (t * weight).sum()
        t = t * (1 - smoothing) + smoothing / x.shape[1]
        return Softmax(x, t, share if weight is None else share * weight, rows, normalizer)
    t = t * (1 - smoothing) + smoothing / 2
    factor = 1.0 if weight is None else weight
    if alpha is not None or options.alpha >= 0:
        factor = factor * (share * t + (1 - share) * (1 - t))
    of_positives = 1.0 if pos_weight is None else pos_weight
    return Sigmoid(x, t, factor, of_positives, ignored, (~ignored).sum())


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
        chosen = chosen.scatter(1, target.argmax(1, keepdim=True), 1)
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
    assert grad_input is None, "kernels for the CPU alone write it with the loss"
    options = Options(softmax, reduction, gamma, alpha, label_smoothing, ignore_index, background)
    x, target = _rows(input, target, outer, num_classes, inner)
    check_labels(target, num_classes, options)
    call = problem(x.double(), target, ClassVectors(alphas, weight, pos_weight), options)
    result = reduce(call.losses(gamma), call.normalizer, options)
    _in_order(loss, result.shape).copy_(result)
    if normalizer is not None:
        normalizer.copy_(call.normalizer)
    if stats is not None:
        stats.copy_(measure(x.double(), target, options))


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
    call = problem(x.double(), target, ClassVectors(alphas, weight, pos_weight), options)
    name, shape = REDUCTIONS[reduction], (outer, inner) if softmax else x.shape
    grad_losses = _in_order(grad_output, shape if name == "none" else ()).double()
    if name == "mean":
        grad_losses = grad_losses / call.normalizer
    _in_order(grad_input, x.shape).copy_(call.grads(gamma, grad_losses.expand(shape)))


def _rows(
    input: Tensor, target: Tensor, outer: int, num_classes: int, inner: int
) -> tuple[Tensor, Tensor]:
    shape = (outer, num_classes, inner)
    labels = (outer, inner)
    return _in_order(input, shape), _in_order(target, labels if is_labels(target) else shape)
