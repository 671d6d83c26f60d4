"""One call of the Triton kernels of the focal loss, and the check of its results in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

pytest.importorskip("triton")

from fastremedy.triton_kernels import focal_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE, MEAN, SUM = range(3)
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
FORMS = pytest.mark.parametrize("softmax", [False, True], ids=["sigmoid", "softmax"])


@dataclass
class Case:
    """One call; tensors are flat memory in the order [outer, classes, inner]."""

    input: Tensor
    target: Tensor
    softmax: bool
    reduction: int = MEAN
    gamma: float = 2.0
    alpha: float = 0.25
    alphas: Tensor | None = None
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    background: int = -100  # the label to ignore: none

    def _options(self) -> tuple[Any, ...]:
        return (
            *self.input.shape,
            self.target,
            self.softmax,
            self.reduction,
            self.gamma,
            self.alpha,
            self.alphas,
            self.weight,
            self.pos_weight,
            self.label_smoothing,
            self.ignore_index,
            self.background,
        )

    def run(self) -> dict[str, Tensor]:
        """Run both passes, on memory that is not zero."""
        outer, classes, inner = self.input.shape
        opmath = torch.float64 if self.input.dtype == torch.float64 else torch.float32
        shape = (outer, inner) if self.softmax else (outer, classes, inner)
        loss = self.input.new_full(shape if self.reduction == NONE else (), math.nan)
        saved = self.input.new_full((3, outer * inner), math.nan, dtype=opmath)
        normalizer = self.input.new_full((), math.nan, dtype=torch.float64)
        stats = torch.zeros(2 * classes + 1, dtype=torch.int64, device=DEVICE)
        results = (loss, saved if self.softmax else None, normalizer)
        focal_loss.forward(self.input, *self._options(), *results, stats, None)
        grad_output = torch.linspace(0.5, 1.5, loss.numel(), device=DEVICE).to(loss.dtype)
        grad_output = grad_output.view(loss.shape)
        grad_input = torch.full_like(self.input, math.nan)
        focal_loss.backward(
            grad_output, self.input, *self._options(), *results[1:], grad_input=grad_input
        )
        return {
            "loss": loss,
            "grad": grad_input,
            "stats": stats,
            "saved": saved,
            "normalizer": normalizer,
            "grad_output": grad_output,
        }

    def check(self) -> dict[str, Tensor]:
        """Compare with the plain formula, differentiated by autograd in float64."""
        actual = self.run()
        x = self.input.double().requires_grad_()
        loss, p, target, counts = self._loss(x)
        if self.reduction == MEAN:
            normalizer = self._normalizer(target, counts)
            assert actual["normalizer"].item() == pytest.approx(float(normalizer), rel=1e-7)
        if self.reduction != NONE:
            loss = loss.sum()
        if self.reduction == MEAN:
            loss = loss / normalizer
        loss.backward(actual["grad_output"].double())
        assert x.grad is not None
        for result, expected in ((actual["loss"], loss), (actual["grad"], x.grad)):
            tolerance = TOLERANCE[self.input.dtype]
            atol = tolerance * expected.abs().max().item() + 2.0**-25  # the least float16
            torch.testing.assert_close(
                result.double(), expected.detach(), rtol=tolerance, atol=atol
            )
        self._check_stats(actual["stats"], p.detach(), target, counts)
        return actual

    def _vector(self, values: Tensor | None, otherwise: float) -> Tensor:
        if values is None:
            return torch.full((1, 1, 1), otherwise, dtype=torch.float64, device=DEVICE)
        return values.double().view(1, -1, 1)

    def _loss(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        classes = x.shape[1]
        if self.target.dtype == torch.int64:
            label = self.target[:, None]
            counts = label != self.ignore_index
            is_class = counts & (label != self.background)
            target = one_hot(label.where(is_class, 0)[:, 0], classes).movedim(-1, 1) * is_class
            counts = counts.expand_as(x)
        else:
            target = self.target
            counts = torch.ones_like(x, dtype=torch.bool)
            if not self.softmax:
                counts = target != self.ignore_index
        target = target.double()
        alpha, weight = self._vector(self.alphas, self.alpha), self._vector(self.weight, 1.0)
        eps = self.label_smoothing
        if self.softmax:
            mixed = target * (1 - eps) + eps / classes
            log_p = x.log_softmax(1)
            p = log_p.exp()
            loss = (alpha * weight * mixed * (1 - p) ** self.gamma * -log_p).sum(1)
            return loss.where(counts[:, 0], 0.0), p, target, counts
        mixed = target * (1 - eps) + eps / 2
        p = x.sigmoid()
        p_t = mixed * p + (1 - mixed) * (1 - p)
        ce = -self._vector(self.pos_weight, 1.0) * mixed * logsigmoid(x)
        ce = ce - (1 - mixed) * logsigmoid(-x)
        alpha_t = alpha * mixed + (1 - alpha) * (1 - mixed)
        loss = (alpha_t * weight * (1 - p_t) ** self.gamma * ce).where(counts, 0.0)
        return loss, target * p + (1 - target) * (1 - p), target, counts

    def _normalizer(self, target: Tensor, counts: Tensor) -> Tensor:
        if not self.softmax:
            return counts.sum()
        if self.target.dtype != torch.int64:
            return counts[:, 0].sum()
        return (self._vector(self.weight, 1.0) * target).sum(1)[counts[:, 0]].sum()

    def _check_stats(self, stats: Tensor, p: Tensor, target: Tensor, counts: Tensor) -> None:
        classes = p.shape[1]
        if self.softmax:
            label = target.argmax(1)
            positive = one_hot(label, classes).movedim(-1, 1).bool() & counts
        else:
            positive = (target > 0.5) & counts
        ignored = ~counts[:, 0] if self.target.dtype == torch.int64 else ~counts
        assert torch.equal(stats[:classes], positive.sum((0, 2)))
        assert stats[-1] == ignored.sum()
        sums = stats[classes:-1] / 2**32
        torch.testing.assert_close(
            sums, (p * positive).sum((0, 2)), rtol=2e-6, atol=1e-6, check_dtype=False
        )


def labels_of(outer: int, classes: int, inner: int, ignored: float = 0.2) -> Tensor:
    label = torch.randint(classes, (outer, inner))
    label[torch.rand(outer, inner) < ignored] = -100
    label[0, 0] = 0
    return label.to(DEVICE)


def case(
    shape: tuple[int, int, int],
    softmax: bool,
    dtype: torch.dtype = torch.float32,
    labels: bool = True,
    **options: Any,
) -> Case:
    input = (3 * torch.randn(shape)).to(DEVICE, dtype)
    if labels:
        return Case(input, labels_of(*shape), softmax, **options)
    target = torch.rand(shape, device=DEVICE)
    target = (target / target.sum(1, keepdim=True) if softmax else target).to(dtype)
    return Case(input, target, softmax, **options)
