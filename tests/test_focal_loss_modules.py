"""FocalLoss and SigmoidFocalLoss as modules, and weights of classes from their counts."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastremedy.functional import FocalLossStats
from fastremedy.nn import FocalLoss, SigmoidFocalLoss, class_balanced_alpha

from .focal_loss_reference import FORMS, function_of, make_call, run, vectors
from .reference import assert_same_bits

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
MODULES: dict[str, Any] = {"sigmoid": SigmoidFocalLoss, "softmax": FocalLoss}


@BOTH_FORMS
@pytest.mark.parametrize("has_vectors", [False, True])
@pytest.mark.parametrize("kind", ["labels", "soft"])
def test_module_is_the_function(
    backend: str, device: torch.device, kind: str, has_vectors: bool, form: str
) -> None:
    input, target = make_call(form, (6, 5, 3), device, kind=kind)
    options: dict[str, Any] = {"gamma": 1.5, "label_smoothing": 0.1}
    if kind == "labels":  # of probabilities of classes none can be ignored
        options["ignore_index"] = 2
    target = target.clamp(min=0)
    options |= vectors(form, 5, device) if has_vectors else {"alpha": 0.4}
    for reduction in ("none", "mean", "sum"):
        module = MODULES[form](**options, reduction=reduction).to(device)
        actual = run(module, input, target)
        expected = run(function_of(form), input, target, reduction=reduction, **options)
        assert_same_bits(actual[0], expected[0])
        assert_same_bits(actual[1], expected[1])


def test_defaults(backend: str, device: torch.device) -> None:
    """Those of the functions, which are those of torchvision and of cross entropy."""
    for form in FORMS:
        input, target = make_call(form, (6, 5), device)
        assert_same_bits(MODULES[form]()(input, target), function_of(form)(input, target))
    input, target = make_call("softmax", (6, 5), device)
    cross_entropy = nn.CrossEntropyLoss()(input, target)
    torch.testing.assert_close(FocalLoss(gamma=0)(input, target), cross_entropy)
    assert SigmoidFocalLoss()(input, target).shape == input.shape


def test_background_class(backend: str, device: torch.device) -> None:
    input, target = make_call("sigmoid", (6, 5), device)
    target[0] = 5
    module = SigmoidFocalLoss(background_class=5)
    expected = function_of("sigmoid")(input, target, background_class=5)
    assert_same_bits(module(input, target), expected)


def test_state_dict_is_that_of_cross_entropy() -> None:
    weight = torch.rand(5)
    for given in (None, weight):
        ours, torchs = FocalLoss(weight=given), nn.CrossEntropyLoss(weight=given)
        assert list(ours.state_dict()) == list(torchs.state_dict())
        torchs.load_state_dict(ours.state_dict())
        ours.load_state_dict(torchs.state_dict())
    other = FocalLoss(weight=torch.zeros(5))
    other.load_state_dict(nn.CrossEntropyLoss(weight=weight).state_dict())
    assert_same_bits(other.state_dict()["weight"], weight)
    names = list(SigmoidFocalLoss([0.1, 0.2], weight=torch.rand(2)).state_dict())
    assert sorted(names) == ["alpha", "weight"]


@BOTH_FORMS
def test_buffers_move(form: str) -> None:
    """Of every vector, whether it was a list or a tensor; numbers stay numbers."""
    options = vectors(form, 3, torch.device("cpu"))
    options["alpha"] = options["alpha"].tolist()
    module = MODULES[form](**options)
    assert sorted(module.state_dict()) == sorted(options)
    assert all(buffer.is_meta for buffer in module.to("meta").buffers())
    module = MODULES[form](**options).double()
    assert all(buffer.dtype == torch.float64 for buffer in module.buffers())
    assert MODULES[form](0.5).state_dict() == {}
    assert not list(MODULES[form](**options).parameters())


@BOTH_FORMS
def test_made_where_there_are_no_values(form: str) -> None:
    with torch.device("meta"):
        module = MODULES[form](alpha=[0.1, 0.2, 0.7])
    assert module.alpha.is_meta
    module.to_empty(device="cpu").load_state_dict({"alpha": torch.ones(3)})
    with FakeTensorMode():
        module = MODULES[form](alpha=[0.1, 0.2, 0.7], reduction="sum")
        assert module(torch.ones(2, 3), torch.tensor([0, 1])).shape == ()
        assert class_balanced_alpha([3, 4, 5], 0.9).shape == (3,)
    with torch.device("meta"):
        assert class_balanced_alpha([3, 4, 5], 0.9).is_meta


@BOTH_FORMS
def test_copies(backend: str, device: torch.device, form: str) -> None:
    input, target = make_call(form, (6, 3), device)
    module = MODULES[form](gamma=0.7, reduction="sum", **vectors(form, 3, device))
    module.collect_stats = True
    expected = module(input, target)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same_bits(other(input, target), expected)
        assert other.collect_stats
        assert other.last_stats.class_counts.tolist() == module.last_stats.class_counts.tolist()


def test_repr() -> None:
    assert repr(FocalLoss()) == "FocalLoss(gamma=2.0, alpha=None, reduction='mean')"
    module = SigmoidFocalLoss([0.1, 0.9], 1.5, "sum")
    assert repr(module) == "SigmoidFocalLoss(gamma=1.5, alpha=[C], reduction='sum')"


@BOTH_FORMS
def test_last_stats(backend: str, device: torch.device, form: str) -> None:
    """None unless asked for; then those of the last call."""
    input, target = make_call(form, (40, 3), device)
    module = MODULES[form](reduction="mean")
    assert module.last_stats is None
    module(input, target)
    assert module.last_stats is None
    module.collect_stats = True
    assert module.last_stats is None
    for rows in (40, 20):
        leaf = input[:rows].clone().requires_grad_()
        module(leaf, target[:rows]).backward()
        _, expected = function_of(form)(input[:rows], target[:rows], return_stats=True)
        actual = module.last_stats
        assert isinstance(actual, FocalLossStats)
        for value, other in zip(actual, expected, strict=True):
            assert_same_bits(value, other)
            assert not value.requires_grad
    module.collect_stats = False
    module(input, target)
    assert module.last_stats is None


def test_training(backend: str, device: torch.device) -> None:
    """A rare class is learned, and statistics show it."""
    torch.manual_seed(0)
    x = torch.randn(200, 2, device=device)
    target = (x[:, 0] > 1.7).long()
    alpha = class_balanced_alpha(target.bincount(minlength=2).cpu(), 0.99).to(device)
    model = nn.Linear(2, 2).to(device)
    loss_function = FocalLoss(alpha=alpha).to(device)
    loss_function.collect_stats = True
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen: list[Tensor] = []
    for _ in range(30):
        optimizer.zero_grad()
        loss_function(model(x), target).backward()
        optimizer.step()
        assert loss_function.last_stats is not None
        seen.append(loss_function.last_stats.mean_p_t)
    assert seen[-1][1] > max(0.6, seen[0][1].item())


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.9999, 1 - 1e-9])
def test_class_balanced_alpha(beta: float) -> None:
    counts = [1, 2, 10, 1000, 10**6, 10**9]
    weights = [(1 - beta) / -math.expm1(n * math.log(beta)) if beta else 1.0 for n in counts]
    expected = [len(counts) * weight / sum(weights) for weight in weights]
    for given in (counts, torch.tensor(counts), torch.tensor(counts).double()):
        actual = class_balanced_alpha(given, beta)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.tolist(), expected, rtol=2e-7, atol=0)


def test_class_balanced_alpha_of_the_papers_code() -> None:
    counts = torch.tensor([5000, 500, 50, 5])
    weights = (1 - 0.99) / (1 - 0.99 ** counts.double())
    expected = (weights / weights.sum() * 4).float()
    torch.testing.assert_close(class_balanced_alpha(counts, 0.99), expected)


def test_class_balanced_alpha_without_samples() -> None:
    """A class that has none weighs nothing, and the others what they would without it."""
    actual = class_balanced_alpha([100, 0, 10], 0.9)
    assert actual[1].item() == 0
    torch.testing.assert_close(actual[[0, 2]], class_balanced_alpha([100, 10], 0.9))
    assert class_balanced_alpha([0, 7], 0.0).tolist() == [0.0, 1.0]
    assert class_balanced_alpha([0, 0], 0.9).tolist() == [0.0, 0.0]
    # beta near 1 is one over the counts
    actual = class_balanced_alpha([1, 4], 1 - 1e-15)
    torch.testing.assert_close(actual, torch.tensor([1.6, 0.4]))


@pytest.mark.parametrize(
    ("counts", "beta", "message"),
    [
        ([1, 2], 1.0, "beta must be in [0, 1), got 1.0"),
        ([1, 2], -0.1, "beta must be in [0, 1), got -0.1"),
        ([1, 2], math.nan, "beta must be in [0, 1), got nan"),
        ([1, -2], 0.9, "counts must not be negative, got -2"),
        ([[1, 2]], 0.9, "counts must have one value for each class, got shape [1, 2]"),
    ],
)
def test_class_balanced_alpha_errors(counts: Any, beta: float, message: str) -> None:
    with pytest.raises(ValueError, match="must") as info:
        class_balanced_alpha(counts, beta)
    assert str(info.value) == message
