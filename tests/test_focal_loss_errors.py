"""What focal loss refuses: the message names the argument, what was expected and what came."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastremedy.nn import FocalLoss, SigmoidFocalLoss

from .batch_norm_reference import spare
from .conftest import HAS_GPU
from .focal_loss_reference import FORMS, function_of, make_call
from .reference import assert_same_bits

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)

# Of a label that is no class, by host, emulated device and interpreted kernel.
REFUSALS: tuple[type[Exception], ...] = (IndexError, RuntimeError)
if not HAS_GPU and importlib.util.find_spec("triton"):
    REFUSALS += (importlib.import_module("triton.runtime.errors").InterpreterError,)

# Options, the exception, and what its message has to say.
OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"gamma": torch.tensor(2.0)}, TypeError, "gamma must be a number, got Tensor"),
    ({"gamma": None}, TypeError, "gamma must be a number, got NoneType"),
    ({"gamma": "2"}, TypeError, "gamma must be a number, got str"),
    ({"gamma": -0.1}, ValueError, "gamma must be a finite float32 number >= 0, got -0.1"),
    ({"gamma": math.nan}, ValueError, "gamma must be a finite float32 number >= 0, got nan"),
    ({"gamma": math.inf}, ValueError, "gamma must be a finite float32 number >= 0, got inf"),
    ({"gamma": 1e39}, ValueError, "gamma must be a finite float32 number >= 0, got 1e+39"),
    ({"alpha": "x"}, TypeError, "alpha must be one number or one for each class, got 'x'"),
    ({"alpha": [None] * 5}, TypeError, "alpha must be one number or one for each class, got [None"),
    ({"reduction": "max"}, ValueError, "reduction must be 'none', 'mean' or 'sum', got 'max'"),
    ({"reduction": None}, ValueError, "reduction must be 'none', 'mean' or 'sum', got None"),
    ({"label_smoothing": 1.1}, ValueError, "label_smoothing must be in [0, 1], got 1.1"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing must be in [0, 1], got -0.1"),
    ({"label_smoothing": math.nan}, ValueError, "label_smoothing must be in [0, 1], got nan"),
    ({"label_smoothing": "x"}, TypeError, "label_smoothing must be a number, got str"),
    ({"ignore_index": None}, TypeError, "ignore_index must be an int, got NoneType"),
    ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    ({"ignore_index": 2**63}, ValueError, "ignore_index must be an int64, got 9223372036854775808"),
]
TENSOR_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"weight": torch.ones(4)}, ValueError, "weight must have one value for each class, shape [5]"),
    ({"weight": torch.ones(1, 5)}, ValueError, "weight must have one value for each class"),
    ({"weight": torch.ones(())}, ValueError, "weight must have one value for each class"),
    ({"weight": [1.0] * 5}, TypeError, "weight must be a Tensor, got list"),
    ({"weight": 2.0}, TypeError, "weight must be a Tensor, got float"),
    ({"alpha": torch.ones(6)}, ValueError, "alpha must have one value for each class, shape [5]"),
    ({"alpha": [0.5] * 4}, ValueError, "alpha must have one value for each class, shape [5], got"),
    ({"weight": torch.ones(5, device="meta")}, ValueError, "weight must be on cpu, got meta"),
]


def expect(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@BOTH_FORMS
@pytest.mark.parametrize(("options", "error", "message"), OPTIONS + TENSOR_OPTIONS, ids=str)
def test_options(
    backend: str,
    device: torch.device,
    form: str,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    input, target = make_call(form, (6, 5), device)
    is_meta = any(isinstance(v, Tensor) and v.is_meta for v in options.values())
    if not is_meta:
        options = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in options.items()
        }
    message = message.replace("on cpu", f"on {input.device}")
    expect(error, message, lambda: function_of(form)(input, target, **options))


@pytest.mark.parametrize("alpha", [1.5, math.nan, math.inf])
def test_share_of_the_positives(backend: str, device: torch.device, alpha: float) -> None:
    input, target = make_call("sigmoid", (6, 5), device)
    message = f"alpha must be in [0, 1], or below 0 or None for none, got {alpha}"
    expect(ValueError, message, lambda: function_of("sigmoid")(input, target, alpha))
    expect(ValueError, message, lambda: SigmoidFocalLoss(alpha))
    expect(ValueError, message, lambda: SigmoidFocalLoss([0.5, alpha]))
    function_of("softmax")(input, target, alpha=1.5)  # a factor may be anything


def test_pos_weight(backend: str, device: torch.device) -> None:
    input, target = make_call("sigmoid", (6, 5), device)
    message = "pos_weight must have one value for each class, shape [5], got [3]"
    weight = torch.ones(3, device=device)
    expect(ValueError, message, lambda: function_of("sigmoid")(input, target, pos_weight=weight))


# Input, target, and what the message has to say; {} is the name of the argument.
TENSORS: list[tuple[Any, Any, type[Exception], str]] = [
    ([[1.0]], torch.zeros(1, dtype=torch.int64), TypeError, "{input} must be a Tensor, got list"),
    (torch.ones(2, 3), [0, 1], TypeError, "{target} must be a Tensor, got list"),
    (torch.ones(2, 3), None, TypeError, "{target} must be a Tensor, got NoneType"),
    (
        torch.ones(2, 3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64),
        TypeError, "{input} must have a floating-point dtype, got torch.int64",
    ),
    (
        torch.ones(2, 3, dtype=torch.complex64), torch.zeros(2, dtype=torch.int64),
        TypeError, "{input} must have a floating-point dtype, got torch.complex64",
    ),
    (
        torch.ones(2, 3), torch.ones(2, 3, dtype=torch.complex64),
        TypeError, "{target} must be labels or probabilities, got torch.complex64",
    ),
    (
        torch.ones(2, 3), torch.zeros(3, dtype=torch.int64),
        ValueError, "{target} must be labels [2] of an integer dtype or probabilities [2, 3] for",
    ),
    (
        torch.ones(2, 3), torch.zeros(2, 1, dtype=torch.int64),
        ValueError, "got torch.int64 [2, 1]",
    ),
    (torch.ones(2, 3), torch.zeros(2), ValueError, "got torch.float32 [2]"),
    (torch.ones(2, 3), torch.zeros(2, 4), ValueError, "got torch.float32 [2, 4]"),
    (
        torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64),
        ValueError, "{target} must be labels [2, 4]",
    ),
    (torch.ones(2, 3, 4), torch.zeros(2, 4, 3), ValueError, "{target} must be labels [2, 4]"),
    (
        torch.ones(2, 3), torch.zeros(2, dtype=torch.int64, device="meta"),
        ValueError, "{target} must be on cpu, got meta",
    ),
    (
        torch.ones(()), torch.zeros(2, dtype=torch.int64),
        ValueError, "{input} must be [C], [N, C] or [N, C, *], got []",
    ),
]  # fmt: skip


@BOTH_FORMS
@pytest.mark.parametrize(("input", "target", "error", "message"), TENSORS)
def test_tensors(
    backend: str,
    device: torch.device,
    form: str,
    input: Any,
    target: Any,
    error: type[Exception],
    message: str,
) -> None:
    spare(backend, form == "sigmoid" and error is TypeError)
    input, target = (
        value.to(device) if isinstance(value, Tensor) and not value.is_meta else value
        for value in (input, target)
    )
    names = {"input": "input", "target": "target"}
    if form == "sigmoid":
        names = {"input": "inputs", "target": "targets"}
    message = message.format(**names).replace("on cpu", f"on {getattr(input, 'device', 'cpu')}")
    expect(error, message, lambda: function_of(form)(input, target))


@BOTH_FORMS
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**63), -99])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_labels_that_are_no_class(
    backend: str, device: torch.device, reduction: str, label: int, form: str
) -> None:
    """On CPUs with its place and value; kernels of GPUs assert, and read nothing beyond."""
    if HAS_GPU and backend in ("cuda", "triton"):
        pytest.skip("an assertion on the device ends the process's use of it")
    spare(backend, label == -99 or reduction == "none")
    input, target = make_call(form, (4, 5, 3), device)
    target = target.clamp(min=0)
    target[2, 1] = label
    for leaf in (input, input.clone().requires_grad_()):
        kept = leaf.detach().clone()
        with pytest.raises(REFUSALS) as info:
            function_of(form)(leaf, target, reduction=reduction)
        if backend in ("cpu", "torch"):
            assert type(info.value) is IndexError
            assert str(info.value) == (
                f"Target {label} is out of bounds: target.flatten()[7] must be in [0, 5) or "
                "ignore_index (-100)"
            )
        elif backend == "triton":
            assert "a label of the focal loss is no class" in str(info.value)
        assert_same_bits(leaf.detach(), kept)
    target[2, 1] = 4
    function_of(form)(input, target, reduction=reduction)


def test_background_is_of_sigmoid(backend: str, device: torch.device) -> None:
    """A background class is no class of rows without it."""
    input, target = make_call("sigmoid", (6, 5), device)
    target[1] = 5
    function_of("sigmoid")(input, target, background_class=5)
    if not (HAS_GPU and backend in ("cuda", "triton")):
        with pytest.raises(REFUSALS):
            function_of("sigmoid")(input, target, background_class=6)


@pytest.mark.parametrize("cls", [FocalLoss, SigmoidFocalLoss])
@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=str)
def test_modules(cls: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """They fail where they are made, not where they are called."""
    expect(error, message, lambda: cls(**options))


@BOTH_FORMS
def test_sparse_input(backend: str, device: torch.device, form: str) -> None:
    input, target = make_call(form, (6, 5), device)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        function_of(form)(input.to_sparse(), target)


def test_probabilities_have_no_ignored_label_as_in_torch(
    backend: str, device: torch.device
) -> None:
    input = torch.randn(3, 5, device=device)
    for refuse in (torch.nn.CrossEntropyLoss(ignore_index=1), FocalLoss(ignore_index=1)):
        message = "ignore_index is not supported for floating point target"
        expect(RuntimeError, message, lambda refuse=refuse: refuse(input, input.softmax(1)))


@pytest.mark.parametrize(("label", "error"), [("3", TypeError), (-(2**63) - 1, ValueError)])
def test_background_class_is_an_integer(label: Any, error: type[Exception]) -> None:
    loss = SigmoidFocalLoss(background_class=label)
    call = lambda: loss(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64))  # noqa: E731
    expect(error, "background_class must be an int", call)
