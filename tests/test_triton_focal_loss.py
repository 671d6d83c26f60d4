"""Focal loss in Triton, on a GPU or interpreted: blocks, tiles, programs and what is saved."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import one_hot

from .triton_focal_loss_case import DEVICE, FORMS, NONE, SUM, Case, case

pytest.importorskip("triton")

from fastremedy.triton_kernels import focal_loss

from .reference import FLOATS, assert_same_bits

# --- blocks, tiles and programs ---


@pytest.mark.parametrize("size", [1, 511, 512, 513, 1025])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sigmoid_edges(dtype: torch.dtype, size: int) -> None:
    case((size, 1, 1), False, dtype).check()
    case((1, size, 1), False, dtype, reduction=NONE).check()
    case((1, 1, size), False, dtype, labels=False, gamma=0.5).check()


@pytest.mark.parametrize("classes", [2, 7, 8, 17, 511, 1025, 2047, 2049, 4100])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_softmax_edges(dtype: torch.dtype, classes: int) -> None:
    case((3, classes, 1), True, dtype, gamma=0.5).check()
    case((3, classes, 1), True, dtype, labels=False).check()


@pytest.mark.parametrize("inner", [1, 3])
def test_one_class_is_certain(inner: int) -> None:
    one = case((4, 1, inner), True, reduction=SUM, gamma=0.5)
    results = one.run()
    assert results["loss"] == 0
    assert (results["grad"] == 0).all()


@pytest.mark.parametrize("outer", [1, 127, 128, 129])
def test_softmax_edges_of_rows(outer: int) -> None:
    case((outer, 5, 1), True, reduction=NONE).check()


@FORMS
@pytest.mark.parametrize("inner", [2, 8, 127, 129])
@pytest.mark.parametrize("classes", [2, 16, 33])
def test_inner(classes: int, inner: int, softmax: bool) -> None:
    for options in ({}, {"reduction": NONE}, {"labels": False}, {"label_smoothing": 0.1}):
        case((3, classes, inner), softmax, **options).check()


@FORMS
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("shape", [(8, 1100, 1), (80, 20, 5)], ids=str)  # several tiles for each
def test_several_programs(
    shape: tuple[int, int, int], labels: bool, softmax: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(focal_loss, "PROGRAMS", 3)
    smoothing = 0.1 if shape[-1] == 1 else 0.0
    whole = case(shape, softmax, labels=labels, gamma=1.5, label_smoothing=smoothing)
    for plan in (focal_loss.plan_sigmoid, focal_loss.plan_softmax):
        plan.cache_clear()
    try:
        first, second = whole.check(), whole.run()
    finally:
        for plan in (focal_loss.plan_sigmoid, focal_loss.plan_softmax):
            plan.cache_clear()
    for name in ("loss", "normalizer", "grad", "stats"):
        assert_same_bits(first[name], second[name])


@pytest.mark.parametrize("numel", [1, 511, 10**6, 2**31 - 2**16, 2**31, 2**33 + 1])
def test_plans_cover_everything(numel: int) -> None:
    for dtype in FLOATS:
        launch = focal_loss.plan_sigmoid(numel, 1, 1, dtype, False, True)
        covered = launch.sizes[-1] * launch.constants["BLOCK"]
        assert (launch.num_programs - 1) * covered < numel <= launch.num_programs * covered
        assert launch.sizes[-1] <= focal_loss.MAX_TILES
        for shape in ((numel, 10, 1), (1, 100, numel), (1, numel, 1)):
            launch = focal_loss.plan_softmax(*shape, dtype, 16, True)
            covered = launch.sizes[-1] * launch.constants["ROWS"]
            rows = shape[0] * shape[2]
            assert (launch.num_programs - 1) * covered < rows <= launch.num_programs * covered
            assert launch.num_programs <= focal_loss.PROGRAMS


def test_division_by_multiplication() -> None:
    numbers = [0, 1, 2, 2**31 - 1, 2**31 - 2, 2**30, *torch.randint(2**31, (200,)).tolist()]
    for divisor in (1, 2, 3, 7, 80, 641, 1000, 2**20, 2**31 - 1):
        magic, shift = focal_loss._magic(divisor)
        assert magic < 2**32
        near = [m * divisor + d for m in (1, 2, 2**31 // divisor - 1) for d in (-1, 0, 1)]
        for n in (*numbers, *(n for n in near if 0 <= n < 2**31)):
            assert ((n * magic >> 32) + n) >> shift == n // divisor


@FORMS
def test_offsets_of_64_bits_give_the_same(softmax: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = case((5, 6, 7), softmax)
    expected = small.run()
    plan = focal_loss.plan_softmax if softmax else focal_loss.plan_sigmoid

    def wide(*arguments: Any) -> focal_loss.Launch:
        launch = plan(*arguments)
        return launch._replace(constants={**launch.constants, "INDEX": focal_loss.tl.int64})

    monkeypatch.setattr(focal_loss, plan.__name__, wide)
    actual = small.run()
    for name in ("loss", "normalizer", "grad", "stats"):
        assert_same_bits(actual[name], expected[name])


@FORMS
@pytest.mark.parametrize("labels", [True, False])
def test_misaligned_views_are_written_inside_only(labels: bool, softmax: bool) -> None:
    aligned = case((6, 40, 4), softmax, labels=labels, reduction=NONE)
    buffer = torch.full((aligned.input.numel() + 9,), 7.0, device=DEVICE)
    view = buffer[1:-8].view(aligned.input.shape)
    expected = aligned.run()
    view.copy_(aligned.input)
    assert_same_bits(replace(aligned, input=view).run()["loss"], expected["loss"])
    options = (*aligned._options(), expected["saved"], expected["normalizer"])
    focal_loss.backward(expected["grad_output"], aligned.input, *options, grad_input=view)
    assert_same_bits(view, expected["grad"])
    assert (buffer[[0, *range(-8, 0)]] == 7).all()


# --- meaning ---


def test_what_labels_save() -> None:
    one = case((9, 30, 1), True)
    results = one.check()
    top, factor, of_label = results["saved"].double()
    x, label = one.input[:, :, 0].double(), one.target[:, 0]
    counts = label != one.ignore_index
    assert torch.equal(top, x.amax(1).where(counts, 0.0))
    grad = results["grad"][:, :, 0].double()
    grad = grad * results["normalizer"] / results["grad_output"].double()
    expected = (x - top[:, None]).exp() * factor[:, None]
    expected = expected.scatter(1, label.clamp(min=0)[:, None], of_label[:, None])
    torch.testing.assert_close(grad, expected * counts[:, None], rtol=1e-6, atol=1e-7)
    assert (factor[~counts] == 0).all()
    assert (of_label[~counts] == 0).all()


def test_what_probabilities_save() -> None:
    one = case((9, 30, 1), True, labels=False, gamma=0.0, alpha=0.5)
    top, rest, slopes = one.check()["saved"].double()
    x = one.input[:, :, 0].double()
    assert torch.equal(top, x.amax(1))
    torch.testing.assert_close(rest, (x - top[:, None]).exp().sum(1) - 1, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slopes, torch.full_like(slopes, 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("classes", [3, 2100])
@pytest.mark.parametrize("gap", [20.0, 60.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_rows_that_are_almost_certain(gamma: float, gap: float, classes: int) -> None:
    input = torch.full((2, classes, 1), -gap, device=DEVICE)
    input[0, 1] = input[1, -1] = 0
    label = torch.tensor([[1], [classes - 1]], device=DEVICE)
    for labels in (label, one_hot(label[:, 0], classes)[:, :, None].float()):
        results = Case(input, labels, True, NONE, gamma, alpha=1.0).run()
        rest = (classes - 1) * math.exp(-gap)
        q, ce = rest / (1 + rest), math.log1p(rest)
        loss = torch.full((2, 1), q**gamma * ce, device=DEVICE)
        torch.testing.assert_close(results["loss"], loss, rtol=1e-6, atol=0)
        grad = -q * q**gamma * (1 + gamma * (1 - q) * ce / q)
        actual = (results["grad"] / results["grad_output"][:, None])[[0, 1], [1, -1], 0]
        torch.testing.assert_close(actual, torch.full_like(actual, grad), rtol=2e-6, atol=0)


def test_equal_logits_and_minus_infinity() -> None:
    input = torch.zeros(2, 2500, 1, device=DEVICE)
    input[1, :2048] = -math.inf
    label = torch.tensor([[3], [2400]], device=DEVICE)
    loss = Case(input, label, True, NONE, gamma=0.0, alpha=1.0).run()["loss"]
    expected = torch.tensor([[math.log(2500)], [math.log(452)]], device=DEVICE)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@FORMS
@pytest.mark.parametrize("classes", [5, 2100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_ignored_rows_do_not_see_nan(label_smoothing: float, classes: int, softmax: bool) -> None:
    one = case((6, classes, 1), softmax, label_smoothing=label_smoothing)
    one.target[2] = one.ignore_index
    expected = one.run()
    one.input[2] = math.nan
    actual = one.run()
    for name in ("loss", "grad", "stats", "normalizer"):
        assert_same_bits(actual[name], expected[name])
    assert (actual["grad"][2] == 0).all()
    one.input[3, 1] = math.nan
    one.target[3] = 1
    assert one.run()["loss"].isnan()


def test_ignored_probabilities_do_not_see_nan() -> None:
    one = case((6, 7, 3), False, labels=False)
    one.target[2, 3] = one.ignore_index
    one.check()
    one.input[2, 3] = math.nan
    results = one.run()
    assert results["loss"].isfinite()
    assert (results["grad"][2, 3] == 0).all()


def test_background() -> None:
    one = case((20, 7, 3), False, background=7)
    one.target[3] = 7
    one.check()


@FORMS
def test_nothing_counts(softmax: bool) -> None:
    one = case((4, 5, 1), softmax)
    one.target.fill_(one.ignore_index)
    results = one.run()
    assert results["loss"].isnan()
    assert results["normalizer"] == 0
    assert (results["grad"] == 0).all()


@FORMS
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_class_vectors(dtype: torch.dtype, labels: bool, softmax: bool) -> None:
    for values in (torch.float32, torch.float64, torch.bfloat16):
        vectors = torch.rand(3, 13, device=DEVICE).add(0.1).div(1.2).to(values)
        for inner in (1, 3):
            options: dict[str, Any] = {"alphas": vectors[0], "weight": vectors[1], "gamma": 1.0}
            if not softmax:
                options["pos_weight"] = vectors[2]
            case((9, 13, inner), softmax, dtype, labels, **options).check()


@FORMS
@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_labels_that_are_no_class(label: int, softmax: bool) -> None:
    if DEVICE == "cuda":
        pytest.skip("an assertion on the device ends its context")
    from triton.runtime.errors import InterpreterError

    one = case((6, 5, 1), softmax)
    one.target[4] = label
    with pytest.raises(InterpreterError, match="a label of the focal loss is no class"):
        one.run()
