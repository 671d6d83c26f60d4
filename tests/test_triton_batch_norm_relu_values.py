"""BatchNorm with activation in Triton: statistics, dtypes, activations and their signs."""

from __future__ import annotations

import math

import pytest
import torch

from .triton_batch_norm_layer import (
    DEVICE,
    LAYOUTS,
    Layer,
    assert_near,
    check,
    lay_out,
    randn,
    unpack,
)

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastremedy.triton_kernels import exponential  # noqa: E402

from fastremedy.ops.batch_norm_relu import ACTIVATIONS  # noqa: E402

from .reference import FLOATS, UNIT_ROUNDOFF, assert_same_bits  # noqa: E402

# --- statistics ---


def test_cumulative_average() -> None:
    layer = Layer(6, torch.float32, False, momentum=None)
    batches = [randn((4, 6, 5), torch.float32, False) for _ in range(3)]
    for input in batches:
        layer.forward(input)
    assert layer.num_batches_tracked == 3
    columns = [input.double().movedim(1, 0).flatten(1) for input in batches]
    mean = torch.stack([column.mean(1) for column in columns]).mean(0)
    var = torch.stack([column.var(1) for column in columns]).mean(0)
    assert_near(layer.running_mean, mean, 1e-6)
    assert_near(layer.running_var, var, 1e-6)


@LAYOUTS
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4])
def test_statistics_far_from_zero(ratio: float, channels_last: bool) -> None:
    input = lay_out(torch.randn(16, 3, 400, device=DEVICE) + ratio, channels_last)
    layer = Layer(3, torch.float32, channels_last)
    check(layer, input, None, False)
    x = input.double().movedim(1, 0).flatten(1)
    mean, mean_low, invstd, variance = layer.saved.double()
    expected = x.var(1, correction=0)
    torch.testing.assert_close(mean + mean_low, x.mean(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(variance, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(invstd, (expected + layer.eps).rsqrt(), rtol=1e-6, atol=0)


def test_a_constant_channel_has_no_variance() -> None:
    layer = Layer(2, torch.float32, False)
    layer.forward(torch.full((3, 2, 700), 1234.567, device=DEVICE))
    assert (layer.saved[3] == 0).all()


@pytest.mark.parametrize("values", [None, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_weight_and_bias(dtype: torch.dtype, values: torch.dtype | None) -> None:
    for channels_last in (False, True):
        layer = Layer(3, dtype, channels_last, values=values)
        check(layer, randn((4, 3, 6), dtype, channels_last), None, False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_of_running_statistics(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = Layer(3, torch.float32, False)
    torch.manual_seed(1)
    other = Layer(3, torch.float32, False)
    for name in ("running_mean", "running_var"):
        start = getattr(layer, name).to(dtype)
        setattr(layer, name, start.clone())
        setattr(other, name, start.double())
    input = randn((4, 3, 6), torch.float32, False)
    layer.forward(input)
    other.forward(input)
    assert_same_bits(layer.running_mean, other.running_mean.to(dtype))
    assert_same_bits(layer.running_var, other.running_var.to(dtype))


@LAYOUTS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_evaluation(dtype: torch.dtype, channels_last: bool) -> None:
    layer = Layer(9, dtype, channels_last, training=False)
    before = layer.running_mean.clone(), layer.running_var.clone()
    shape = (5, 9, 13)
    check(layer, randn(shape, dtype, channels_last), randn(shape, dtype, channels_last), True)
    assert_same_bits(layer.running_mean, before[0])
    assert_same_bits(layer.running_var, before[1])
    assert layer.num_batches_tracked == 0
    mean, mean_low, invstd, variance = layer.saved
    assert torch.equal(mean, before[0].to(layer.wide))
    assert (mean_low == 0).all()
    assert torch.equal(variance, before[1].to(layer.wide))
    torch.testing.assert_close(invstd, (variance + layer.eps).rsqrt())


# --- activations ---


@LAYOUTS
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_activations(
    dtype: torch.dtype, activation: str, with_residual: bool, channels_last: bool
) -> None:
    shape = (4, 9, 11)
    residual = randn(shape, dtype, channels_last) if with_residual else None
    layer = Layer(9, dtype, channels_last, activation)
    check(layer, randn(shape, dtype, channels_last), residual, False)


@LAYOUTS
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_and_backward_agree_on_the_sign(
    dtype: torch.dtype, with_residual: bool, channels_last: bool
) -> None:
    # Few different values and a bias that moves one of them to zero, give or take a rounding.
    input = lay_out(torch.randint(-3, 4, (8, 8, 40), device=DEVICE).to(dtype), channels_last)
    residual = randn(input.shape, dtype, channels_last) * 1e-7 if with_residual else None
    layer = Layer(8, dtype, channels_last)
    layer.forward(input)
    mean, mean_low, invstd, _ = layer.saved.double()
    value = torch.arange(8, device=DEVICE) % 7 - 3
    layer.bias = (-(value - mean - mean_low) * invstd * layer.weight.double()).float()
    output, mask, _ = layer.forward(input, residual)
    grads = layer.backward(torch.ones_like(input), input, residual)
    assert torch.equal(grads[1] != 0, output > 0)
    for actual, expected in zip(
        layer.backward(torch.ones_like(input), input, None, mask), grads, strict=True
    ):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_sign_is_that_of_the_rounded_value(dtype: torch.dtype) -> None:
    layer = Layer(1, dtype, True, values=None, training=False, eps=0.0)
    layer.weight = torch.full((1,), 0.5, device=DEVICE)  # half of the smallest number rounds to 0
    layer.running_mean.zero_()
    layer.running_var.fill_(1.0)
    limits = torch.finfo(dtype)
    smallest = limits.smallest_normal * limits.eps
    values = torch.tensor([[smallest], [2 * smallest], [0.0], [-1.0]], dtype=torch.float64)
    input = values.to(DEVICE, dtype)
    output, mask, dead = layer.forward(input)
    expected = torch.tensor([False, True, False, False], device=DEVICE)
    assert torch.equal(output[:, 0] > 0, expected)
    assert torch.equal(unpack(mask, 1)[:, 0], expected)
    assert dead.item() == 3
    grads = layer.backward(torch.ones_like(input), input)
    assert torch.equal(grads[1][:, 0] > 0, expected)


@LAYOUTS
def test_nan_and_infinity_stay_in_their_channel(channels_last: bool) -> None:
    input = randn((4, 5, 9), torch.float32, channels_last)
    input[1, 2, 3] = math.nan
    input[2, 3, 4] = math.inf
    layer = Layer(5, torch.float32, channels_last)
    output, _, dead = layer.forward(input)
    assert output[:, 2:4].isnan().all()
    assert output[:, [0, 1, 4]].isfinite().all()
    assert dead[2:4].tolist() == [0, 0]
    grads = layer.backward(torch.ones_like(input), input)
    assert grads[0][:, [0, 1, 4]].isfinite().all()
    assert grads[1].isfinite().all()
    assert layer.saved[0, 3] == math.inf


def test_relu_drops_an_infinite_gradient() -> None:
    input = randn((4, 2, 9), torch.float32, False)
    layer = Layer(2, torch.float32, False, training=False)
    output, _, _ = layer.forward(input)
    grad = torch.where(output > 0, 1.0, math.inf)
    assert layer.backward(grad, input)[0].isfinite().all()


@LAYOUTS
@pytest.mark.parametrize("shape", [(4, 3, 9), (4, 4, 16)], ids=["", "vectors"])
def test_only_what_is_wanted_is_written(shape: tuple[int, int, int], channels_last: bool) -> None:
    input, grad = (randn(shape, torch.float32, channels_last) for _ in range(2))
    layer = Layer(shape[1], torch.float32, channels_last)
    layer.forward(input)
    expected = layer.backward(grad, input)
    for i in range(4):
        targets = [torch.empty_like(t) if i == j else None for j, t in enumerate(expected)]
        layer.backward(grad, input, targets=targets)
        assert_same_bits(targets[i], expected[i])


# --- exponential ---


@triton.jit
def _exponential_kernel(x_ptr, exp_ptr, expm1_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(exp_ptr + offsets, exponential.exp_of(x))
    tl.store(expm1_ptr + offsets, exponential.expm1_of(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exponential_is_accurate(dtype: torch.dtype) -> None:
    small = 10.0 ** torch.linspace(-30, 0, 4096, dtype=torch.float64)
    x = torch.cat([torch.linspace(-86.9, 0, 4096, dtype=torch.float64), -small]).to(dtype)
    x = x.to(DEVICE)
    exp, expm1 = torch.empty_like(x), torch.empty_like(x)
    _exponential_kernel[(x.numel() // 1024,)](x, exp, expm1, BLOCK=1024)
    bound = 4 * UNIT_ROUNDOFF[dtype]
    torch.testing.assert_close(exp.double(), x.double().exp(), rtol=bound, atol=0)
    torch.testing.assert_close(expm1.double(), x.double().expm1(), rtol=bound, atol=0)
