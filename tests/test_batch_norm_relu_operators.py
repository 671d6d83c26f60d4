"""BatchNorm in torch.compile and other tracers: one graph, no recompilation, the same results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastremedy
from fastremedy.nn import BatchNormReLU1d, BatchNormReLU2d

from .batch_norm_reference import ACTIVATIONS, LAYOUTS, make_tensors, spare
from .conftest import HAS_GPU
from .reference import assert_same_bits

OPS = torch.ops.fastremedy
batch_norm_relu = fastremedy.functional.batch_norm_relu
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# Dynamo instantiates the class of the derivative.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])


def forward_arguments(
    device: torch.device, residual: bool, training: bool, layout: str
) -> tuple[Any, ...]:
    input, other, weight, bias, mean, var = make_tensors(
        (3, 4, 5), torch.float32, device, residual, layout
    )
    counter = torch.tensor(2, device=device)
    vectors = (weight, bias, mean, var, counter)
    return (input, other, *vectors, training, 0.1, 1e-5, "relu", 0.0, residual, True)


@MODES
@RESIDUAL
@pytest.mark.parametrize("layout", ["contiguous", "last", "sliced"])
def test_opcheck(
    backend: str, device: torch.device, layout: str, residual: bool, training: bool
) -> None:
    spare(backend, layout != "last")
    args = forward_arguments(device, residual, training, layout)
    torch.library.opcheck(OPS.batch_norm_relu_forward.default, args)
    input, _, weight, bias = args[:4]
    output, saved, mask, dead = OPS.batch_norm_relu_forward(*args)
    assert dead.shape == (4,)
    assert (mask.numel() > 0) == residual
    given = (torch.randn_like(output), input, None, mask if residual else None, saved, weight, bias)
    wants = [True, residual, True, False]
    torch.library.opcheck(
        OPS.batch_norm_relu_backward.default, (*given, training, "relu", 0.0, wants)
    )


def test_opcheck_sums(backend: str, device: torch.device) -> None:
    args = forward_arguments(device, False, True, "contiguous")
    input, _, weight, bias = args[:4]
    torch.library.opcheck(OPS.batch_norm_relu_sums.default, (input,))
    sums = OPS.batch_norm_relu_sums(input)
    torch.library.opcheck(OPS.batch_norm_relu_forward.default, (*args, sums))
    output, saved, _, _ = OPS.batch_norm_relu_forward(*args, sums)
    expected = torch.nn.functional.batch_norm(input, None, None, weight, bias, True).relu()
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    given = (torch.ones_like(output), input, None, None, saved, weight, bias, "relu", 0.0)
    torch.library.opcheck(
        OPS.batch_norm_relu_backward_sums.default, (*given, [False, False, True, True])
    )


def train(
    module: Callable[..., Tensor], shapes: list[tuple[int, ...]], residual: bool, device: Any
) -> list[Tensor]:
    """Return outputs and gradients of one step for each shape."""
    torch.manual_seed(0)
    results = []
    for shape in shapes:
        x, r = (torch.randn(shape, device=device).requires_grad_() for _ in range(2))
        output = module(x, r) if residual else module(x)
        grads = torch.autograd.grad(output.square().sum(), (x, r), allow_unused=True)
        results += [output.detach(), *(grad for grad in grads if grad is not None)]
    return results


@RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_training(
    backend: str, device: torch.device, activation: str, residual: bool
) -> None:
    """One graph without breaks; outputs, gradients and buffers are those of eager to the bit."""
    spare(backend, activation != "relu")
    module = BatchNormReLU1d(4, activation=activation).to(device)
    other = copy.deepcopy(module)
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    shapes = [(3, 4, 5)] * 2
    expected = train(module, shapes, residual, device)
    actual = train(compiled, shapes, residual, device)
    for own, eager in zip(actual, expected, strict=True):
        if backend == "torch":
            torch.testing.assert_close(own, eager, rtol=1e-4, atol=1e-4)
        else:
            assert_same_bits(own, eager)
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffer, module.get_buffer(name), rtol=1e-6, atol=1e-6)


def test_compiled_modes(backend: str, device: torch.device) -> None:
    """Training, evaluation and inference, in every layout."""
    module = BatchNormReLU2d(4).to(device)
    for layout in ("contiguous", "last", "sliced"):
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = LAYOUTS[layout](torch.randn(2, 4, 3, 5, device=device))
        module.train()
        expected = copy.deepcopy(module)(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        module.eval()
        expected = module(x)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)


def test_compiled_once(backend: str, device: torch.device) -> None:
    """Counters and running statistics change from step to step, and graphs do not."""
    if backend == "torch":
        pytest.skip("torch's own modules read the counter of an average")
    for options in ({}, {"momentum": None}):
        module = BatchNormReLU1d(4, **options).to(device)
        torch.compiler.reset()
        counter = CompileCounter()
        compiled = torch.compile(module, fullgraph=True, backend=counter)
        for _ in range(4):
            compiled(torch.randn(3, 4, 5, device=device))
        assert counter.frame_count == 1
        assert module.num_batches_tracked is not None
        assert module.num_batches_tracked.item() == 4


def test_compiled_for_every_size(backend: str, device: torch.device) -> None:
    module = BatchNormReLU2d(4).to(device)
    other = copy.deepcopy(module)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend=counter)
    shapes = [(2, 4, 3, 5), (3, 4, 6, 7), (5, 4, 4, 3)]
    first = 0
    for i, shape in enumerate(shapes):
        expected = train(module, [shape], True, device)
        actual = train(compiled, [shape], True, device)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        first = counter.frame_count if i == 0 else first
    if backend != "torch":  # whose operator has a graph for each memory format
        assert counter.frame_count == first


def test_compiled_empty_batch(backend: str, device: torch.device) -> None:
    """It counts as a batch, and changes nothing else."""
    module = BatchNormReLU1d(4).to(device)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(0, 4, 5, device=device, requires_grad=True)
    output = compiled(x)
    assert output.shape == x.shape
    output.sum().backward()
    assert x.grad is not None
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.item() == 1
    assert torch.equal(module.running_mean, torch.zeros(4, device=device))
    assert torch.equal(module.running_var, torch.ones(4, device=device))
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros(4, device=device))


def test_compiled_with_the_input_as_residual(backend: str, device: torch.device) -> None:
    module = BatchNormReLU1d(4).to(device)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    expected = train(lambda x: module(x, x), [(3, 4, 5)], False, device)
    actual = train(lambda x: compiled(x, x), [(3, 4, 5)], False, device)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiled_second_layer_sees_the_first(backend: str, device: torch.device) -> None:
    """A layer that is called twice in one graph: updates of its buffers keep their order."""
    module = BatchNormReLU1d(4, momentum=0.5).to(device)
    other = copy.deepcopy(module)

    def twice(norm: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: norm(norm(x) * 3 + 1)

    torch.compiler.reset()
    compiled = torch.compile(twice(other), fullgraph=True, backend="aot_eager")
    expected = train(twice(module), [(3, 4, 5)], False, device)
    actual = train(compiled, [(3, 4, 5)], False, device)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert other.num_batches_tracked is not None
    assert other.num_batches_tracked.item() == 2
    torch.testing.assert_close(other.running_var, module.running_var)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
@RESIDUAL
def test_inductor(backend: str, device: torch.device, residual: bool) -> None:
    if backend not in ("cpu", "torch") and not HAS_GPU:
        pytest.skip("emulated and interpreted kernels are the same as in aot_eager")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), BatchNormReLU2d(4)).to(device)
    other = copy.deepcopy(model)

    def run(model: nn.Sequential, x: Tensor) -> Tensor:
        z = model[0](x)
        output: Tensor = model[1](z, z) if residual else model[1](z)
        return output

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True)
    for _ in range(2):
        x = torch.randn(2, 3, 6, 6, device=device)
        expected, actual = run(model, x), compiled(other, x)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
        expected.square().sum().backward()
        actual.square().sum().backward()
    for own, eager in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(own.grad, eager.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)


def test_fake_tensors(backend: str, device: torch.device) -> None:
    """Shapes, dtypes and strides without data, forward and backward."""
    module = BatchNormReLU2d(4).to(device)
    x = torch.randn(2, 4, 3, 5, device=device).to(memory_format=torch.channels_last)
    real = module(x)
    with FakeTensorMode() as mode:
        fake_x = mode.from_tensor(x).requires_grad_()
        output = batch_norm_relu(fake_x, None, None, training=True)
        output.sum().backward()
    assert output.shape == real.shape
    assert output.stride() == real.stride()
    assert output.device == real.device
    assert fake_x.grad is not None
    assert fake_x.grad.stride() == x.stride()


def test_make_fx(backend: str, device: torch.device) -> None:
    x = torch.randn(3, 4, 5, device=device)

    def function(x: Tensor) -> Tensor:
        return batch_norm_relu(x, None, None, training=True)

    graph = make_fx(function)(x)
    torch.testing.assert_close(graph(x + 1), function(x + 1), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@MODES
def test_jit_trace(backend: str, device: torch.device, training: bool) -> None:
    module = BatchNormReLU1d(4).to(device).train(training)
    x = torch.randn(3, 4, 5, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(copy.deepcopy(module), x, check_trace=False)
    y = torch.randn(3, 4, 5, device=device)
    torch.testing.assert_close(traced(y), module(y), rtol=1e-5, atol=1e-5)


def test_export(backend: str, device: torch.device) -> None:
    module = BatchNormReLU1d(4).to(device).eval()
    x = torch.randn(3, 4, 5, device=device)
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), module(x), rtol=1e-5, atol=1e-5)


class Logged(Tensor):
    """Notes the names of torch's functions that it passes through."""

    names: list[str]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        Logged.names.append(getattr(function, "__name__", ""))
        return super().__torch_function__(function, types, args, kwargs or {})


@RESIDUAL
def test_tensor_subclass(backend: str, device: torch.device, residual: bool) -> None:
    """It sees torch's operators, as it would without us, and gets its own kind back."""
    module = BatchNormReLU1d(4).to(device)
    other = copy.deepcopy(module)
    x, r = torch.randn(2, 3, 4, 5, device=device).unbind()
    Logged.names = []
    logged = (x.as_subclass(Logged), r.as_subclass(Logged))[: 1 + residual]
    output = module(*logged)
    assert type(output) is Logged
    assert "batch_norm" in Logged.names
    expected = other(x, r) if residual else other(x)
    torch.testing.assert_close(output.as_subclass(Tensor), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), other.state_dict())


def test_parameter_as_input(backend: str, device: torch.device) -> None:
    x = nn.Parameter(torch.randn(3, 4, device=device))
    output = batch_norm_relu(x, None, None, training=True)
    assert type(output) is Tensor
    output.sum().backward()
    assert x.grad is not None


@pytest.mark.needs_cuda
@RESIDUAL
def test_cuda_graph(gpu: torch.device, residual: bool) -> None:
    """Statistics and counters move on with every replay."""
    module = BatchNormReLU1d(4, momentum=None).cuda()
    other = copy.deepcopy(module)
    x, r = torch.randn(2, 3, 4, 5, device=gpu).unbind()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(x, r if residual else None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(x, r if residual else None)
    for step in range(4):
        x.normal_(mean=step)
        if step == 0:
            other.load_state_dict(module.state_dict())
        graph.replay()
        torch.testing.assert_close(output, other(x, r if residual else None))
        torch.testing.assert_close(module.state_dict(), other.state_dict())
