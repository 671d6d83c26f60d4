"""fastremedy.amp.GradScaler against torch's: the same scales and steps, gradients untouched."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fastremedy

from .reference import assert_same_bits
from .training import copy_params, make_params

# Infinite and NaN gradients at some steps; scales grow every second good step.
FACTORS = [1.0, math.inf, 1.0, 1.0, math.nan, 2.0, 1.0]


def scalers(device: torch.device, **options: Any) -> list[torch.amp.GradScaler]:
    options = {"init_scale": 1024.0, "growth_interval": 2, **options}
    classes = (fastremedy.amp.GradScaler, torch.amp.GradScaler)
    return [cls(device.type, **options) for cls in classes]


def backward(scaler: torch.amp.GradScaler, params: list[nn.Parameter], factor: float) -> None:
    for param in params:
        param.grad = None
    loss = torch.stack([(param * param.detach().cos()).sum() for param in params]).sum()
    scaler.scale(loss).backward()
    if not math.isfinite(factor):
        assert params[1].grad is not None
        params[1].grad[-1] = factor


@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "error"])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_steps_are_those_of_torch(
    backend: str, device: torch.device, max_grad_norm: float | None, nonfinite: str
) -> None:
    ours = make_params([(3,), (40,), (2, 5)], device=device)
    stock = copy_params(ours)
    optimizer = fastremedy.optim.AdamW(
        ours, lr=0.1, max_grad_norm=max_grad_norm, nonfinite=nonfinite
    )
    reference = torch.optim.AdamW(stock, lr=0.1)
    scaler, stock_scaler = scalers(device)
    num_skipped = 0
    for factor in FACTORS:
        backward(scaler, ours, factor)
        grads = [param.grad.clone() for param in ours if param.grad is not None]
        versions = [param.grad._version for param in ours if param.grad is not None]
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        for param, grad in zip(ours, grads, strict=True):
            assert param.grad is not None
            assert_same_bits(param.grad, grad)
        assert [p.grad._version for p in ours if p.grad is not None] == versions
        num_skipped += not math.isfinite(factor)
        assert optimizer.num_skipped == num_skipped
        if math.isfinite(factor):
            assert optimizer.grad_norm is not None
            norm = (
                torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt() / scale
            )
            # One rounding of the norm, and one of the reciprocal of the scale.
            torch.testing.assert_close(optimizer.grad_norm.double(), norm, rtol=2**-22, atol=0)
        backward(stock_scaler, stock, factor)
        stock_scaler.unscale_(reference)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(stock, max_grad_norm)
        stock_scaler.step(reference)
        stock_scaler.update()
        assert scaler.state_dict() == stock_scaler.state_dict()
    for param, expected in zip(ours, stock, strict=True):
        # The update has size lr = 0.1; 5 steps round a few times each, in another order.
        torch.testing.assert_close(param, expected, rtol=0, atol=5 * 8 * 2**-24)
    assert optimizer.nonfinite == nonfinite
    assert not hasattr(optimizer, "grad_scale")


def test_unscale_and_clip(backend: str, device: torch.device) -> None:
    ours = make_params([(3,), (40,)], device=device)
    stock = copy_params(ours)
    steps = [fastremedy.optim.AdamW(ours, lr=0.1), torch.optim.AdamW(stock, lr=0.1)]
    both = scalers(device)
    for factor in FACTORS:
        norms = []
        for params, optimizer, scaler, clip in zip(
            (ours, stock),
            steps,
            both,
            (fastremedy.clip_, nn.utils.clip_grad_norm_),
            strict=True,
        ):
            backward(scaler, params, factor)
            scaler.unscale_(optimizer)
            norms.append(clip(params, 1.0))
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(*norms, rtol=2**-21, atol=0, equal_nan=True)
        assert both[0].state_dict() == both[1].state_dict()
    for param, expected in zip(ours, stock, strict=True):
        torch.testing.assert_close(param, expected, rtol=0, atol=5 * 8 * 2**-24)


def test_several_optimizers_of_any_kind(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (40,), (7,)], device=device)
    optimizers = [
        fastremedy.optim.AdamW(params[:1], lr=0.1),
        fastremedy.optim.Adam(params[1:2], lr=0.1),
        torch.optim.SGD(params[2:], lr=0.1),
    ]
    scaler, _ = scalers(device)
    before = [param.detach().clone() for param in params]
    backward(scaler, params, math.inf)  # in the second
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    moved = [bool((p != b).any()) for p, b in zip(params, before, strict=True)]
    assert moved == [True, False, True]
    assert scaler.get_scale() == 512.0


def test_half_precision_gradients(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (40,)], torch.float16, device=device)
    optimizer = fastremedy.optim.AdamW(params, lr=0.1, max_grad_norm=1.0)
    scaler, _ = scalers(device)
    for factor in FACTORS:
        backward(scaler, params, factor)
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.num_skipped == 2


def test_wrong_use(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (40,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    scaler, _ = scalers(device)
    with pytest.raises(RuntimeError, match="Closure"):
        scaler.step(optimizer, closure=lambda: 0.0)
    backward(scaler, params, 1.0)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="being called after step"):
        scaler.unscale_(optimizer)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11
def test_a_step_that_fails_leaves_no_trace(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (40,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    scaler, _ = scalers(device)
    backward(scaler, params, 1.0)
    params[0].grad = torch.sparse_coo_tensor(
        [[0]], [1.0], (3,), device=device, check_invariants=True
    )
    with pytest.raises(RuntimeError, match="sparse"):
        scaler.step(optimizer)
    assert optimizer.nonfinite == "propagate"
    assert not hasattr(optimizer, "grad_scale")


def test_disabled(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (40,)], device=device)
    expected = copy_params(params)
    scaler, _ = scalers(device, enabled=False)
    optimizer = fastremedy.optim.AdamW(params, lr=0.1)
    reference = fastremedy.optim.AdamW(expected, lr=0.1)
    backward(scaler, params, 1.0)
    backward(scaler, expected, 1.0)
    scaler.step(optimizer)
    scaler.update()
    reference.step()
    for param, other in zip(params, expected, strict=True):
        assert_same_bits(param.detach(), other.detach())


def test_state_dict_loads_both_ways() -> None:
    ours, stock = scalers(torch.device("cpu"))
    params = make_params([(3,), (40,)])
    backward(ours, params, math.inf)
    ours.step(fastremedy.optim.AdamW(params))
    ours.update()
    stock.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert stock.get_scale() == 512.0
    again, _ = scalers(torch.device("cpu"))
    again.load_state_dict(stock.state_dict())
    assert again.get_scale() == 512.0


def test_schedule_that_asks_stays_with_the_steps(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (40,)], device=device)
    optimizer = fastremedy.optim.AdamW(params, lr=0.1, nonfinite="skip")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    scaler, _ = scalers(device)
    for factor in FACTORS:
        backward(scaler, params, factor)
        skipped = optimizer.num_skipped
        scaler.step(optimizer)
        scaler.update()
        if optimizer.num_skipped == skipped:
            schedule.step()
    assert schedule.last_epoch == optimizer.state[params[0]]["step"] == 5
