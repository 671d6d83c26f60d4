"""Focal loss against 60 digits, where p and 1 - p leave what a dtype can tell from 0 and 1."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy

from .batch_norm_reference import is_slow, spare
from .focal_loss_reference import (
    FORMS,
    GAMMAS,
    PRECISION,
    assert_close_to_exact,
    function_of,
    label_shares,
    make_call,
    run,
    sigmoid_exactly,
    sigmoid_reference,
    softmax_exactly,
    softmax_reference,
)
from .reference import FLOATS, UNIT_ROUNDOFF, assert_same_bits

focal_loss = fastremedy.functional.focal_loss
sigmoid_focal_loss = fastremedy.functional.sigmoid_focal_loss
ALL_GAMMAS = pytest.mark.parametrize("gamma", GAMMAS)

SIZES = (1e-30, 1e-6, 0.1, 1, 2, 5, 8, 9.5, 17, 30, 50, 80, 86.5, 88, 89, 100, 104, 700, 1e3, 1e4)
LOGITS = (0.0, *SIZES, *(-size for size in SIZES))
HUGE = (1e30, -1e30, 1e38, -1e38)


def logits_of(dtype: torch.dtype, count: int) -> Tensor:
    """Return LOGITS and ``count`` others, as the dtype has them."""
    generator = torch.Generator().manual_seed(0)
    others = torch.rand(count, generator=generator, dtype=torch.float64) * 170 - 85
    given = torch.tensor([*LOGITS, *HUGE]).double()
    values = torch.cat([given, others]).to(dtype)
    return values[values.isfinite()]


def precision_of(gamma: float, roundings: int) -> dict[torch.dtype, float]:
    """Return it for powers of a computed 1 - p, whose relative error counts gamma times."""
    of_power = gamma * roundings * UNIT_ROUNDOFF[torch.float32]
    return {**PRECISION, torch.float32: max(PRECISION[torch.float32], of_power)}


@ALL_GAMMAS
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sigmoid_of_hard_targets(
    backend: str, device: torch.device, dtype: torch.dtype, reduction: str, gamma: float
) -> None:
    """Finite everywhere, exact to 1e-6; labels and dense targets, both answers."""
    spare(backend, reduction == "sum" and gamma not in (1.0, 1.3))
    x = logits_of(dtype, 60)
    for target in (0, 1):
        exact = [sigmoid_exactly(value, target, gamma) for value in x.tolist()]
        labels = torch.full(x.shape, 1 - target)  # there is class 0 and no other
        dense = torch.full((len(x), 1), target, dtype=dtype)
        for given in (labels, dense):
            loss, grad = run(
                sigmoid_focal_loss, x[:, None].to(device), given.to(device),
                alpha=None, gamma=gamma, reduction=reduction, background_class=1,
            )  # fmt: skip
            if reduction == "none":
                assert_close_to_exact(loss, [e.loss for e in exact])
            assert_close_to_exact(grad, [e.slope for e in exact])


@ALL_GAMMAS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sigmoid_of_soft_targets(
    backend: str, device: torch.device, dtype: torch.dtype, smoothing: float, gamma: float
) -> None:
    """Relative to the terms that the gradient is the difference of."""
    x = logits_of(dtype, 10)
    shares = torch.tensor([0, 0.1, 0.3, 0.5, 0.9, 1], dtype=dtype)
    targets = shares.expand(len(x), -1)
    input = x[:, None].expand(targets.shape)
    pairs = zip(input.flatten().tolist(), targets.flatten().tolist(), strict=True)
    exact = [sigmoid_exactly(value, t, gamma, smoothing, 0.75) for value, t in pairs]
    pos_weight = torch.full((len(shares),), 0.75, device=device)
    loss, grad = run(
        sigmoid_focal_loss, input.to(device), targets.to(device),
        alpha=None, gamma=gamma, label_smoothing=smoothing, pos_weight=pos_weight,
    )  # fmt: skip
    # 1 - p_t: the target, the exponential, their sum with the rest, and two logarithms; that of
    # Triton is a longer polynomial.
    precision = precision_of(gamma, {"torch": 0, "triton": 7}.get(backend, 5))
    assert_close_to_exact(loss, [e.loss for e in exact], None, precision)
    magnitudes = [e.magnitude for e in exact]
    assert_close_to_exact(grad, [e.slope for e in exact], magnitudes, precision)


def rows_of(num_classes: int, dtype: torch.dtype) -> Tensor:
    """Return rows that put class 0 far above, and far below, one or all of the others."""
    rows = []
    for gap in (0, 1, 7, 12, 17, 30, 50, 69, 86, 100, 1000, 10000):
        row = -gap - torch.arange(num_classes).remainder(3).float()
        row[0] = 0
        rows += [row, 5 - row]
        if num_classes > 2:
            one = torch.zeros(num_classes)
            one[-1] = -gap
            rows.append(one)
    return torch.stack(rows).to(dtype)


def rounding_of(backend: str, x: Tensor, gamma: float) -> float:
    """Return what kernels for GPUs lose: a difference of logits is rounded to one float32.

    Half a unit in its last place is a relative error of an exponential, thus of 1 - p, which counts
    1 + gamma times.
    """
    if backend not in ("cuda", "triton"):
        return 0.0
    gap = (x.amax(1) - x.amin(1)).clamp(max=88).max().item()  # exp(-88) is 0
    return torch.finfo(torch.float32).eps / 2 * gap * (1 + gamma)


def check_rows(
    backend: str,
    input: Tensor,
    target: Tensor,
    shares: list[tuple[tuple[int, float], ...]],
    gamma: float,
    rounding: float = 0.0,
    **options: Any,
) -> None:
    """Compare with what has to be added up for every row; ``rounding`` is of single precision."""
    loss, grad = run(focal_loss, input, target, gamma=gamma, reduction="none", **options)
    rows = zip(input.tolist(), shares, strict=True)
    exact = [softmax_exactly(tuple(row), share, gamma) for row, share in rows]
    # 1 - p on a GPU: the exponentials, their sum, 1 + it, its reciprocal and a product.
    precision = precision_of(gamma, 5 if backend in ("cuda", "triton") else 0)
    precision[torch.float32] += rounding
    num_classes = input.shape[1]
    assert_close_to_exact(loss, [e.loss for e in exact], None, precision, num_classes)
    slopes = [slope for e in exact for slope in e.slopes]
    magnitudes = [magnitude for e in exact for magnitude in e.magnitudes]
    assert_close_to_exact(grad, slopes, magnitudes, precision, num_classes)


@ALL_GAMMAS
@pytest.mark.parametrize("num_classes", [1, 2, 3, 10])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_softmax_of_labels(
    backend: str, device: torch.device, dtype: torch.dtype, num_classes: int, gamma: float
) -> None:
    """p_t from exp(-10000) to 1 - exp(-10000); the gradient of every class is exact by itself."""
    spare(backend, num_classes == 2 and dtype != torch.float32)
    x = rows_of(num_classes, dtype)
    for label in {0, num_classes - 1}:
        target = torch.full((len(x),), label)
        shares = [label_shares(label, num_classes)] * len(x)
        check_rows(backend, x.to(device), target.to(device), shares, gamma)


@ALL_GAMMAS
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("num_classes", [1, 2, 3, 10])
def test_softmax_of_smoothed_labels(
    backend: str, device: torch.device, num_classes: int, smoothing: float, gamma: float
) -> None:
    spare(backend, smoothing == 1.0 and num_classes != 3)
    for dtype in (torch.float32,) if is_slow(backend) else FLOATS:
        x = rows_of(num_classes, dtype)
        target = torch.arange(len(x)) % num_classes
        shares = [label_shares(label, num_classes, smoothing) for label in target.tolist()]
        check_rows(
            backend, x.to(device), target.to(device), shares, gamma, label_smoothing=smoothing
        )


@ALL_GAMMAS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_softmax_of_probabilities(
    backend: str, device: torch.device, dtype: torch.dtype, gamma: float
) -> None:
    """Also 0 and 1, and what does not add up to 1."""
    x = rows_of(4, dtype)
    target = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 0], [0.9, 0, 0, 0.1], [1, 0, 0, 0], [0, 0, 0, 0]]
    ).to(dtype)
    target = target.repeat(len(x), 1)[: len(x)]
    shares = [tuple((c, t) for c, t in enumerate(row) if t) for row in target.tolist()]
    check_rows(backend, x.to(device), target.to(device), shares, gamma)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("kind", ["labels", "smoothed", "probabilities"])
def test_softmax_of_many_classes(
    backend: str, device: torch.device, kind: str, gamma: float
) -> None:
    num_classes = 1000
    spare(backend, gamma == 0.5)
    x = 4 * torch.randn(5, num_classes)
    x[0, 1] += 40
    x[1, 17] += 60
    x[2, 999] = 1e4
    x[3] = 0
    target = torch.tensor([1, 3, 999, 0, 5])
    smoothing = 0.1 if kind == "smoothed" else 0.0
    shares = [label_shares(label, num_classes, smoothing) for label in target.tolist()]
    if kind == "probabilities":
        target = torch.zeros_like(x)
        target[torch.arange(5), torch.tensor([1, 999, 2, 3, 5])] = 0.75
        target[:, 500] = 0.25
        shares = [tuple((c, t) for c, t in enumerate(row) if t) for row in target.tolist()]
    rounding = rounding_of(backend, x, gamma)
    check_rows(
        backend, x.to(device), target.to(device), shares, gamma, rounding, label_smoothing=smoothing
    )


@ALL_GAMMAS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("num_classes", [2, 7, 40])
def test_softmax_of_logits_that_are_not_integers(
    backend: str, device: torch.device, num_classes: int, smoothing: float, gamma: float
) -> None:
    """Differences of logits that float32 does not have."""
    spare(backend, gamma in (0.25, 1.3) or num_classes == 7)
    for scale in (1, 5, 20):
        x = scale * torch.randn(12, num_classes)
        target = torch.arange(12) % num_classes
        x[::2].scatter_add_(1, target[::2, None], torch.full((6, 1), 2.7 * scale))
        shares = [label_shares(label, num_classes, smoothing) for label in target.tolist()]
        rounding = rounding_of(backend, x, gamma)
        check_rows(
            backend,
            x.to(device),
            target.to(device),
            shares,
            gamma,
            rounding,
            label_smoothing=smoothing,
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_class_that_cannot_be(backend: str, device: torch.device, gamma: float) -> None:
    """A logit of minus infinity, where the target does not ask for it."""
    x = torch.randn(4, 5)
    x[:, 2] = -math.inf
    target = torch.tensor([0, 1, 3, 4])
    for given in (target, torch.nn.functional.one_hot(target, 5).float()):
        results = [
            run(focal_loss, logits.to(device), labels.to(device), gamma=gamma, reduction="none")
            for logits, labels in ((x, given), (x[:, [0, 1, 3, 4]], remove_class(given)))
        ]
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
        kept = results[0][1][:, [0, 1, 3, 4]]
        torch.testing.assert_close(kept, results[1][1], rtol=1e-6, atol=1e-7)
        assert (results[0][1][:, 2] == 0).all()


def remove_class(target: Tensor) -> Tensor:
    return target[:, [0, 1, 3, 4]] if target.dim() == 2 else target - (target > 2).long()


@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_where_it_is(backend: str, device: torch.device, form: str) -> None:
    input, target = make_call(form, (6, 5), device, kind="labels")
    target = target.clamp(min=0)
    function = function_of(form)
    clean = run(function, input, target, reduction="none")
    for value in (math.nan, math.inf, -math.inf):
        input[3, 1] = value
        loss, grad = run(function, input, target, reduction="none")
        others = [0, 1, 2, 4, 5]
        assert_same_bits(loss[others], clean[0][others])
        assert_same_bits(grad[others], clean[1][others])
        if math.isnan(value):
            row = loss[3] if form == "softmax" else loss[3, 1]
            assert row.isnan()
            assert (grad[3] if form == "softmax" else grad[3, 1]).isnan().all()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("form", FORMS)
def test_sum_of_many_losses(backend: str, device: torch.device, form: str, reduction: str) -> None:
    """To 1e-6, also of a million that are small beside a few."""
    count = 2_000 if is_slow(backend) else 1_000_000
    num_classes = 2 if form == "softmax" else 1
    x = torch.randn(count, num_classes) * 3
    x[::997] *= 100
    target = torch.randint(2, (count,))
    options: dict[str, Any] = {"reduction": reduction}
    if form == "sigmoid":
        options |= {"background_class": 1}
    reference = sigmoid_reference if form == "sigmoid" else softmax_reference
    exact = reference(x.double(), target, **options)
    actual = function_of(form)(x.to(device), target.to(device), **options)
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["labels", "hard", "soft"])
@pytest.mark.parametrize("shape", [(300, 41), (7, 5, 333), (9000, 3)], ids=str)
def test_same_bits_every_time(
    backend: str, device: torch.device, shape: tuple[int, ...], kind: str, form: str
) -> None:
    """Also for another number of threads."""
    if backend == "torch":
        pytest.skip("torch's sums depend on the number of threads")
    spare(backend, kind == "soft" or max(shape) > 1000)
    if is_slow(backend):
        shape = (*shape[:1], 3, *(size // 10 for size in shape[2:]))
    input, target = make_call(form, shape, device, kind=kind)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2) if backend == "cpu" else (2, 2):
            torch.set_num_threads(count)
            for reduction in ("none", "sum", "mean"):
                results.append(run(function_of(form), input, target, reduction=reduction))
    finally:
        torch.set_num_threads(threads)
    for first, *others in (results[i::3] for i in range(3)):
        for other in others:
            assert_same_bits(other[0], first[0])
            assert_same_bits(other[1], first[1])
