"""Residuals of every kind, and what the module tells of its last batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastremedy.nn import BatchNormReLU1d, BatchNormReLU2d
from fastremedy.ops import batch_norm_relu_dispatch as dispatch

from .batch_norm_reference import ACTIVATIONS
from .reference import assert_same_bits

# --- what the forward pass saw ---


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_last_stats(
    backend: str, device: torch.device, grad: bool, activation: str, residual: bool
) -> None:
    module = BatchNormReLU2d(4, activation=activation).to(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, r = torch.randn(2, 3, 4, 5, 7, device=device).unbind()
        x[:, 1] -= x[:, 1].mean() - 5
        x[:, 2] = float("nan")
        x = x.contiguous(memory_format=layout).requires_grad_(grad)
        module.collect_stats = False
        module._last = None
        expected = module(x, r if residual else None)
        assert module.last_stats is None
        module.collect_stats = True
        output = module(x, r if residual else None)
        assert_same_bits(output, expected)
        stats = module.last_stats
        assert stats is not None
        wide = x.detach().double()
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        torch.testing.assert_close(stats.mean.double(), mean, equal_nan=True, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(stats.var.double(), var, equal_nan=True, rtol=1e-6, atol=1e-6)
        dead = (output <= 0).float().mean((0, 2, 3))
        torch.testing.assert_close(stats.dead, dead, rtol=1e-6, atol=1e-6)
        assert stats.dead.dtype == torch.float32
        assert stats.nonfinite.tolist() == [False, False, True, False]
        if grad:
            output.nan_to_num().sum().backward()
    module.eval()
    before = module.last_stats
    module(x.detach().nan_to_num() + 1)
    assert before is not None
    assert module.last_stats is not None
    torch.testing.assert_close(module.last_stats, before, equal_nan=True)


def test_stats_need_no_other_launch(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "torch":
        pytest.skip("torch's own operators do not count")
    calls: list[int] = []
    kernels_of = dispatch.kernels_of

    def counted(name: str) -> dispatch.Kernels:
        kernels = kernels_of(name)

        def forward(*args: Any) -> None:
            calls.append(1)
            kernels.forward(*args)

        return kernels._replace(forward=forward)

    monkeypatch.setattr(dispatch, "kernels_of", counted)
    monkeypatch.setattr(dispatch, "usual", lambda tensors: None)  # its one call is one launch
    module = BatchNormReLU1d(3).to(device)
    module.collect_stats = True
    module(torch.randn(4, 3, device=device))
    assert len(calls) == 1


# --- residuals of every kind ---


def test_residual_is_the_input(backend: str, device: torch.device) -> None:
    module, expected = BatchNormReLU1d(3).to(device), nn.BatchNorm1d(3).to(device)
    x = torch.randn(6, 3, device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    module(leaves[0], leaves[0]).square().sum().backward()
    (expected(leaves[1]) + leaves[1]).relu().square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-5)


def residuals(x: Tensor) -> dict[str, Tensor]:
    return {
        "half": x.half() * 2,
        "double": x.double() * 2,
        "integers": (4 * x).long(),
        "row": x[:, :, :1] * 2,
        "channel": x[:1, :1] * 2,
        "scalar": x.new_tensor(0.5),
        "expanded": x[:1].expand_as(x),
        "outer": (x[None] * 2).expand(2, *x.shape),
    }


@pytest.mark.parametrize("name", residuals(torch.zeros(2, 3, 4)))
def test_residual_of_another_kind(backend: str, device: torch.device, name: str) -> None:
    """As a plain sum: promoted or broadcast."""
    torch.manual_seed(1)
    x = torch.randn(6, 3, 4, device=device)
    module, expected = BatchNormReLU1d(3).to(device), nn.BatchNorm1d(3).to(device)
    other = residuals(torch.randn_like(x))[name].detach()
    results = []
    for function in (module, lambda x, r: (expected(x) + r).relu()):
        leaf, residual = x.clone().requires_grad_(), other.clone()
        residual.requires_grad_(residual.is_floating_point())
        output = function(leaf, residual)
        output.square().sum().backward()
        results.append([output.detach(), leaf.grad, residual.grad])
    for actual, reference in zip(*results, strict=True):
        if reference is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, reference, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(module.running_var, expected.running_var)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_only_the_residual_has_a_gradient(
    backend: str, device: torch.device, training: bool
) -> None:
    for activation in ACTIVATIONS:
        module = BatchNormReLU1d(3, activation=activation).to(device).requires_grad_(False)
        module.train(training)
        x, r = torch.randn(2, 6, 3, device=device).unbind()
        leaf = r.clone().requires_grad_()
        output = module(x, leaf)
        (actual,) = torch.autograd.grad(output.square().sum(), leaf)
        stats = (None, None) if training else (module.running_mean, module.running_var)
        z = torch.nn.functional.batch_norm(x, *stats, training=training) + leaf
        slope = {"negative_slope": 0.01} if activation == "leaky_relu" else {}
        if activation != "identity":
            z = getattr(torch.nn.functional, activation)(z, **slope)
        (expected,) = torch.autograd.grad(z.square().sum(), leaf)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
