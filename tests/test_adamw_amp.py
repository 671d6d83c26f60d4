"""Non-finite gradients and torch.amp.GradScaler: what is skipped stays as it was, to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import assert_same_bits, assert_unchanged, everything_in
from .training import copy_params, make_grads, make_params, params_of, set_grads, train

# Rows of storage that a skipped step has to leave alone.
LOW_PRECISION = [None, "stochastic", "kahan", "master"]


def ready_optimizer(device: torch.device, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer after one step, with the next gradients set."""
    dtype = torch.float32 if options.get("low_precision") is None else torch.bfloat16
    params = make_params([(3,), (0,), (40, 3), ()], dtype, device)
    params.append(torch.randn(6, 4, device=device).to(dtype)[:, 1].requires_grad_())
    optimizer = fastremedy.optim.AdamW(params, lr=0.1, **options)
    train(optimizer, make_grads(params, 1))
    set_grads(params, make_grads(params, 1)[0])
    return optimizer


@pytest.mark.parametrize("low_precision", LOW_PRECISION)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_skip(
    backend: str,
    device: torch.device,
    value: float,
    max_grad_norm: float | None,
    low_precision: str | None,
) -> None:
    optimizer = ready_optimizer(
        device,
        nonfinite="skip",
        max_grad_norm=max_grad_norm,
        low_precision=low_precision,
        amsgrad=True,
    )
    params = params_of(optimizer)
    params[2].grad[39, 2] = value
    before = everything_in(optimizer)
    for count in (1, 2):
        optimizer.step()
        assert optimizer.num_skipped == count
        assert not optimizer.grad_norm.isfinite()
        assert_unchanged(optimizer, before)
    params[2].grad[39, 2] = 1.0
    optimizer.step()
    assert optimizer.num_skipped == 2
    assert optimizer.state[params[0]]["step"].item() == 2


def test_nonfinite_on_the_first_step(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (2,)], device=device)
    before = copy_params(params)
    optimizer = fastremedy.optim.AdamW(params, nonfinite="skip")
    grads = make_grads(params, 2)
    grads[0][1][0] = math.nan
    train(optimizer, grads)
    expected = fastremedy.optim.AdamW(before)
    train(expected, grads[1:])
    for param, other in zip(params, before, strict=True):
        assert_same_bits(param.detach(), other.detach())
        assert optimizer.state[param]["step"].item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_finite_gradients_are_not_skipped(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    largest = torch.finfo(torch.float32).max
    param = torch.zeros(5, dtype=dtype, device=device, requires_grad=True)
    optimizer = fastremedy.optim.AdamW([param], nonfinite="skip", max_grad_norm=1.0, lr=0.1)
    param.grad = torch.full_like(param, largest)  # the norm is above float32
    optimizer.step()
    assert optimizer.num_skipped == 0
    torch.testing.assert_close(param, torch.full_like(param, -0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("low_precision", LOW_PRECISION)
@pytest.mark.parametrize("found", [1.0, 2.0, 0.5, math.inf, math.nan])
def test_nonzero_found_inf_skips(
    backend: str, device: torch.device, found: float, low_precision: str | None
) -> None:
    optimizer = ready_optimizer(device, low_precision=low_precision)
    before = everything_in(optimizer)
    optimizer.found_inf = torch.full((1,), found, device=device)
    optimizer.grad_scale = torch.full((1,), 4.0, device=device)
    optimizer.step()
    assert_unchanged(optimizer, before)
    assert optimizer.num_skipped == 1
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert optimizer.num_skipped == 1
    assert optimizer.state[params_of(optimizer)[0]]["step"].item() == 2


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
@pytest.mark.parametrize("scale", [1.0, 1024.0, 0.25])
def test_grad_scale_divides(
    backend: str, device: torch.device, scale: float, max_grad_norm: float | None
) -> None:
    params = make_params([(3,), (40, 3)], device=device)
    expected = copy_params(params)
    (grads,) = make_grads(params, 1)
    scaled = fastremedy.optim.AdamW(params, lr=0.1, max_grad_norm=max_grad_norm)
    plain = fastremedy.optim.AdamW(expected, lr=0.1, max_grad_norm=max_grad_norm)
    scaled.grad_scale = torch.full((1,), scale, device=device)
    for _ in range(2):
        train(scaled, [[grad * scale for grad in grads]])
        train(plain, [grads])
        for grad, param in zip(grads, params, strict=True):
            assert_same_bits(param.grad, grad * scale)
    for param, other in zip(params, expected, strict=True):
        assert_same_bits(param.detach(), other.detach())  # the scale is a power of two
    if max_grad_norm is not None:
        assert_same_bits(scaled.grad_norm, plain.grad_norm)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_grad_scale_of_float64_keeps_its_digits(
    backend: str, device: torch.device, max_grad_norm: float | None
) -> None:
    params = make_params([(3,), (40, 3)], torch.float64, device)
    expected = copy_params(params)
    (grads,) = make_grads(params, 1)
    scaled = fastremedy.optim.AdamW(params, max_grad_norm=max_grad_norm)
    plain = fastremedy.optim.AdamW(expected, max_grad_norm=max_grad_norm)
    scale = torch.full((1,), 1 / 3, dtype=torch.float64, device=device)
    scaled.grad_scale = scale  # in float32 it would be wrong by 3e-8
    train(scaled, [[grad * scale for grad in grads]])
    train(plain, [grads])
    for param, other in zip(params, expected, strict=True):
        moment = scaled.state[param]["exp_avg"]  # the update itself hardly depends on scales
        torch.testing.assert_close(moment, plain.state[other]["exp_avg"], rtol=1e-14, atol=0)


def drive_scaler(
    optimizer: torch.optim.Optimizer, device: torch.device, unscale: bool, overflow_at: int
) -> list[float]:
    """Train five steps with a GradScaler; the gradient of one step overflows."""
    torch.manual_seed(3)
    params = params_of(optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=256.0, growth_interval=2)
    scales = []
    for i in range(5):
        optimizer.zero_grad()
        loss = sum((param * torch.randn(param.shape).to(param)).sum() for param in params)
        scaler.scale(loss * (math.inf if i == overflow_at else 1.0)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("overflow_at", [-1, 0, 2])
@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(backend: str, device: torch.device, unscale: bool, overflow_at: int) -> None:
    params = make_params([(3,), (4, 5)], device=device)
    expected = copy_params(params)
    ours = fastremedy.optim.AdamW(params, lr=0.1)
    by_torch = torch.optim.AdamW(expected, lr=0.1)
    scales = drive_scaler(ours, device, unscale, overflow_at)
    assert scales == drive_scaler(by_torch, device, unscale, overflow_at)
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)  # five updates of 0.1
    steps = 5 if overflow_at < 0 else 4
    assert ours.state[params[0]]["step"].item() == steps
    assert ours.num_skipped == 5 - steps
    assert not hasattr(ours, "found_inf")


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
def test_grad_scaler_with_clipping(
    backend: str, device: torch.device, nonfinite: str, unscale: bool
) -> None:
    params = make_params([(3,), (4, 5)], device=device)
    expected = copy_params(params)
    scaled = fastremedy.optim.AdamW(params, lr=0.1, max_grad_norm=0.5, nonfinite=nonfinite)
    drive_scaler(scaled, device, unscale, overflow_at=2)
    plain = fastremedy.optim.AdamW(expected, lr=0.1, max_grad_norm=0.5)
    torch.manual_seed(3)
    for i in range(5):
        grads: list[Tensor | None] = [torch.randn(p.shape).to(p) for p in expected]
        if i != 2:
            train(plain, [grads])
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)  # unscaled by a power of two
    assert scaled.num_skipped == 1


def test_clip_between_unscale_and_step(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (4, 5)], device=device)
    expected = copy_params(params)
    optimizers = fastremedy.optim.AdamW(params, lr=0.1), torch.optim.AdamW(expected, lr=0.1)
    for optimizer, clip in zip(
        optimizers, (fastremedy.clip_, torch.nn.utils.clip_grad_norm_), strict=True
    ):
        torch.manual_seed(3)
        scaler = torch.amp.GradScaler(device.type, init_scale=256.0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum((p * torch.randn(p.shape).to(p)).sum() for p in params_of(optimizer))
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip(params_of(optimizer), 0.5)
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)  # three updates of 0.1


@pytest.mark.parametrize("key", ["found_inf", "grad_scale"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_amp_scalars_of_other_dtypes(
    backend: str, device: torch.device, dtype: torch.dtype, key: str
) -> None:
    optimizer = ready_optimizer(device)
    setattr(optimizer, key, torch.ones(1, dtype=dtype, device=device))
    optimizer.step()
    assert optimizer.num_skipped == (1 if key == "found_inf" else 0)
