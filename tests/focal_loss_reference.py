"""Focal loss by its definition: in 60 digits for single rows, in float64 for whole tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mpmath
import torch
from torch import Tensor
from torch.nn import functional as F

import fastremedy

from .reference import HALVES, UNIT_ROUNDOFF, wide

GAMMAS = (0.0, 0.25, 0.5, 1.0, 1.3, 2.0, 5.0)
FORMS = ("sigmoid", "softmax")

# Relative error of what is computed in a dtype; halves are computed in float32 and rounded once.
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6}


class Exact(NamedTuple):
    """A loss, its derivative, and the size of the terms that the derivative is the sum of."""

    loss: float
    slope: float
    magnitude: float


@functools.cache
def sigmoid_exactly(
    x: float, target: float, gamma: float, smoothing: float = 0.0, pos_weight: float = 1.0
) -> Exact:
    """Return the loss of one logit without alpha: (1 - p_t)^gamma CE, and its derivative."""
    with mpmath.workdps(60):
        u, g, t = mpmath.mpf(x), mpmath.mpf(gamma), mpmath.mpf(target)
        t = t * (1 - mpmath.mpf(smoothing)) + mpmath.mpf(smoothing) / 2
        p, not_p = 1 / (1 + mpmath.exp(-u)), 1 / (1 + mpmath.exp(u))
        q = t * not_p + (1 - t) * p
        q_slope = (1 - 2 * t) * p * not_p
        against, towards = (1 - t) * p, pos_weight * t * not_p
        # log1p(exp(1e4)) is exact: 60 digits are those of the mantissa.
        ce = pos_weight * t * mpmath.log1p(mpmath.exp(-u)) + (1 - t) * mpmath.log1p(mpmath.exp(u))
        factor = q**g
        of_q = g * q_slope / q * ce
        return Exact(
            float(factor * ce),
            float(factor * (of_q + against - towards)),
            float(factor * (abs(of_q) + against + towards)),
        )


class ExactRow(NamedTuple):
    """Of one row of classes: the loss, and :class:`Exact` of every logit."""

    loss: float
    slopes: list[float]
    magnitudes: list[float]


@functools.cache
def softmax_exactly(
    row: tuple[float, ...], weights: tuple[tuple[int, float], ...], gamma: float
) -> ExactRow:
    """Return the sum over ``weights`` (class, share) of share (1 - p)^gamma (-log p)."""
    with mpmath.workdps(60):
        x, g = [mpmath.mpf(value) for value in row], mpmath.mpf(gamma)
        top = max(range(len(x)), key=x.__getitem__)
        e = [mpmath.exp(value - x[top]) for value in x]
        rest = mpmath.fsum(value for c, value in enumerate(e) if c != top)
        p = [value / (1 + rest) for value in e]
        # No difference of numbers near 1: the others of the largest are summed.
        q = [rest / (1 + rest) if c == top else 1 - value for c, value in enumerate(p)]
        loss, slopes = mpmath.mpf(0), [mpmath.mpf(0)] * len(x)
        for c, share in weights:
            ce = x[top] - x[c] + mpmath.log1p(rest)
            factor = mpmath.mpf(share) * (q[c] ** g if gamma else 1)
            loss += factor * ce
            slopes[c] = factor * (1 + g * p[c] * (ce / q[c] if q[c] else 1))
        total = mpmath.fsum(slopes)
        grads = [p[c] * (total - slopes[c]) - q[c] * slopes[c] for c in range(len(x))]
        sizes = [p[c] * (total + slopes[c]) + q[c] * slopes[c] for c in range(len(x))]
        return ExactRow(
            float(loss),
            [float(grad) for grad in grads],
            # A label alone has no other terms: the total less its own is 0.
            [abs(float(value)) for value in (grads if len(weights) == 1 else sizes)],
        )


def label_shares(
    label: int, num_classes: int, smoothing: float = 0.0
) -> tuple[tuple[int, float], ...]:
    """Return ``weights`` of :func:`softmax_exactly` for a label."""
    with mpmath.workdps(60):
        each = mpmath.mpf(smoothing) / num_classes
        return tuple(
            (c, each + (1 - mpmath.mpf(smoothing) if c == label else 0))
            for c in range(num_classes)
            if c == label or smoothing
        )


def assert_close_to_exact(
    actual: Tensor,
    exact: Sequence[float],
    magnitudes: Sequence[float] | None = None,
    precision: Mapping[torch.dtype, float] = PRECISION,
    num_terms: int = 1,
) -> None:
    """Fail if the error is above a precision and, of halves, one rounding.

    Args:
        actual: results.
        exact: what they should be.
        magnitudes: sizes of the terms that add up to ``exact``; by default itself.
        precision: error relative to ``magnitudes``, by the dtype of the computation.
        num_terms: how many exponentials may have been below the smallest normal number.
    """
    computed = torch.float32 if actual.dtype in HALVES else actual.dtype
    result = actual.detach().cpu().double().flatten()
    expected = torch.tensor(exact, dtype=torch.float64)
    size = expected if magnitudes is None else torch.tensor(magnitudes, dtype=torch.float64)
    allowed = precision[computed] * size.abs() + num_terms * torch.finfo(computed).smallest_normal
    if actual.dtype in HALVES:
        smallest_normal = torch.finfo(actual.dtype).smallest_normal
        allowed += UNIT_ROUNDOFF[actual.dtype] * expected.abs().clamp(min=smallest_normal)
    error = (result - expected).abs()
    bad = ~(error <= allowed)
    if bad.any():
        i = int(torch.where(bad, error / allowed, -1.0).nan_to_num(torch.inf).argmax())
        relative = (error[i] / size[i].abs()).item()
        raise AssertionError(
            f"{int(bad.sum())} of {bad.numel()} are off; worst [{i}]: got {result[i].item()!r}, "
            f"exact {expected[i].item()!r}, relative error {relative:.2e}"
        )


# --- whole tensors in float64, for logits where p and 1 - p have digits ---


def one_hot(labels: Tensor, num_classes: int, *not_classes: int | None) -> Tensor:
    """Return ``[N, C, *]`` of labels ``[N, *]``; rows whose label is in ``not_classes`` are 0."""
    for label in not_classes:
        if label is not None:
            labels = labels.masked_fill(labels == label, num_classes)
    classes = torch.arange(num_classes, device=labels.device)
    return labels.unsqueeze(1) == classes.view(1, -1, *[1] * (labels.dim() - 1))


def of_classes(value: Any, x: Tensor) -> Any:
    """Return a vector ``[C]`` so that it broadcasts to ``[N, C, *]``; anything else as it is."""
    if isinstance(value, Tensor) and value.dim():
        return value.detach().cpu().double().view(1, -1, *[1] * (x.dim() - 2))
    return value


def sigmoid_reference(
    x: Tensor,
    target: Tensor,
    alpha: Any = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    background_class: int | None = None,
) -> Tensor:
    """Return the loss of logits ``[N, C, *]`` by torchvision's formula, with what it lacks."""
    is_dense = target.shape == x.shape
    if not is_dense:
        ignored = (target == ignore_index).unsqueeze(1).expand_as(x)
        target = one_hot(target, x.shape[1], ignore_index, background_class)
    else:
        ignored = target == ignore_index
    t = target.double().masked_fill(ignored, 0) * (1 - label_smoothing) + label_smoothing / 2
    x = x.masked_fill(ignored, 0)
    p = x.sigmoid()
    p_t = p * t + (1 - p) * (1 - t)
    pos_weight = of_classes(pos_weight, x)
    ce = F.binary_cross_entropy_with_logits(x, t, pos_weight=pos_weight, reduction="none")
    loss = ce * (1 - p_t) ** gamma
    alpha = of_classes(alpha, x)
    if isinstance(alpha, Tensor) or (alpha is not None and alpha >= 0):
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    if weight is not None:
        loss = loss * of_classes(weight, x)
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    return loss.sum() / (~ignored).sum() if reduction == "mean" else loss.sum()


def softmax_reference(
    x: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: Any = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Tensor:
    """Return the loss of logits ``[N, C, *]``: cross entropy with (1 - p)^gamma in its sum."""
    labels = None if target.is_floating_point() else target
    ignored = torch.zeros_like(x[:, 0], dtype=torch.bool)
    if labels is not None:
        ignored = labels == ignore_index
        target = one_hot(labels, x.shape[1], ignore_index)
    weight = torch.ones((), dtype=torch.float64) if weight is None else of_classes(weight, x)
    share = target.double() * (1 - label_smoothing) + label_smoothing / x.shape[1]
    x = x.masked_fill(ignored.unsqueeze(1), 0)
    log_p = x.log_softmax(1)
    p = log_p.exp()
    factor = torch.where(p < 1, 1 - p, 1) ** gamma * (p < 1)  # one class: p = 1 and CE = 0
    if alpha is not None:
        factor = factor * of_classes(alpha, x)
    loss = -(share * weight * factor * log_p).sum(1)
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    divisor = (target.double() * weight).sum() if labels is not None else ignored.numel()
    return loss.sum() / divisor if reduction == "mean" else loss.sum()


def function_of(form: str) -> Callable[..., Any]:
    """Return the function under test."""
    functional = fastremedy.functional
    return functional.sigmoid_focal_loss if form == "sigmoid" else functional.focal_loss


def run(
    function: Callable[..., Tensor],
    input: Tensor,
    target: Tensor,
    grad: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return the loss and the gradient of ``input``, which stays as it is."""
    leaf = input.detach().requires_grad_()
    loss = function(leaf, target, **options)
    (gradient,) = torch.autograd.grad(loss, leaf, torch.ones_like(loss) if grad is None else grad)
    assert gradient.dtype == input.dtype
    return loss.detach(), gradient


def assert_matches_reference(
    form: str, input: Tensor, target: Tensor, grad: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Hold loss and gradient of logits ``[N, C, *]`` to PRECISION and one rounding; return them."""
    actual = run(function_of(form), input, target, grad, **options)
    reference = sigmoid_reference if form == "sigmoid" else softmax_reference
    x = wide(input)
    expected = run(
        reference, x, target.cpu(), None if grad is None else grad.cpu().double(), **options
    )
    # 1 - p of the reference itself loses digits; terms of either sign add up to a gradient.
    rows = 1 if expected[0].dim() else max(1, input[:, 0].numel())
    floor = expected[0].abs().nan_to_num().sum() / max(1, expected[0].numel()) / rows
    for result, exact in zip(actual, expected, strict=True):
        assert result.shape == exact.shape
        scale = max(exact.abs().nan_to_num().max().item(), floor.item()) if exact.numel() else 0.0
        unit = PRECISION.get(result.dtype, PRECISION[torch.float32])
        limits = torch.finfo(result.dtype)
        rounding = UNIT_ROUNDOFF[result.dtype] if result.dtype in HALVES else 0.0
        torch.testing.assert_close(
            result.cpu().double(),
            exact,
            rtol=unit + rounding,
            atol=unit * scale + rounding * limits.smallest_normal,
            equal_nan=True,
        )
    return actual


def make_call(
    form: str,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    kind: str = "labels",
) -> tuple[Tensor, Tensor]:
    """Return logits ``[N, C, *]`` and a target: "labels", "hard" or "soft" probabilities."""
    generator = torch.Generator().manual_seed(sum(shape))
    input = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(shape[1], (shape[0], *shape[2:]), generator=generator)
    if kind == "labels":
        labels.flatten()[3::5] = -100
        target = labels
    elif kind == "hard":
        is_positive = torch.rand(shape, generator=generator) < 0.3
        target = is_positive if form == "sigmoid" else one_hot(labels, shape[1])
        target = target.to(dtype)
    else:
        target = torch.rand(shape, generator=generator)
        target = (target if form == "sigmoid" else target / target.sum(1, keepdim=True)).to(dtype)
    return input.to(device), target.to(device)


def vectors(form: str, num_classes: int, device: torch.device) -> dict[str, Tensor]:
    """Return options that are vectors of the classes."""
    names = ("alpha", "weight", *(("pos_weight",) if form == "sigmoid" else ()))
    values = torch.linspace(0.1, 0.9, num_classes, device=device)
    return {name: values.roll(i) + 0.3 * i for i, name in enumerate(names)}
