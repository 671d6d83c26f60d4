"""Focal loss of any shape and strides: the right elements meet, and the edges of vectors hold."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from .batch_norm_reference import LAYOUTS, is_slow, spare
from .focal_loss_reference import (
    FORMS,
    assert_matches_reference,
    function_of,
    make_call,
    run,
    vectors,
)
from .reference import FLOATS, HALVES, assert_same_bits, few_examples

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
KINDS = pytest.mark.parametrize("kind", ["labels", "hard", "soft"])
KERNEL_LAYOUTS = ("contiguous", "last", "misaligned_last")  # others are copied before


def with_grad(form: str, input: Tensor) -> Tensor:
    return torch.rand_like(input if form == "sigmoid" else input[:, 0])


# The edges of vectors, of blocks of threads and of what a block takes of a row.
SHAPES = [
    (1, 1), (1, 2), (2, 1), (7, 1), (1, 7), (3, 8), (8, 9), (17, 16), (31, 3), (33, 33),
    (2, 3, 1), (1, 3, 7), (2, 3, 8), (3, 2, 9), (2, 5, 2, 5), (1, 17, 17), (2, 4, 1, 3, 5),
    (255, 2), (257, 3), (2, 1023), (3, 1024), (2, 1025), (1, 2, 1025), (1025, 1), (2, 33, 33),
]  # fmt: skip
LARGE_SHAPES = [
    (3, 30_000), (70_000, 1), (40_000, 5), (2, 3, 33_000), (1, 1000, 129), (513, 1023), (4097, 17),
]  # fmt: skip


@BOTH_FORMS
@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(
    backend: str, device: torch.device, shape: tuple[int, ...], kind: str, form: str
) -> None:
    spare(backend, kind == ("soft" if form == "sigmoid" else "hard") or max(shape) == 1024)
    spare(backend, kind != "labels" and shape[1] < 8)
    for dtype in FLOATS if backend == "cpu" else (torch.float32,):
        input, target = make_call(form, shape, device, dtype, kind)
        grad = with_grad(form, input)
        assert_matches_reference(form, input, target, grad, reduction="none")
        assert_matches_reference(form, input, target, reduction="mean")


@BOTH_FORMS
@KINDS
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_sizes(
    backend: str, device: torch.device, shape: tuple[int, ...], kind: str, form: str
) -> None:
    spare(backend, True)
    if backend == "torch":
        pytest.skip("torch's own operators have no edges of ours")
    input, target = make_call(form, shape, device, kind=kind)
    assert_matches_reference(
        form, input, target, with_grad(form, input), reduction="none", gamma=1.5
    )
    assert_matches_reference(form, input, target, reduction="sum")


@few_examples
@hypothesis.given(
    form=st.sampled_from(FORMS),
    shape=st.lists(st.integers(1, 11), min_size=2, max_size=5).map(tuple),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(FLOATS),
    kind=st.sampled_from(["labels", "hard", "soft"]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.3]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    has_vectors=st.booleans(),
)
def test_any_call(
    backend: str,
    device: torch.device,
    form: str,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    kind: str,
    reduction: str,
    gamma: float,
    smoothing: float,
    has_vectors: bool,
) -> None:
    hypothesis.assume(not is_slow(backend) or torch.Size(shape).numel() < 1000)
    input, target = make_call(form, shape, device, dtype, kind)
    options: dict[str, Any] = {"gamma": gamma, "label_smoothing": smoothing, "reduction": reduction}
    if has_vectors:
        options |= vectors(form, shape[1], device)
    assert_matches_reference(form, LAYOUTS[layout](input), target, **options)


@BOTH_FORMS
@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: torch.device, layout: str, kind: str, form: str) -> None:
    """Of the input, and of target and gradient beside a contiguous input."""
    spare(backend, layout not in KERNEL_LAYOUTS or kind == "hard")
    for shape in ((3, 9, 5, 3), (5, 9), (4, 7, 6)):
        if backend != "cpu" and len(shape) != 4:
            continue
        input, target = make_call(form, shape, device, kind=kind)
        grad = with_grad(form, input)
        options: dict[str, Any] = {"reduction": "none", **vectors(form, shape[1], device)}
        loss, gradient = assert_matches_reference(
            form, LAYOUTS[layout](input), target, grad, **options
        )
        if layout in KERNEL_LAYOUTS and backend != "torch":
            assert gradient.stride() == LAYOUTS[layout](input).stride()
        for other in {layout, "last"}:
            dense_target = target.dim() == input.dim()
            same = run(
                function_of(form),
                LAYOUTS[other](input),
                LAYOUTS[layout](target) if dense_target or target.dim() > 1 else target,
                LAYOUTS[layout](grad) if grad.dim() > 1 else grad,
                **options,
            )
            torch.testing.assert_close(same, (loss, gradient), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@BOTH_FORMS
def test_every_misalignment(
    backend: str, device: torch.device, form: str, dtype: torch.dtype, offset: int
) -> None:
    """Input, target and gradient begin at different places of a vector."""
    spare(backend, offset not in (1, 4))
    shape, size = (5, 34), 5 * 34
    for kind in ("labels", "soft"):
        input, target = make_call(form, shape, device, dtype, kind)
        buffer = torch.zeros(3, size + 16, device=device, dtype=dtype)
        moved = buffer[0, offset : offset + size].view(shape)
        moved.copy_(input)
        if kind == "soft":
            other = buffer[1, 9 - offset : 9 - offset + size].view(shape)
            target = other.copy_(target)
        else:
            target = torch.cat([target[:1], target])[1:]
        grad = with_grad(form, input)
        place = buffer[2, offset // 2 : offset // 2 + grad.numel()].view(grad.shape)
        assert_matches_reference(form, moved, target, place.copy_(grad), reduction="none")


@BOTH_FORMS
def test_expanded(backend: str, device: torch.device, form: str) -> None:
    """Strides of 0: of the input, of the target, and the gradient of a sum."""
    shape = (4, 3, 5)
    input, target = make_call(form, shape, device, kind="soft")
    labels = make_call(form, shape, device)[1]
    for dim in (0, 2) if form == "softmax" else range(3):  # of equal classes the gradient is 0
        for given in (target.narrow(dim, 1, 1).expand(shape), labels[:1].expand(4, 5)):
            grad = torch.full((), 0.5, device=device)
            grad = grad.expand(shape if form == "sigmoid" else (4, 5))
            x = input.narrow(dim, 0, 1).expand(shape)
            assert_matches_reference(form, x, given, grad, reduction="none")


@pytest.mark.parametrize("name", ["input", "target", "grad", "weight", "alpha"])
@BOTH_FORMS
def test_negated(backend: str, device: torch.device, form: str, name: str) -> None:
    """A tensor may carry torch's lazy minus sign."""
    input, target = make_call(form, (4, 3, 5), device, kind="soft")
    given = {"input": input, "target": target, "grad": with_grad(form, input)}
    given |= vectors(form, 3, device)
    value = given[name]
    for lazy in (torch.complex(value, value).conj().imag, torch._neg_view(value)):
        assert lazy.is_neg()
        assert_matches_reference(form, **{**given, name: -lazy, "reduction": "none"})
        assert_matches_reference(form, **{**given, name: lazy.abs(), "reduction": "none"})


@BOTH_FORMS
@pytest.mark.parametrize("name", ["alpha", "weight"])
def test_vectors_with_gaps(backend: str, device: torch.device, name: str, form: str) -> None:
    """Every other element of a vector, or one that is expanded, or begins anywhere."""
    input, target = make_call(form, (4, 6, 5), device)
    values = vectors(form, 6, device)[name]
    for view in (
        values.repeat_interleave(2)[::2],
        torch.cat([values[:1], values])[1:],
        values[:1].expand(6),
        values.half(),
        values.tolist() if name == "alpha" else values,
    ):
        expected = view if isinstance(view, Tensor) else values
        actual = run(function_of(form), input, target, reduction="mean", **{name: view})
        reference = assert_matches_reference(
            form, input, target, reduction="mean", **{name: expected}
        )
        torch.testing.assert_close(actual, reference, rtol=1e-6, atol=1e-7)


@BOTH_FORMS
@pytest.mark.parametrize("kind", ["labels", "soft"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 2, 2)], ids=str)
def test_empty(
    backend: str, device: torch.device, shape: tuple[int, ...], kind: str, form: str
) -> None:
    """Sums of nothing are 0, means NaN, as in torch."""
    input = torch.randn(shape, device=device)
    target = torch.rand(shape, device=device)
    if kind == "labels":
        target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64, device=device)
    for reduction in ("none", "mean", "sum"):
        loss, grad = run(function_of(form), input, target, reduction=reduction)
        assert grad.shape == shape
        if reduction == "none":
            assert loss.shape == (shape if form == "sigmoid" else shape[:1] + shape[2:])
        else:
            assert loss.isnan().item() == (reduction == "mean")
    expected = torch.nn.functional.cross_entropy(input, target)
    assert expected.isnan()


@BOTH_FORMS
def test_single_sample(backend: str, device: torch.device, form: str) -> None:
    """Logits ``[C]`` are those of one row."""
    input, target = make_call(form, (2, 5), device)
    input, target = input[1], target[1]
    for reduction in ("none", "mean"):
        single = run(function_of(form), input, target, reduction=reduction)
        row = run(function_of(form), input[None], target[None], reduction=reduction)
        assert single[0].shape == (row[0][0].shape if reduction == "none" else ())
        assert_same_bits(single[0], row[0].view(single[0].shape))
        assert_same_bits(single[1], row[1][0])


def test_numbers_and_vectors_of_logits(backend: str, device: torch.device) -> None:
    """torchvision takes any shape, that of a single number, too."""
    x, target = make_call("sigmoid", (1, 6), device, kind="soft")
    expected = run(_sigmoid, x, target)
    for shape in ((6,), (6, 1), (1, 6, 1)):
        loss, grad = run(_sigmoid, x.view(shape), target.view(shape))
        torch.testing.assert_close(loss, expected[0].view(shape))
        torch.testing.assert_close(grad, expected[1].view(shape))
    loss, grad = run(_sigmoid, x[0, 0], target[0, 0])
    assert loss.shape == grad.shape == ()
    torch.testing.assert_close(loss, expected[0][0, 0])


_sigmoid = function_of("sigmoid")


@BOTH_FORMS
@pytest.mark.parametrize("layout", KERNEL_LAYOUTS)
def test_arguments_are_left_alone(
    backend: str, device: torch.device, layout: str, form: str
) -> None:
    for kind in ("labels", "soft"):
        input, target = make_call(form, (3, 9, 5, 3), device, kind=kind)
        input = LAYOUTS[layout](input)
        grad = with_grad(form, input)
        options = vectors(form, 9, device)
        given = (input, target, grad, *options.values())
        kept = [tensor.clone() for tensor in given]
        run(function_of(form), input, target, grad, reduction="none", **options)
        run(function_of(form), input, target, reduction="mean", **options)
        for actual, expected in zip(given, kept, strict=True):
            assert_same_bits(actual, expected)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_of_another_layout(
    backend: str, device: torch.device, dtype: torch.dtype, form: str
) -> None:
    input, target = make_call(form, (3, 9, 5, 3), device, dtype, "soft")
    for layout in ("last", "sliced", "transposed"):
        assert_matches_reference(form, LAYOUTS[layout](input), target, reduction="sum")
