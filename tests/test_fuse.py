"""fuse_ and unfuse_: what is fused, what is left alone and why, and that nothing else changes."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import fastremedy
from fastremedy.nn.fuse import fuse_, unfuse_

from . import fuse_models as models
from .reference import assert_same_bits

WHOLE_MODELS = [
    models.ResNet(models.BasicBlock),
    models.ResNet(models.BasicBlockWithIdentities),
    models.ResNet(models.Bottleneck),
    models.VGG(),
    models.DenseNet(),
    models.PreActivation(),
    models.InlineDownsample(),
]


@pytest.fixture(params=WHOLE_MODELS, ids=lambda model: model.title)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return copy.deepcopy(request.param).double()


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 12, 12, generator=generator, dtype=torch.float64)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return everything that a step shows: output, gradients and state."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    output.square().sum().backward()
    grads = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    assert x.grad is not None
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return {"output": output.detach(), "x.grad": x.grad, **grads, **state}


def assert_alike(model: nn.Module, expected: nn.Module, x: Tensor | None = None) -> None:
    x = images() if x is None else x
    for training in (True, False, True):
        torch.testing.assert_close(
            run(model.train(training), x), run(expected.train(training), x), rtol=1e-9, atol=1e-9
        )


def counts_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count the calls of fused operations."""
    calls: list[str] = []
    base = fastremedy.nn.batch_norm_relu._BatchNormReLU
    original = base._run

    def run_and_count(self: nn.Module, *args: Any) -> Tensor:
        calls.append("with residual" if args[1] is not None else "plain")
        return original(self, *args)

    monkeypatch.setattr(base, "_run", run_and_count)
    return calls


# --- whole models ---


def test_same_outputs_gradients_and_state(model: nn.Module) -> None:
    expected = copy.deepcopy(model)
    assert fuse_(model).fused
    assert_alike(model, expected)


def test_float32(model: nn.Module) -> None:
    model.float()
    expected = copy.deepcopy(model)
    fuse_(model)
    actual, stock = run(model, images().float()), run(expected, images().float())
    torch.testing.assert_close(actual["output"], stock["output"], rtol=1e-4, atol=1e-4)


def test_every_fusion_is_called(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    report = fuse_(model)
    calls = counts_calls(monkeypatch)
    model(images())
    with_residual = sum("residual" in what for _, what in report.fused)
    assert calls.count("with residual") == with_residual
    assert calls.count("plain") == len(report.fused) - with_residual


def test_modules_and_tensors_are_the_same_objects(model: nn.Module) -> None:
    def parts() -> list[tuple[str, object]]:
        named = (model.named_modules(), model.named_parameters(), model.named_buffers())
        return [item for items in named for item in items]

    before, keys = parts(), list(model.state_dict())
    types = {name: type(m) for name, m in model.named_modules()}
    fused = dict(fuse_(model).fused)
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before, parts(), strict=True))
    assert list(model.state_dict()) == keys
    for name, module in model.named_modules():
        assert isinstance(module, types[name])
        assert name in fused or type(module) is types[name]


def test_unfuse_restores(model: nn.Module) -> None:
    expected = copy.deepcopy(model)
    attributes = {name: list(vars(m)) for name, m in model.named_modules()}
    fuse_(model)
    assert unfuse_(model) is model
    assert {name: list(vars(m)) for name, m in model.named_modules()} == attributes
    assert [type(m) for m in model.modules()] == [type(m) for m in expected.modules()]
    for training in (True, False):
        actual, stock = (run(m.train(training), images()) for m in (model, expected))
        for name, value in actual.items():
            assert_same_bits(value, stock[name])


def test_twice_is_once(model: nn.Module) -> None:
    first = fuse_(model)
    types = [type(m) for m in model.modules()]
    assert fuse_(model) == first
    assert [type(m) for m in model.modules()] == types


def test_fusing_leaves_modes(model: nn.Module) -> None:
    modules = list(model.modules())
    for i, module in enumerate(modules):
        module.training = i % 3 == 0
    fuse_(model)
    assert [m.training for m in modules] == [i % 3 == 0 for i in range(len(modules))]


def save_and_load(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load]
)
def test_a_copy_is_fused_and_independent(
    model: nn.Module,
    duplicate: Callable[[nn.Module], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = copy.deepcopy(model)
    report = fuse_(model)
    twin = duplicate(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls = counts_calls(monkeypatch)
    assert_alike(twin, expected)
    assert len(calls) == 3 * len(report.fused)
    for name, value in model.state_dict().items():
        assert_same_bits(value, state[name])
    assert [type(m) for m in unfuse_(twin).modules()] == [type(m) for m in expected.modules()]


# Dynamo does what this warning of torch is about.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.ResNet(models.BasicBlock).double()
    expected = copy.deepcopy(model)
    fuse_(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        stock = run(expected.train(training), images())
        with monkeypatch.context() as patch:  # what the fused forward has to do without
            for module in model.modules():
                if "forward" in vars(module):
                    patch.setattr(type(module), "forward", not_fused)
            actual = run(compiled.train(training), images())
        actual = {name.removeprefix("_orig_mod."): value for name, value in actual.items()}
        torch.testing.assert_close(actual, stock, rtol=1e-9, atol=1e-9)


def not_fused(*_: Any) -> Tensor:
    raise AssertionError("the original forward was called")


def test_state_dicts_are_exchangeable(model: nn.Module) -> None:
    expected = copy.deepcopy(model)
    fuse_(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    expected.load_state_dict(model.state_dict())
    assert_alike(model, expected)
    model.load_state_dict(copy.deepcopy(expected).state_dict())


def test_moves_with_the_model(model: nn.Module) -> None:
    expected = copy.deepcopy(model)
    fuse_(model)
    assert_alike(model.float().double(), expected.float().double())


def test_fake_tensors() -> None:
    """As where the memory of a model is estimated before there is one."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        assert fuse_(model).left == []
        assert model(torch.ones(2, 3, 5, 5)).shape == (2, 4, 3, 3)


def test_compile_of_many_alike_with_graph_breaks() -> None:
    """Their forwards are compiled once, as those of stock modules: torch.compile stops after 8."""

    class Chain(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            for block in self:
                x = block(x)
                torch._dynamo.graph_break()
            return x

    def block(activation: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), activation).double()

    model = Chain(*(block(nn.SiLU() if i % 4 else nn.ReLU()) for i in range(12)))
    expected = copy.deepcopy(model)
    assert fuse_(model).left == []
    counter = CompileCounter()
    torch.compiler.reset()
    with torch.no_grad():
        actual = torch.compile(model, backend=counter)(images())
        torch.testing.assert_close(actual, expected(images()))
    assert counter.frame_count == 2  # of two activations


def test_others_train_meanwhile() -> None:
    """As where a server loads a model: torch.fx shows a trace the calls of all threads."""
    other = models.PreActivation().double()
    expected = copy.deepcopy(other)(images())
    outputs = []

    def waits_for_another_thread(self: Any, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            outputs.append(pool.submit(other, images()).result())
        return F.relu(self.bn(x))

    assert fuse_(models.Forward(waits_for_another_thread)).left == []
    assert len(outputs) == 2  # in training and evaluation
    assert_same_bits(outputs[0], expected)


def test_two_at_once() -> None:
    several = [models.PreActivation() for _ in range(20)]
    call, interval = nn.Module.__call__, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert [report.left for report in pool.map(fuse_, several)] == [[]] * 20
    finally:
        sys.setswitchinterval(interval)
        is_as_before = nn.Module.__call__ is call
        nn.Module.__call__ = call
    assert is_as_before


# --- one forward ---


FUSED_FORWARDS: list[tuple[str, Callable[[Any, Tensor], Tensor]]] = [
    ("bn + relu", lambda s, x: s.relu(s.bn(x))),
    ("bn + relu", lambda s, x: F.relu(s.bn(x), inplace=True)),
    ("bn + relu", lambda s, x: torch.relu_(s.bn(x))),
    ("bn + relu", lambda s, x: s.bn(x).relu_()),
    ("bn + leaky_relu", lambda s, x: F.leaky_relu(s.bn(x), 0.3)),
    ("bn + leaky_relu", lambda s, x: F.leaky_relu(s.bn(x), negative_slope=0.3, inplace=True)),
    ("bn + elu", lambda s, x: F.elu(s.bn(x), 1.0, True)),
    ("bn + silu", lambda s, x: F.silu(s.bn(x), inplace=True)),
    ("bn + residual + relu", lambda s, x: s.relu(s.bn(x) + x)),
    ("bn + residual + relu", lambda s, x: s.relu(x + s.bn(x))),
    ("bn + residual + relu", lambda s, x: s.relu(torch.add(x, s.bn(x)))),
    ("bn + residual + relu", lambda s, x: s.relu(s.bn(x).add_(x))),
    ("bn + residual + silu", lambda s, x: F.silu(s.bn(x).add(s.relu(x)))),
    ("bn + residual + relu", lambda s, x: s.relu(s.bn(x) + F.avg_pool2d(x, 12))),
    ("bn + residual + relu", lambda s, x: s.relu(s.bn(x) + torch.flip(x, (0,)))),
]


@pytest.mark.parametrize(("what", "forward"), FUSED_FORWARDS)
def test_forward_is_fused(what: str, forward: Callable[[Any, Tensor], Tensor]) -> None:
    module, expected = models.Forward(forward).double(), models.Forward(forward).double()
    report = fuse_(module)
    assert report.left == []
    assert report.fused == [("bn", what)]
    assert_alike(module, expected)
