"""BatchNorm as a node of torch's graph: derivatives, what is kept for them, other transforms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastremedy

from .batch_norm_reference import (
    ACTIVATIONS,
    NEGATIVE_SLOPE,
    Tensors,
    activate,
    channels_last,
    eager,
    is_slow,
    make_tensors,
    spare,
)
from .reference import HALVES, assert_same_bits

batch_norm_relu = fastremedy.functional.batch_norm_relu
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
# Forward-mode differentiation scripts its formulas.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


def call(tensors: Tensors, **options: Any) -> Tensor:
    input, residual, weight, bias, mean, var = tensors
    return batch_norm_relu(input, mean, var, weight, bias, residual=residual, **options)


@MODES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(
    backend: str, device: torch.device, activation: str, residual: bool, training: bool
) -> None:
    spare(backend, activation not in ("relu", "silu"))
    shape = (2, 1, 2) if is_slow(backend) else (3, 2, 2)
    for layout in ("contiguous",) if is_slow(backend) else ("contiguous", "last"):
        tensors = make_tensors(shape, torch.float64, device, residual, layout)
        mean, var = tensors.running_mean, tensors.running_var

        def function(
            input: Tensor,
            weight: Tensor,
            bias: Tensor,
            residual: Tensor | None = None,
            mean: Tensor | None = mean,
            var: Tensor | None = var,
        ) -> Tensor:
            if training:
                mean = var = None
            return batch_norm_relu(
                input, mean, var, weight, bias, training,
                residual=residual, activation=activation, negative_slope=NEGATIVE_SLOPE,
            )  # fmt: skip

        given = (tensors.input, tensors.weight, tensors.bias, tensors.residual)
        leaves = tuple(t.requires_grad_() for t in given if t is not None)
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivative_is_torchs(
    backend: str, device: torch.device, activation: str, training: bool
) -> None:
    """And the first is the same with a graph of it: gradgradcheck compares that with itself."""
    for residual in (False, True):
        tensors = make_tensors((4, 3, 5), torch.float64, device, residual)
        leaves = [t.requires_grad_() for t in tensors[:4] if t is not None]
        results = []
        for function in (batch_norm_relu, eager):
            input, other, weight, bias, mean, var = tensors
            output = function(
                input, mean, var, weight, bias, training, 0.0, 1e-5,
                residual=other, activation=activation, negative_slope=NEGATIVE_SLOPE,
            )  # fmt: skip
            loss = output.square().sum()
            first = torch.autograd.grad(loss, leaves, retain_graph=True)
            again = torch.autograd.grad(loss, leaves, create_graph=True)
            penalty = sum(grad.square().sum() for grad in again)
            assert isinstance(penalty, Tensor)
            second = torch.autograd.grad(penalty, leaves)
            torch.testing.assert_close(again, first)
            results.append((*first, *second))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_second_derivative_in_low_precision(
    backend: str, device: torch.device, dtype: torch.dtype, residual: bool
) -> None:
    results = []
    for wide in (False, True):
        torch.manual_seed(0)
        tensors = make_tensors((4, 3, 5), dtype, device, residual)
        if wide:
            tensors = tensors.map(lambda t: t.double())
        leaves = [t.requires_grad_() for t in tensors[:4] if t is not None]
        output = call(tensors, training=True, activation="silu")
        grads = torch.autograd.grad(output.double().square().sum(), leaves, create_graph=True)
        penalty = sum(grad.double().square().sum() for grad in grads)
        assert isinstance(penalty, Tensor)
        results.append(torch.autograd.grad(penalty, leaves))
    tolerance = 64 * torch.finfo(dtype).eps
    for actual, expected in zip(*results, strict=True):
        error = (actual.double() - expected).abs().max()
        assert error <= tolerance * expected.abs().max()


@MODES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_every_choice_of_gradients(
    backend: str, device: torch.device, residual: bool, training: bool
) -> None:
    """Frozen weight, frozen bias, input without gradient; None for what nobody asked for."""
    tensors = make_tensors((3, 4, 5), torch.float32, device, residual)
    names = ["input", "weight", "bias", *(["residual"] if residual else [])]
    grad = torch.randn(3, 4, 5, device=device)
    every = {name: getattr(tensors, name).requires_grad_() for name in names}
    call(tensors, training=training).backward(grad)
    expected = {name: leaf.grad for name, leaf in every.items()}
    for chosen in range(1, 2 ** len(names)):
        if is_slow(backend) and chosen.bit_count() in (2, 3):
            continue
        wanted = [name for i, name in enumerate(names) if chosen >> i & 1]
        leaves = tensors.map(lambda t: t.detach())
        for name in wanted:
            getattr(leaves, name).requires_grad_()
        call(leaves, training=training).backward(grad)
        for name in names:
            actual = getattr(leaves, name).grad
            if name in wanted:
                # torch picks other operators with and without a weight's gradient
                torch.testing.assert_close(actual, expected[name], rtol=1e-5, atol=1e-6)
            else:
                assert actual is None


def test_without_gradients_there_is_no_graph(backend: str, device: torch.device) -> None:
    tensors = make_tensors((3, 4, 5), torch.float32, device, True)
    assert call(tensors, training=True).grad_fn is None
    tensors.input.requires_grad_()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not call(tensors, training=True).requires_grad
    with torch.inference_mode():
        inference = make_tensors((3, 4, 5), torch.float32, device, True)
        expected = call(inference, training=False)
    torch.testing.assert_close(call(inference, training=False), expected)
    assert call(tensors, training=True).requires_grad


def test_unused_output_has_no_gradient(backend: str, device: torch.device) -> None:
    tensors = make_tensors((3, 4, 5), torch.float32, device)
    used = torch.ones((), device=device, requires_grad=True)
    leaf = tensors.input.requires_grad_()
    output = call(tensors, training=True)
    assert torch.autograd.grad(used * 2, (used, leaf, output), allow_unused=True)[1:] == (None,) * 2
    module = fastremedy.nn.BatchNormReLU1d(4).to(device)
    module.collect_stats = True
    module(leaf)
    assert module.last_stats is not None
    assert not module.last_stats.mean.requires_grad
    assert module.weight.grad is None


@MODES
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_backward_twice_gives_the_same_bits(
    backend: str, device: torch.device, residual: bool, training: bool
) -> None:
    tensors = make_tensors((3, 4, 5), torch.float32, device, residual)
    leaves = [t.requires_grad_() for t in tensors[:4] if t is not None]
    output = call(tensors, training=training)
    grad = torch.randn_like(output)
    first = torch.autograd.grad(output, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(output, leaves, grad)
    for actual, expected in zip(second, first, strict=True):
        assert_same_bits(actual, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, leaves, grad)


def test_input_changed_before_backward_is_an_error(backend: str, device: torch.device) -> None:
    tensors = make_tensors((3, 4, 5), torch.float32, device)
    tensors.input.requires_grad_()
    output = call(tensors, training=True)
    with torch.no_grad():
        tensors.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_running_statistics_may_change_before_backward(backend: str, device: torch.device) -> None:
    """Of a layer that runs twice, the first call still has its own gradient."""
    tensors = make_tensors((3, 4, 5), torch.float32, device)
    leaf = tensors.input.requires_grad_()
    assert tensors.running_mean is not None
    version = tensors.running_mean._version
    first = call(tensors, training=True)
    if backend != "torch":  # others that saved it are to notice; torch's operator does not tell
        assert tensors.running_mean._version > version
    (expected,) = torch.autograd.grad(first.square().sum(), leaf, retain_graph=True)
    call(tensors, training=True)
    (actual,) = torch.autograd.grad(first.square().sum(), leaf)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(backend: str, device: torch.device, use_reentrant: bool) -> None:
    grads = []
    for wrap in (False, True):
        torch.manual_seed(0)
        norm = fastremedy.nn.BatchNormReLU1d(4).to(device)
        x, r = (torch.randn(3, 4, 5, device=device, requires_grad=True) for _ in range(2))
        output = checkpoint(norm, x, r, use_reentrant=use_reentrant) if wrap else norm(x, r)
        output.square().sum().backward()
        grads.append([x.grad, r.grad, norm.weight.grad, norm.bias.grad])
    for actual, expected in zip(*grads, strict=True):
        assert actual is not None
        assert expected is not None
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@MODES
def test_what_is_kept_for_backward(
    backend: str, device: torch.device, training: bool, residual: bool, activation: str
) -> None:
    """The input and vectors of the channels; with a residual the signs, one bit of an element."""
    if backend == "torch":
        pytest.skip("keeps what torch's own operators keep")
    spare(backend, activation not in ("relu", "silu") or not training)
    for dtype in (torch.float32, torch.bfloat16):
        for shape, layout in (((4, 8, 10, 8), "contiguous"), ((4, 16, 5, 4), "last")):
            tensors = make_tensors(shape, dtype, device, residual, layout)
            for tensor in tensors[:4]:
                if tensor is not None:
                    tensor.requires_grad_()
            kept: dict[int, int] = {}

            def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                call(tensors, training=training, activation=activation)
            assert kept.pop(tensors.input.data_ptr()) == tensors.input.nbytes
            if residual and activation in ("elu", "silu"):  # the slope needs z itself
                assert tensors.residual is not None
                assert kept.pop(tensors.residual.data_ptr()) == tensors.residual.nbytes
            elif residual and activation != "identity":
                bits = [p for p, size in kept.items() if size == tensors.input.numel() // 8]
                del kept[bits[0]]
            per_channel = 4 + 2  # statistics, weight and bias
            assert sum(kept.values()) <= per_channel * 4 * shape[1]


# --- transforms that see torch's own operators ---


def test_kernels_run_under_a_default_device(backend: str, device: torch.device) -> None:
    """It is a mode to torch, but no transform: ``torch.set_default_device`` slows nothing down."""
    if backend == "torch":
        pytest.skip("has no kernels")
    module = fastremedy.nn.BatchNormReLU2d(3).to(device)
    x = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    loss = fastremedy.nn.SigmoidFocalLoss()
    with torch.device("meta"):
        output = module(x)
        value = loss(output, torch.zeros_like(output)).sum()
        value.backward()
    assert type(output.grad_fn).__name__ == "BatchNormReLUBackward"
    assert value.device == output.device == device
    assert x.grad is not None
    with torch.overrides.BaseTorchFunctionMode(), torch.device("meta"):
        assert type(module(x).grad_fn).__name__ != "BatchNormReLUBackward"


@MODES
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_forward_mode(backend: str, device: torch.device, activation: str, training: bool) -> None:
    tensors = make_tensors((4, 3, 5), torch.float64, device, True)
    tangents = tensors.map(torch.randn_like)
    mean, var = tensors.running_mean, tensors.running_var
    if training:
        mean = var = None

    def ours(*args: Tensor) -> Tensor:
        input, residual, weight, bias = args
        return batch_norm_relu(
            input, mean, var, weight, bias, training, residual=residual, activation=activation
        )

    def by_torch(*args: Tensor) -> Tensor:
        input, residual, weight, bias = args
        z = torch.nn.functional.batch_norm(input, mean, var, weight, bias, training)
        return activate(z + residual, activation)

    primals = tuple(t for t in tensors[:4] if t is not None)
    directions = tuple(t for t in tangents[:4] if t is not None)
    expected = torch.func.jvp(by_torch, primals, directions)
    torch.testing.assert_close(torch.func.jvp(ours, primals, directions), expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, directions, strict=True)]
        dual = forward_ad.unpack_dual(ours(*duals))
    torch.testing.assert_close((dual.primal, dual.tangent), expected)


@MODES
def test_functional_gradients(backend: str, device: torch.device, training: bool) -> None:
    tracks = {"track_running_stats": not training}  # what is captured cannot be updated
    norm = fastremedy.nn.BatchNormReLU2d(3, activation="silu", **tracks).to(device).train(training)
    plain = nn.Sequential(nn.BatchNorm2d(3, **tracks), nn.SiLU()).to(device).train(training)
    x = torch.randn(4, 3, 2, 5, device=device)

    def loss(module: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = torch.func.functional_call(module, params, (x,))
        return output.square().sum()

    def state(module: nn.Module, prefix: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        values = {"weight": torch.randn(3, device=device), "bias": torch.randn(3, device=device)}
        return {prefix + name: value for name, value in values.items()}

    ours = torch.func.grad(functools.partial(loss, norm))(state(norm, ""), x)
    by_torch = torch.func.grad(functools.partial(loss, plain))(state(plain, "0."), x)
    for actual, expected in zip(ours.values(), by_torch.values(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_vmap(backend: str, device: torch.device, residual: bool) -> None:
    norm = fastremedy.nn.BatchNormReLU1d(3, track_running_stats=False).to(device)
    batches, residuals = torch.randn(2, 6, 4, 3, device=device)
    args = (batches, residuals) if residual else (batches,)
    expected = torch.stack([norm(*each) for each in zip(*args, strict=True)])
    torch.testing.assert_close(torch.vmap(norm)(*args), expected, rtol=1e-5, atol=1e-5)
    evaluation = fastremedy.nn.BatchNormReLU1d(3).to(device).eval()
    expected = torch.stack([evaluation(*each) for each in zip(*args, strict=True)])
    torch.testing.assert_close(torch.vmap(evaluation)(*args), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd])
def test_jacobian(
    backend: str, device: torch.device, transform: Callable[..., Callable[[Tensor], Tensor]]
) -> None:
    x = torch.randn(3, 2, dtype=torch.float64, device=device)

    def ours(x: Tensor) -> Tensor:
        return batch_norm_relu(x, None, None, training=True)

    expected = torch.autograd.functional.jacobian(ours, x)
    torch.testing.assert_close(transform(ours)(x), expected)


def test_gradient_reaches_a_channels_last_leaf_through_views(
    backend: str, device: torch.device
) -> None:
    values = torch.randn(4, 5, 3, device=device)
    grads = []
    for copy in (False, True):
        leaf = values.clone().requires_grad_()
        view = leaf.transpose(1, 2)
        output = batch_norm_relu(channels_last(view) if copy else view, None, None, training=True)
        output.transpose(1, 2).square().sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
