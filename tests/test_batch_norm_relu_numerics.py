"""BatchNorm where rounding decides: signs, variances far from zero, NaN, equal bits."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastremedy
from fastremedy.nn import BatchNormReLU1d

from .batch_norm_reference import (
    ACTIVATIONS,
    LAYOUTS,
    assert_matches_torch,
    is_slow,
    make_tensors,
    run,
    spare,
)
from .reference import FLOATS, assert_same_bits

batch_norm_relu = fastremedy.functional.batch_norm_relu
BOTH_LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "last"])
RESIDUAL = pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def bias_of_zeros(input: Tensor, weight: Tensor) -> Tensor:
    """Return the bias that moves one element of every channel to zero, give or take a rounding."""
    x = input.double().movedim(1, 0).flatten(1)
    normal = (x - x.mean(1, keepdim=True)) * (x.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    return (-normal[:, x.shape[1] // 2] * weight.double()).to(weight.dtype)


@BOTH_LAYOUTS
@RESIDUAL
@MODES
@pytest.mark.parametrize("mean", [0.0, 1024.0])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_and_backward_agree_on_the_sign(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    mean: float,
    training: bool,
    residual: bool,
    layout: str,
) -> None:
    """The gradient is nonzero exactly where the output is: 1.6e7 elements over all cases on CPUs.

    Integers are as many equal elements: of each channel one in seven has z = 0 but for rounding.
    """
    spare(backend, dtype in (torch.float64, torch.bfloat16))
    places = 16 if is_slow(backend) else 16384
    step = 8 if dtype == torch.bfloat16 and mean else 1  # what bfloat16 can tell apart there
    input = torch.randint(-3, 4, (2, 8, places), device=device).float() * step
    input = LAYOUTS[layout]((input + mean).to(dtype))
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(8, device=device, dtype=vectors)
    bias = bias_of_zeros(input, weight)
    x = input.double()
    running_mean, running_var = x.mean((0, 2)), x.var((0, 2), correction=0)
    tiny = (torch.randn(input.shape, device=device) * 1e-7).to(dtype) if residual else None
    leaf = input.requires_grad_()
    other = None if tiny is None else LAYOUTS[layout](tiny).requires_grad_()
    output = batch_norm_relu(
        leaf, running_mean.to(vectors), running_var.to(vectors), weight, bias, training,
        residual=other,
    )  # fmt: skip
    target = leaf if other is None else other
    (actual,) = torch.autograd.grad(output, target, torch.ones_like(output), retain_graph=True)
    if training and other is None:  # a sum over all of z, where a wrong sign shows at its element
        if backend == "torch" and dtype == torch.float16:
            return  # torch's own sums overflow
        grad = torch.randint(1, 5, output.shape, device=device).to(dtype)
        (actual,) = torch.autograd.grad(output, target, grad)
        kept = grad * (output > 0)
        expected = plain_input_grad(kept.double(), x, weight.double())
        scale = expected.abs().max()
        tolerance = 1e-2 if dtype in (torch.float16, torch.bfloat16) else 1e-4
        assert (actual.double() - expected).abs().max() <= tolerance * scale
    else:
        assert torch.equal(actual != 0, output > 0)
    # Where z is nowhere near zero the test would say nothing.
    assert 0.05 < (output > 0).float().mean() < 0.95


def plain_input_grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    z = torch.nn.functional.batch_norm(x, None, None, weight, training=True)
    (expected,) = torch.autograd.grad(z, x, grad)
    return expected


@BOTH_LAYOUTS
@RESIDUAL
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sign_is_that_of_the_rounded_value(
    backend: str, device: torch.device, dtype: torch.dtype, residual: bool, layout: str
) -> None:
    """As in torch, whose ReLU sees what the dtype can hold: half the smallest number is zero."""
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    values = torch.tensor([-1.0, -smallest, 0.0, smallest, 2 * smallest, 3 * smallest, 1.0, 2.0])
    values = values.double() if dtype == torch.float64 else values
    input = LAYOUTS[layout](values.to(device, dtype).view(2, 1, 4)).requires_grad_()
    vectors = torch.float64 if dtype == torch.float64 else torch.float32
    eps = 2.0**-10  # torch 2.11 refuses 0
    mean, var = torch.zeros(1, device=device), torch.full((1,), 1 - eps, device=device)
    weight = torch.full((1,), 0.5, device=device)
    mean, var, weight = mean.to(vectors), var.to(vectors), weight.to(vectors)
    other = torch.zeros_like(input) if residual else None
    output = batch_norm_relu(input, mean, var, weight, eps=eps, residual=other)
    expected = torch.nn.functional.batch_norm(input, mean, var, weight, eps=eps).relu()
    assert torch.equal(output > 0, expected > 0)
    (actual,) = torch.autograd.grad(output, input, torch.ones_like(output))
    assert torch.equal(actual > 0, expected > 0)


def distributions() -> Iterator[tuple[str, Tensor]]:
    normal = torch.randn(8, 4, 2048)
    yield "normal", normal
    yield "uniform", torch.rand(8, 4, 2048)
    yield "sparse", normal.pow(5) * (torch.rand(8, 4, 2048) < 0.01)  # most are 0, few are large
    yield "late", torch.cat([torch.zeros(4, 4, 2048), normal[4:]])  # the first say nothing
    yield "two_levels", torch.where(normal > 2, 1e3, -1.0) + normal


@BOTH_LAYOUTS
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4])
def test_variance_is_exact(backend: str, device: torch.device, ratio: float, layout: str) -> None:
    """To 1e-6 where the mean is ``ratio`` standard deviations."""
    if backend == "torch" and ratio > 1:
        pytest.skip("torch's own is off by 1e-4")
    for name, values in distributions():
        if is_slow(backend):
            values = values[..., :128]
        std = values.double().std()
        input = LAYOUTS[layout]((values + ratio * std).float().to(device))
        mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
        batch_norm_relu(input, mean, var, training=True, momentum=1.0)
        x = input.cpu().double().movedim(1, 0).flatten(1)
        error = ((var.cpu().double() - x.var(1)) / x.var(1)).abs().max().item()
        assert error <= 1e-6, name
        # One rounding of the mean.
        torch.testing.assert_close(mean.cpu(), x.mean(1).float(), rtol=2e-7, atol=1e-6 * std.item())


@BOTH_LAYOUTS
@pytest.mark.parametrize("value", [0.0, 1.0, -3e-3, 1234.567, 1e-30, 3e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constant_channel_has_no_variance(
    backend: str, device: torch.device, dtype: torch.dtype, value: float, layout: str
) -> None:
    if backend == "torch":
        pytest.skip("torch finds a variance of rounding errors")
    places = 37 if is_slow(backend) else 1237
    input = torch.randn(3, 4, places, device=device).to(dtype)
    input[:, 1] = value
    input = LAYOUTS[layout](input)
    var = torch.ones(4, device=device, dtype=torch.float64)
    output = batch_norm_relu(
        input, torch.zeros_like(var), var, training=True, momentum=1.0, activation="identity"
    )
    assert var[1].item() == 0.0
    # What rounding takes from a mean is not lost.
    assert output[:, 1].abs().max().item() <= abs(value) * 1e-5


@BOTH_LAYOUTS
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_values_far_from_zero_match_torch(
    backend: str, device: torch.device, ratio: float, layout: str
) -> None:
    for residual in (False, True):
        tensors = make_tensors((5, 3, 40), torch.float32, device, residual, layout)
        tensors = tensors._replace(input=tensors.input + ratio)
        assert_matches_torch(tensors, activation="silu")


# --- NaN and infinity ---


@BOTH_LAYOUTS
@RESIDUAL
@MODES
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values_stay_in_their_channel(
    backend: str, device: torch.device, value: float, training: bool, residual: bool, layout: str
) -> None:
    spare(backend, residual != training)
    tensors = make_tensors((3, 5, 9), torch.float32, device, residual, layout)
    input = tensors.input.clone()
    input[1, 2, 3] = value
    grad = torch.randn_like(input)
    clean = run(batch_norm_relu, tensors, grad, training)
    actual = run(batch_norm_relu, tensors._replace(input=input), grad, training)
    others = [0, 1, 3, 4]
    for name, expected in clean.items():
        index = (slice(None), others) if expected.dim() > 1 else others
        torch.testing.assert_close(actual[name][index], expected[index], rtol=1e-6, atol=1e-6)
    if training:
        assert actual["output"][:, 2].isnan().all()
        assert actual["input.grad"][:, 2].isnan().all()
        assert not actual["running_var"][2].isfinite()
    else:
        z = input.new_tensor(value)
        assert tensors.weight is not None
        expected = (z * tensors.weight[2]).relu()
        torch.testing.assert_close(actual["output"][1, 2, 3], expected, equal_nan=True)
        assert actual["input.grad"].isfinite().all()  # of evaluation: x is not in it
        assert (actual["input.grad"][1, 2, 3] == 0) == (expected == 0)


@RESIDUAL
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nonfinite_values_are_torchs(
    backend: str, device: torch.device, activation: str, residual: bool
) -> None:
    """In evaluation, where NaN and infinity reach the activation one by one."""
    spare(backend, residual)
    values = [math.nan, math.inf, -math.inf]
    if activation == "elu":
        values[0] = 1e30  # torch's own gradient at NaN is NaN in vectors and 1 in their rest
    if activation in ("elu", "silu"):
        values[2] = -1e30  # at minus infinity torch has 0 * infinity, the limits are numbers
    tensors = make_tensors((3, 5, 9), torch.float32, device, residual)
    assert tensors.weight is not None
    tensors = tensors._replace(weight=tensors.weight.abs())
    tensors.input[0, 0, :3] = torch.tensor(values)
    if tensors.residual is not None:
        tensors.residual[0, 1, :3] = torch.tensor(values)
    results = assert_matches_torch(tensors, training=False, activation=activation)
    assert results["output"][0, 0, 1] == math.inf
    tensors.input[0, 0, 3] = math.nan
    results = run(batch_norm_relu, tensors, torch.ones_like(tensors.input), False, activation)
    assert results["output"][0, 0, 3].isnan()


@BOTH_LAYOUTS
@RESIDUAL
def test_leaky_relu_scales_the_gradient_at_nan(
    backend: str, device: torch.device, residual: bool, layout: str
) -> None:
    """As in torch, where ReLU passes it unchanged. That NaN is not positive makes it not dead."""
    norm = BatchNormReLU1d(3, activation="leaky_relu", negative_slope=0.25).to(device)
    norm.collect_stats = True
    input, other = (LAYOUTS[layout](torch.randn(4, 3, 16, device=device)) for _ in range(2))
    input[0, 1, 0] = math.nan  # and so is all of its channel
    targets = [norm.bias, other.requires_grad_()] if residual else [norm.bias]
    output = norm(input, other if residual else None)
    assert output[:, 1].isnan().all()
    assert norm.last_stats is not None
    assert norm.last_stats.dead[1] == 0
    for differentiable in (False, True):
        grads = torch.autograd.grad(
            output, targets, torch.ones_like(output), True, create_graph=differentiable
        )
        assert grads[0][1] == 0.25 * 64
        for grad in grads[1:]:
            assert (grad[:, 1] == 0.25).all()


@BOTH_LAYOUTS
def test_nonfinite_gradient(backend: str, device: torch.device, layout: str) -> None:
    """Of a dead output even an infinite gradient is dropped; of others it stays in its channel."""
    tensors = make_tensors((4, 3, 9), torch.float32, device, True, layout)
    grad = torch.randn(4, 3, 9, device=device)
    output = run(batch_norm_relu, tensors, grad)["output"]
    dead, alive = (output[:, 1] <= 0).nonzero()[0], (output[:, 2] > 0).nonzero()[0]
    grad[dead[0], 1, dead[1]] = math.inf
    grad[alive[0], 2, alive[1]] = math.nan
    results = run(batch_norm_relu, tensors, grad)
    for name in ("input.grad", "residual.grad"):
        assert results[name][:, :2].isfinite().all()
    assert results["input.grad"][:, 2].isnan().all()
    assert results["residual.grad"][:, 2].isnan().sum() == 1
    assert results["weight.grad"].isfinite().tolist() == [True, True, False]


def test_large_values_do_not_overflow(backend: str, device: torch.device) -> None:
    """Sums of halves are not halves; squares of 1e18 fit into float32."""
    tensors = make_tensors((16, 3, 40), torch.float16, device)
    assert_matches_torch(tensors._replace(input=tensors.input * 1e4))
    tensors = make_tensors((16, 3, 40), torch.float32, device)
    wide = tensors._replace(input=tensors.input * 1e17, running_mean=None, running_var=None)
    assert_matches_torch(wide)


# --- the same bits ---


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@BOTH_LAYOUTS
@RESIDUAL
@pytest.mark.parametrize("shape", [(4, 70, 33), (33, 3, 401), (900, 17), (2, 5, 9, 9)], ids=str)
@pytest.mark.usefixtures("_deterministic")
def test_same_bits_every_time(
    backend: str, device: torch.device, shape: tuple[int, ...], residual: bool, layout: str
) -> None:
    """Also for another number of threads, unlike torch, and in torch's deterministic mode."""
    if is_slow(backend):
        shape = (shape[0] % 3 + 2, min(shape[1], 9), *shape[2:])
    tensors = make_tensors(shape, torch.float32, device, residual, layout)
    grad = torch.randn_like(tensors.input)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2) if backend == "cpu" else (2, 2):
            torch.set_num_threads(count)
            results.append(run(batch_norm_relu, tensors, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert_same_bits(other[name], expected)
