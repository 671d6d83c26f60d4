"""Focal loss in torch.compile and other tracers: one graph, the same results."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastremedy.nn import FocalLoss, SigmoidFocalLoss

from .batch_norm_reference import LAYOUTS, spare
from .conftest import HAS_GPU
from .focal_loss_reference import FORMS, function_of, make_call, run, vectors
from .reference import assert_same_bits

OPS = torch.ops.fastremedy
BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
KINDS = pytest.mark.parametrize("kind", ["labels", "soft"])
# Dynamo instantiates the class of the derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@BOTH_FORMS
@KINDS
@pytest.mark.parametrize("reduction", [0, 1])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_opcheck(
    backend: str, device: torch.device, layout: str, reduction: int, kind: str, form: str
) -> None:
    if backend == "torch" and layout == "last":
        pytest.skip("torch's own operators take every layout")
    spare(backend, (layout == "last") != (reduction == 0))
    input, target = make_call(form, (3, 4, 5), device, kind=kind)
    input = LAYOUTS[layout](input)
    target = LAYOUTS[layout](target) if target.dim() == 3 else target
    classes = [vectors(form, 4, device).get(name) for name in ("alpha", "weight", "pos_weight")]
    call = (*classes, form == "softmax", reduction, 1.5, 0.25, 0.1, -100, -(2**63))
    args = (input, target, *call, torch.float32, True)
    torch.library.opcheck(OPS.focal_loss_forward.default, args)
    loss, saved, normalizer, stats = OPS.focal_loss_forward(*args)
    assert stats.shape == (9,)
    given = [tensor if tensor.numel() else None for tensor in (saved, normalizer)]
    args = (torch.rand_like(loss), input, target, *call, *given)
    torch.library.opcheck(OPS.focal_loss_backward.default, args)


@BOTH_FORMS
def test_compiled(backend: str, device: torch.device, form: str) -> None:
    """One graph without breaks: loss, gradient and statistics are those of eager."""
    classes = vectors(form, 4, device)

    def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Any]:
        function = function_of(form)
        loss = function(x, target, reduction="mean", **classes)
        losses, stats = function(x * 2, target, reduction="none", return_stats=True)
        return loss, losses, stats

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for _ in range(2):
        input, target = make_call(form, (6, 4, 3), device)
        results = []
        for function in (step, compiled):
            leaf = input.clone().requires_grad_()
            loss, losses, stats = function(leaf, target)
            (loss * 3 + losses.square().sum()).backward()
            results.append([loss.detach(), losses.detach(), leaf.grad, *stats])
        for actual, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6, equal_nan=True)
    assert counter.frame_count == 1


def test_compiled_for_every_size(backend: str, device: torch.device) -> None:
    spare(backend, backend == "triton")
    loss_function = FocalLoss(gamma=1.5, label_smoothing=0.1)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_function, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for shape in ((3, 4, 5), (6, 7, 8), (9, 3, 4)):
        input, target = make_call("softmax", shape, device)
        actual, expected = run(compiled, input, target), run(loss_function, input, target)
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-6)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_inductor(backend: str, device: torch.device) -> None:
    if backend != "cpu" and not HAS_GPU:
        pytest.skip("others are the same as in aot_eager")
    target = make_call("softmax", (6, 4), device)[1]
    layer = nn.Linear(5, 4).to(device)

    def step(x: Tensor, target: Tensor) -> Tensor:
        logits = layer(x)
        loss: Tensor = FocalLoss()(logits, target)
        return loss + SigmoidFocalLoss(reduction="mean")(logits, target)

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    x = torch.randn(6, 5, device=device)
    torch.testing.assert_close(*(run(f, x, target) for f in (compiled, step)), rtol=1e-5, atol=1e-6)


@BOTH_FORMS
@KINDS
def test_fake_tensors(backend: str, device: torch.device, kind: str, form: str) -> None:
    """Shapes, dtypes and strides without data, forward and backward."""
    input, target = make_call(form, (3, 4, 5, 2), device, torch.bfloat16, kind)
    input = input.to(memory_format=torch.channels_last)
    for reduction in ("none", "mean"):
        real, grad = run(function_of(form), input, target, reduction=reduction)
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(input).requires_grad_()
            loss = function_of(form)(fake, mode.from_tensor(target), reduction=reduction)
            loss.sum().backward()
        assert fake.grad is not None
        assert (loss.shape, loss.dtype) == (real.shape, real.dtype)
        assert loss.device == real.device
        assert fake.grad.shape == grad.shape
        if backend != "torch":
            assert loss.stride() == real.stride()
            assert fake.grad.stride() == grad.stride()


@BOTH_FORMS
@KINDS
def test_make_fx(backend: str, device: torch.device, kind: str, form: str) -> None:
    input, target = make_call(form, (6, 4), device, kind=kind)

    def function(x: Tensor, t: Tensor) -> Any:
        return function_of(form)(x, t, reduction="sum")

    graph = make_fx(function)(input, target)
    torch.testing.assert_close(
        graph(input + 1, target), function(input + 1, target), rtol=2e-6, atol=1e-6
    )


@BOTH_FORMS
def test_export(backend: str, device: torch.device, form: str) -> None:
    """What is exported runs without this package."""
    module = (FocalLoss if form == "softmax" else SigmoidFocalLoss)(reduction="mean")
    input, target = make_call(form, (6, 4), device)
    exported = torch.export.export(module, (input, target))
    torch.testing.assert_close(
        exported.module()(input, target), module(input, target), rtol=2e-6, atol=1e-6
    )
    names = {str(node.target) for node in exported.graph.nodes}
    assert not any("fastremedy" in name for name in names)


class Logged(Tensor):
    """Notes the names of torch's functions that it passes through."""

    names: list[str]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        Logged.names.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


@BOTH_FORMS
def test_tensor_subclass(backend: str, device: torch.device, form: str) -> None:
    """It sees torch's operators, and gets its own kind back."""
    input, target = make_call(form, (6, 4), device)
    Logged.names = []
    loss = function_of(form)(input.as_subclass(Logged), target)
    assert type(loss) is Logged
    assert {"logsigmoid", "log_sigmoid"} & set(Logged.names)
    expected = function_of(form)(input, target)
    torch.testing.assert_close(loss.as_subclass(Tensor), expected, rtol=2e-6, atol=1e-6)
    parameter = nn.Parameter(input)
    assert type(function_of(form)(parameter, target)) is Tensor


@pytest.mark.needs_cuda
@BOTH_FORMS
def test_cuda_graph(gpu: torch.device, form: str) -> None:
    """Neither direction waits for the device; a replay sees new logits and labels."""
    input, target = make_call(form, (64, 40), gpu)
    leaf = input.requires_grad_()

    def step() -> tuple[Tensor, Tensor, Any]:
        loss, stats = function_of(form)(leaf, target, reduction="mean", return_stats=True)
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss, grad, stats.class_counts

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            leaf.normal_()
            target.random_(0, 40)
        graph.replay()
        for actual, expected in zip(captured, step(), strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@BOTH_FORMS
@KINDS
def test_jit_trace(backend: str, device: torch.device, kind: str, form: str) -> None:
    input, target = make_call(form, (6, 4, 5), device, kind=kind)
    loss = function_of(form)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(lambda x: loss(x, target, reduction="mean"), input)
    torch.testing.assert_close(traced(input + 1), loss(input + 1, target, reduction="mean"))
