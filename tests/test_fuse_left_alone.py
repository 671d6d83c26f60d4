"""What fuse_ leaves alone, and the reasons it gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastremedy
from fastremedy.nn.fuse import FuseReport, fuse_

from .fuse_models import Forward


def only_reason(module: nn.Module) -> str:
    """Fuse a model in which nothing can be fused; return the reason."""
    before = {name: type(m) for name, m in module.named_modules()}
    report = fuse_(module)
    assert report.fused == []
    assert {name: type(m) for name, m in module.named_modules()} == before
    assert not any("forward" in vars(m) for m in module.modules())
    ((_, reason),) = report.left
    return reason


class NormAndAct(nn.BatchNorm2d):
    """As in timm: a BatchNorm whose forward goes on."""

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(super().forward(input))


def saves_input(self: Any, x: Tensor) -> Tensor:
    self.last = x
    return F.relu(self.bn(x))


def appends_input(self: Any, x: Tensor) -> Tensor:
    self.calls.append(x)
    return F.relu(self.bn(x))


def without_grad(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.bn(x)
    return F.relu(x)


def with_autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        x = F.relu(self.bn(x))
    return x


class Doubled(torch.autograd.Function):
    """A gradient that its forward does not tell."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def checkpoints(self: Any, x: Tensor) -> Tensor:
    return checkpoint(lambda x: F.relu(self.bn(x)), x, use_reentrant=False)


def asks_for_grad_mode(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(x)) if torch.is_grad_enabled() else x


def skips_at_random(self: Any, x: Tensor) -> Tensor:
    return x if torch.rand(()) < 0.5 else F.relu(self.bn(x))


def skips_at_random_in_python(self: Any, x: Tensor) -> Tensor:
    return x if random.random() < 0.5 else F.relu(self.bn(x))


def asks_for_a_class(self: Any, x: Tensor) -> Tensor:
    y = F.relu(self.bn(x))
    return y if isinstance(y, Tensor) else x


def passes_a_class(self: Any, x: Tensor) -> Tensor:
    return x.__class__(F.relu(self.bn(x)))


def skips_at_random_in_numpy(self: Any, x: Tensor) -> Tensor:
    return x if numpy.random.rand() < 0.5 else F.relu(self.bn(x))


def adds_in_place_to_other(self: Any, x: Tensor) -> Tensor:
    x = x * 2
    x += self.bn(x)
    return F.relu(x)


def uses_input_before_sum(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = self.bn(y)
    return F.relu(z + torch.relu_(y))


LEFT_FORWARDS: list[tuple[str, Callable[[Any, Tensor], Tensor]]] = [
    ("its output is used more than once", lambda s, x: s.relu(y := s.bn(x)) + y),
    (
        "followed by a sum, its output is used more than once",
        lambda s, x: (y := s.bn(x) + x) * F.relu(y),
    ),
    ("called more than once", lambda s, x: s.relu(s.bn(s.relu(s.bn(x))))),
    ("followed by nothing", lambda s, x: s.bn(s.relu(x))),
    ("followed by Dropout", lambda s, x: s.relu(s.drop(s.bn(x)))),
    ("followed by mul", lambda s, x: F.relu(s.bn(x) * x)),
    ("followed by sigmoid", lambda s, x: torch.sigmoid(s.bn(x))),
    ("followed by sigmoid", lambda s, x: s.bn(x).sigmoid()),
    ("followed by relu6", lambda s, x: F.relu6(s.bn(x))),
    ("followed by ELU with alpha != 1", lambda s, x: F.elu(s.bn(x), 0.5)),
    ("followed by ELU with alpha != 1", lambda s, x: F.elu(s.bn(x), alpha=0.5)),
    (
        "followed by LeakyReLU with a slope that is no number",
        lambda s, x: F.leaky_relu(s.bn(x), x.mean()),
    ),
    ("followed by a sum, followed by mul", lambda s, x: F.relu((s.bn(x) + x) * 2)),
    ("followed by a sum, followed by nothing", lambda s, x: s.bn(x) + x),
    ("followed by a sum with options", lambda s, x: F.relu(torch.add(s.bn(x), x, alpha=2))),
    ("followed by a sum with itself", lambda s, x: F.relu((y := s.bn(x)) + y)),
    ("followed by a sum with what may not be a tensor", lambda s, x: F.relu(s.bn(x) + 1)),
    ("followed by a sum with what may not be a tensor", lambda s, x: F.relu(s.bn(x) + x.shape[0])),
    ("added to another tensor in place", adds_in_place_to_other),
    ("its input may change before the sum", uses_input_before_sum),
    ("called with other arguments than one tensor", lambda s, x: F.relu(s.bn(input=x))),
    ("no traced forward calls it", lambda s, x: s.relu(x)),
    (
        "forward of Forward: it cannot be traced: symbolically traced variables cannot be used",
        lambda s, x: s.relu(s.bn(x)) if x.sum() > 0 else x,
    ),
    (
        "forward of Forward: it cannot be traced: 'Forward' object has no",
        lambda s, x: s.relu(s.bn(s.missing(x))),
    ),
    (
        "forward of Forward: it differs between training and evaluation",
        lambda s, x: s.relu(s.bn(x)) if s.training else x,
    ),
    (
        "forward of Forward: it differs between training and evaluation",
        lambda s, x: F.dropout(s.relu(s.bn(x)), 0.1, s.training),
    ),
    ("forward of Forward: it changes attributes of a module", saves_input),
    ("forward of Forward: it changes attributes of a module", appends_input),
    (
        "forward of Forward: it uses a tensor that is no attribute of its modules",
        lambda s, x: F.relu(s.bn(x) + torch.ones(())),
    ),
    ("forward of Forward: it changes grad mode, autocast or what is saved", without_grad),
    ("forward of Forward: it changes grad mode, autocast or what is saved", with_autocast),
    ("forward of Forward: it changes grad mode, autocast or what is saved", checkpoints),
    (
        "forward of Forward: it changes grad mode, autocast or what is saved",
        lambda s, x: F.relu(s.bn(Doubled.apply(x))),
    ),
    (
        "forward of Forward: it differs between training and evaluation, or without grad",
        asks_for_grad_mode,
    ),
    ("forward of Forward: it asks what class a value is of", asks_for_a_class),
    ("forward of Forward: it asks what class a value is of", passes_a_class),
    ("forward of Forward: it draws random numbers", skips_at_random),
    ("forward of Forward: it draws random numbers", skips_at_random_in_python),
    ("forward of Forward: it draws random numbers", skips_at_random_in_numpy),
]


@pytest.mark.parametrize(("reason", "forward"), LEFT_FORWARDS)
def test_forward_is_left_alone(reason: str, forward: Callable[[Any, Tensor], Tensor]) -> None:
    module = Forward(forward)
    keys = list(vars(module))
    states = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    assert only_reason(module).startswith(reason)
    assert list(vars(module)) == keys
    assert module.calls == []
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(numpy.random.get_state())) == states[1:]


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return F.relu(self.bn(x) + (x if residual is None else residual))


class Variable(Optional):
    def forward(self, *x: Tensor) -> Tensor:
        return F.relu(self.bn(x[0]))


def test_optional_and_variable_arguments_are_left_alone() -> None:
    assert only_reason(Optional()) == "forward of Optional: it has optional arguments"
    assert "a variable number of arguments" in only_reason(Variable())


@pytest.mark.parametrize(
    ("reason", "norm"),
    [
        ("NormAndAct may be more than a BatchNorm", NormAndAct(3)),
        ("LazyBatchNorm2d may be more than a BatchNorm", nn.LazyBatchNorm2d()),
        (
            "ParametrizedBatchNorm2d may be",
            nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(3), dim=None),
        ),
        ("BatchNorm2d may be", torch.ao.nn.quantized.BatchNorm2d(3)),
    ],
)
def test_other_classes_are_left_alone(reason: str, norm: nn.Module) -> None:
    assert only_reason(nn.Sequential(norm, nn.ReLU())).startswith(reason)


@pytest.mark.parametrize(
    ("reason", "activation"),
    [
        ("followed by ReLU6", nn.ReLU6()),
        ("followed by ELU with alpha != 1", nn.ELU(0.5)),
        ("followed by PReLU", nn.PReLU()),
        ("followed by Dropout", nn.Sequential(nn.Dropout(), nn.ReLU())[0]),
    ],
)
def test_other_activations_are_left_alone(reason: str, activation: nn.Module) -> None:
    mobile = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), activation, nn.ReLU())
    assert only_reason(mobile) == reason


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS.keys())
def test_modules_with_hooks_are_left_alone(hook: Callable[[nn.Module], Any]) -> None:
    on_norm, on_activation = (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()) for _ in range(2))
    hook(on_norm[0])
    hook(on_activation[1])
    assert only_reason(on_norm) == "it has hooks"
    assert only_reason(on_activation) == "followed by ReLU with hooks"
    on_identity = nn.Sequential(nn.BatchNorm2d(3), nn.Identity(), nn.ReLU())
    hook(on_identity[1])
    assert only_reason(on_identity) == "followed by Identity"


def test_a_batch_norm_by_itself_is_left_alone() -> None:
    norm = nn.BatchNorm2d(3)
    report = fuse_(norm)
    assert report.left == [("", "no traced forward calls it")]
    assert "(the model)" in str(report)


def test_scripted_modules_are_left_alone() -> None:
    with pytest.warns(DeprecationWarning, match="jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    assert fuse_(scripted) == FuseReport()


def test_ours_are_no_news() -> None:
    model = nn.Sequential(fastremedy.nn.BatchNormReLU2d(3), nn.ReLU())
    assert fuse_(model) == FuseReport()


def test_only_modules() -> None:
    with pytest.raises(TypeError, match="expected a module, got list"):
        fuse_([])  # type: ignore[arg-type]
