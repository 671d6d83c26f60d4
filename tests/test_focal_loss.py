"""Focal loss: what it is equal to, which targets it takes, what it tells about the classes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastremedy

from .batch_norm_reference import is_slow, spare
from .focal_loss_reference import (
    FORMS,
    assert_matches_reference,
    function_of,
    make_call,
    one_hot,
    run,
    vectors,
)
from .reference import FLOATS, HALVES, assert_same_bits

focal_loss = fastremedy.functional.focal_loss
sigmoid_focal_loss = fastremedy.functional.sigmoid_focal_loss
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
SHAPES = [(6, 5), (4, 5, 3), (2, 4, 3, 5), (2, 3, 2, 3, 2)]


def torchvision_formula(x: Tensor, t: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """Return what torchvision.ops.sigmoid_focal_loss does."""
    p = torch.sigmoid(x)
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    loss = loss * (1 - (p * t + (1 - p) * (1 - t))) ** gamma
    if alpha >= 0:
        loss = (alpha * t + (1 - alpha) * (1 - t)) * loss
    return loss if reduction == "none" else getattr(loss, reduction)()


@REDUCTIONS
@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0, -1.0])
@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("shape", [(7,), (6, 5), (2, 3, 4, 5)], ids=str)
def test_torchvision(
    backend: str,
    device: torch.device,
    shape: tuple[int, ...],
    gamma: float,
    alpha: float,
    reduction: str,
) -> None:
    spare(backend, gamma == 1.0 or (alpha != 0.25 and reduction != "none"))
    x = torch.randn(shape, device=device)
    for target in ((torch.rand(shape) < 0.3).float(), torch.rand(shape)):
        args = (target.to(device), alpha, gamma, reduction)
        results = []
        for function, input in ((sigmoid_focal_loss, x), (torchvision_formula, x.double())):
            leaf = input.clone().requires_grad_()
            loss = function(leaf, *args)
            loss.sum().backward()
            assert leaf.grad is not None
            results.append([loss.detach().double(), leaf.grad.double()])
        torch.testing.assert_close(*results, rtol=2e-6, atol=1e-6)


def cross_entropy_cases() -> list[dict[str, Any]]:
    return [
        {"weight": weight, "ignore_index": ignore_index, "label_smoothing": smoothing}
        for weight in (False, True)
        for ignore_index in (-100, 1)
        for smoothing in (0.0, 0.2)
    ]


@REDUCTIONS
@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("case", cross_entropy_cases(), ids=str)
@pytest.mark.parametrize("shape", [(5,), *SHAPES], ids=str)
def test_gamma_zero_is_cross_entropy(
    backend: str,
    device: torch.device,
    shape: tuple[int, ...],
    case: dict[str, Any],
    probabilities: bool,
    reduction: str,
) -> None:
    spare(backend, len(shape) in (1, 3, 5) and reduction != "mean")
    spare(backend, len(shape) != 4 and case["weight"])
    classes = shape[0] if len(shape) == 1 else shape[1]
    x = torch.randn(shape, device=device)
    if probabilities:
        if case["ignore_index"] >= 0:
            pytest.skip("torch refuses it")
        target = torch.randn(shape, device=device).softmax(min(1, len(shape) - 1))
    else:
        target = torch.randint(classes, shape[:1] + shape[2:] if len(shape) > 1 else ())
        if len(shape) > 1:
            target.view(-1)[2] = -100 if case["ignore_index"] == -100 else 1
        target = target.to(device)
    weight = torch.rand(classes, device=device) + 0.1 if case["weight"] else None
    options = {**case, "weight": weight, "reduction": reduction}
    wide = {**options, "weight": None if weight is None else weight.double()}
    ours = run(focal_loss, x, target, gamma=0.0, **options)
    target = target.double() if probabilities else target
    expected = run(F.cross_entropy, x.double(), target, **wide)
    for actual, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=4e-7, equal_nan=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_everything_ignored(
    backend: str, device: torch.device, gamma: float, smoothing: float
) -> None:
    """The mean is 0 / 0, as in torch; gradients are 0 or, as in torch, NaN."""
    x = torch.randn(3, 4, device=device)
    target = torch.full((3,), -100, device=device)
    for function in (focal_loss, sigmoid_focal_loss):
        loss, _ = run(function, x, target, gamma=gamma, reduction="mean", label_smoothing=smoothing)
        assert loss.isnan()
        for reduction in ("sum", "none"):
            results = run(
                function, x, target, gamma=gamma, reduction=reduction, label_smoothing=smoothing
            )
            for result in results:
                assert_same_bits(result, torch.zeros_like(result))
    torchs = F.cross_entropy(x, target, label_smoothing=smoothing)
    assert torchs.isnan()


@REDUCTIONS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gamma_zero_is_binary_cross_entropy(
    backend: str, device: torch.device, dtype: torch.dtype, reduction: str
) -> None:
    shape = (5, 7)
    x = torch.randn(shape, device=device).to(dtype)
    target = torch.rand(shape, device=device).to(dtype)
    weight, pos_weight = torch.rand(2, 7, device=device) + 0.1
    loss, grad = run(
        sigmoid_focal_loss, x, target,
        alpha=None, gamma=0, reduction=reduction, weight=weight, pos_weight=pos_weight,
    )  # fmt: skip
    expected = run(
        F.binary_cross_entropy_with_logits, x.double(), target.double(),
        reduction=reduction, weight=weight.double(), pos_weight=pos_weight.double(),
    )  # fmt: skip
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6 + (dtype in HALVES) * 4e-3
    torch.testing.assert_close(loss.double(), expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected[1], rtol=tolerance, atol=tolerance / 10)


@REDUCTIONS
@BOTH_FORMS
@pytest.mark.parametrize("kind", ["labels", "hard", "soft"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_option(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    form: str,
    reduction: str,
) -> None:
    spare(backend, reduction == "sum" or (dtype in HALVES and reduction == "mean"))
    for shape in (SHAPES[0], SHAPES[2]):
        if is_slow(backend) and shape == SHAPES[0] and dtype != torch.float32:
            continue
        input, target = make_call(form, shape, device, dtype, kind)
        grad = torch.rand_like(input) if form == "sigmoid" else torch.rand_like(input[:, 0])
        given = {"reduction": reduction, "grad": grad if reduction == "none" else None}
        classes = vectors(form, shape[1], device)
        every: list[dict[str, Any]] = [
            {"gamma": 1.0, "label_smoothing": 0.2, **classes},
            {"gamma": 3.0, **classes},
            {"gamma": 2.0},
            {"gamma": 0.7, "alpha": 0.3},
        ]
        for options in every[: 2 if is_slow(backend) else None]:
            assert_matches_reference(form, input, target, **given, **options)


@pytest.mark.parametrize("background", [None, 7, -1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@REDUCTIONS
def test_labels_are_one_hot(
    backend: str, device: torch.device, reduction: str, smoothing: float, background: int | None
) -> None:
    """Background, a class or not, is a row of zeros."""
    x, target = make_call("sigmoid", (12, 5, 3), device)
    target = target.clamp(min=0)
    if background is not None:
        target[::3] = background
    dense = one_hot(target, 5, background).float()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    options |= vectors("sigmoid", 5, device)
    actual = run(sigmoid_focal_loss, x, target, background_class=background, **options)
    expected = run(sigmoid_focal_loss, x, dense, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
    if background is None:
        options.pop("pos_weight")
        actual = run(focal_loss, x, target, **{**options, "weight": None})
        expected = run(focal_loss, x, dense, **{**options, "weight": None})
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


@BOTH_FORMS
@pytest.mark.parametrize("ignore_index", [-100, 2, 1000])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ignored_rows_are_not_looked_at(
    backend: str, device: torch.device, value: float, ignore_index: int, form: str
) -> None:
    spare(backend, math.isinf(value) and ignore_index != 2)
    input, target = make_call(form, (6, 5, 4), device)
    target = target.clamp(min=0)
    target[target == 2] = 3
    target[0, 1] = target[3, 0] = ignore_index
    ignored = (target == ignore_index).unsqueeze(1).expand_as(input)
    spoilt = torch.where(ignored, value, input)
    for smoothing in (0.0, 0.1):
        for reduction in ("none", "mean", "sum"):
            options = {
                "ignore_index": ignore_index,
                "reduction": reduction,
                "label_smoothing": smoothing,
            }
            loss, grad = run(function_of(form), spoilt, target, **options)
            assert (grad[ignored] == 0).all()
            expected = assert_matches_reference(form, input, target, **options)
            assert_same_bits(loss, expected[0])
            assert_same_bits(grad, expected[1])


def test_ignored_elements_of_dense_targets(backend: str, device: torch.device) -> None:
    """A probability equal to ignore_index, as -1 in detection."""
    x, target = make_call("sigmoid", (6, 5), device, kind="soft")
    target[1] = target[2, 3] = -1
    spoilt = x.clone()
    spoilt[1, 2] = spoilt[2, 3] = math.nan
    for reduction in ("none", "mean", "sum"):
        options: dict[str, Any] = {"ignore_index": -1, "reduction": reduction}
        expected = assert_matches_reference("sigmoid", x, target, **options)
        actual = run(sigmoid_focal_loss, spoilt, target, **options)
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])
        assert (actual[1][target == -1] == 0).all()


@BOTH_FORMS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_labels_of_every_integer(
    backend: str, device: torch.device, dtype: torch.dtype, form: str
) -> None:
    input, target = make_call(form, (9, 5), device)
    target = target.clamp(min=0)
    expected = run(function_of(form), input, target)
    actual = run(function_of(form), input, target.to(dtype))
    assert_same_bits(actual[0], expected[0])
    assert_same_bits(actual[1], expected[1])


def test_masks(backend: str, device: torch.device) -> None:
    """Dense targets that are bool or integers; boolean labels of two classes."""
    x, target = make_call("sigmoid", (6, 2), device, kind="hard")
    expected = run(sigmoid_focal_loss, x, target)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64, torch.float16):
        actual = run(sigmoid_focal_loss, x, target.to(dtype))
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])
    mask = target[:, 0].bool()
    assert_same_bits(focal_loss(x, mask), focal_loss(x, mask.long()))


@BOTH_FORMS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("target_dtype", FLOATS, ids=str)
def test_dtypes_of_targets(
    backend: str, device: torch.device, target_dtype: torch.dtype, dtype: torch.dtype, form: str
) -> None:
    spare(backend, torch.float64 in (dtype, target_dtype) and dtype != target_dtype)
    input, target = make_call(form, (6, 5, 2), device, dtype, "soft")
    loss, _ = assert_matches_reference(form, input, target.to(target_dtype))
    assert loss.dtype == dtype


@BOTH_FORMS
@pytest.mark.parametrize("vector_dtype", FLOATS, ids=str)
def test_dtypes_of_vectors(
    backend: str, device: torch.device, vector_dtype: torch.dtype, form: str
) -> None:
    for kind in ("labels", "soft"):
        input, target = make_call(form, (6, 5, 2), device, kind=kind)
        classes = {n: v.to(vector_dtype) for n, v in vectors(form, 5, device).items()}
        assert_matches_reference(form, input, target, reduction="mean", **classes)


def plain_stats(
    form: str, input: Tensor, target: Tensor, background: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.cpu().double()
    target = target.cpu()
    ignored = target == -100
    p = x.sigmoid() if form == "sigmoid" else x.softmax(1)
    if target.dim() < x.dim():
        chosen = one_hot(target, x.shape[1], -100, background)
    elif form == "softmax":
        chosen = one_hot(target.argmax(1), x.shape[1])
    else:
        chosen = target > 0.5
        p = target * p + (1 - target) * (1 - p)
    dims = [dim for dim in range(x.dim()) if dim != 1]
    counts = chosen.sum(dims)
    return counts, (p * chosen).sum(dims) / counts, ignored.double().mean()


@BOTH_FORMS
@pytest.mark.parametrize("kind", ["labels", "background", "hard", "soft", "smoothed"])
def test_stats(backend: str, device: torch.device, kind: str, form: str) -> None:
    if (kind, form) == ("background", "softmax"):
        pytest.skip("softmax has no background")
    options: dict[str, Any] = {"label_smoothing": 0.1 if kind == "smoothed" else 0.0}
    background = 5 if kind == "background" else None
    for shape in ((40, 6), (3, 6, 4, 5)):
        target_kind = kind if kind in ("hard", "soft") else "labels"
        input, target = make_call(form, shape, device, kind=target_kind)
        if background is not None:
            target[1] = background
            options["background_class"] = background
        if form == "sigmoid" and target_kind != "labels":
            target[0] = -100
        for reduction in ("none", "mean"):
            function = function_of(form)
            expected = function(input, target, reduction=reduction, **options)
            for leaf in (input, input.clone().requires_grad_()):
                loss, stats = function(
                    leaf, target, reduction=reduction, return_stats=True, **options
                )
                torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=1e-7)
                assert not stats.mean_p_t.requires_grad
                counts, mean_p_t, ignored = plain_stats(form, input, target, background)
                assert stats.class_counts.dtype == torch.int64
                assert torch.equal(stats.class_counts.cpu(), counts)
                torch.testing.assert_close(
                    stats.mean_p_t.cpu().double(), mean_p_t, rtol=1e-6, atol=1e-8, equal_nan=True
                )
                torch.testing.assert_close(stats.ignored.cpu().double(), ignored)


@BOTH_FORMS
def test_stats_of_nothing(backend: str, device: torch.device, form: str) -> None:
    """Counts are 0, means NaN; NaN logits do not spoil other classes."""
    empty = torch.randn(0, 3, device=device), torch.randint(3, (0,), device=device)
    _, stats = function_of(form)(*empty, return_stats=True)
    assert stats.class_counts.tolist() == [0, 0, 0]
    assert stats.mean_p_t.isnan().all()
    assert stats.ignored.item() == 0
    input = torch.zeros(3, 3, device=device)
    input[0] = math.nan
    _, stats = function_of(form)(input, torch.tensor([0, 1, 1], device=device), return_stats=True)
    assert stats.class_counts.tolist() == [1, 2, 0]
    assert stats.mean_p_t[1].item() == pytest.approx(0.5 if form == "sigmoid" else 1 / 3)


def test_stats_count_beyond_float(backend: str, device: torch.device) -> None:
    """Sums of probabilities are integers: of equal ones the mean is exact."""
    count = 1000 if is_slow(backend) else 300_000
    input = torch.full((count, 2), 0.0, device=device)
    input[:, 1] = -20
    target = torch.zeros(count, dtype=torch.int64, device=device)
    _, stats = focal_loss(input, target, return_stats=True)
    exact = 1 / (1 + math.exp(-20))
    assert stats.class_counts.tolist() == [count, 0]
    assert stats.mean_p_t[0].item() == pytest.approx(exact, rel=1e-7)
