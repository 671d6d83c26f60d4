"""Runs of an optimizer with given gradients, held to torch's own in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import fastremedy

from .reference import assert_close_to_reference, clip_reference, clip_with_torch, wide

Grads = Sequence[Sequence[Tensor | None]]  # [step][parameter]
BeforeStep = Callable[[torch.optim.Optimizer, int], None]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def make_params(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Return random parameters."""
    return [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]


def make_grads(params: Sequence[Tensor], num_steps: int) -> list[list[Tensor | None]]:
    """Return random gradients of the parameters' dtypes for some steps."""
    return [
        [torch.randn(p.shape, device=p.device).to(p.dtype) for p in params]
        for _ in range(num_steps)
    ]


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return the parameters in the order of the groups."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Give every parameter a copy of its gradient."""
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else grad.to(param.device, param.dtype, copy=True)


def train(
    optimizer: torch.optim.Optimizer, grads: Grads, before_step: BeforeStep | None = None
) -> None:
    """Step once for every set of gradients."""
    for i, of_step in enumerate(grads):
        set_grads(params_of(optimizer), of_step)
        if before_step is not None:
            before_step(optimizer, i)
        optimizer.step()


def copy_params(params: Sequence[Tensor]) -> list[Tensor]:
    """Return leaves with the same values, dtypes and strides."""
    return [param.detach().clone().requires_grad_() for param in params]


def clipped_by(clip: Callable[..., Any], grads: Grads, max_norm: float, norm_type: float) -> Grads:
    """Clip the gradients of every step before the run."""
    clipped = []
    for of_step in grads:
        _, scaled = clip([g for g in of_step if g is not None], max_norm, norm_type)
        remaining = iter(scaled)
        clipped.append([None if g is None else next(remaining) for g in of_step])
    return clipped


def in_groups(params: Sequence[Tensor], groups: Sequence[dict[str, Any]]) -> list[Any]:
    """Give every group its share of the parameters, in order; without groups all stay together."""
    if not groups:
        return list(params)
    size = -(-len(params) // len(groups))
    return [
        {**group, "params": list(params[g * size : (g + 1) * size])}
        for g, group in enumerate(groups)
    ]


def assert_matches_torch(
    name: str,
    params: Sequence[Tensor],
    grads: Grads,
    *,
    max_grad_norm: float | None = None,
    norm_type: float = 2.0,
    groups: Sequence[dict[str, Any]] = (),
    before_step: BeforeStep | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Run fastremedy's optimizer ``name`` and hold parameters and state to torch's in float64.

    Returns:
        The optimizer, after the steps.
    """
    copies, wides = copy_params(params), [wide(param).requires_grad_() for param in params]
    torch_grads, wide_grads = grads, [[None if g is None else wide(g) for g in s] for s in grads]
    if max_grad_norm is not None:
        torch_grads = clipped_by(clip_with_torch, grads, max_grad_norm, norm_type)
        wide_grads = clipped_by(clip_reference, wide_grads, max_grad_norm, norm_type)
    by_torch = getattr(torch.optim, name)(in_groups(copies, groups), foreach=True, **options)
    reference = getattr(torch.optim, name)(in_groups(wides, groups), foreach=False, **options)
    optimizer = getattr(fastremedy.optim, name)(
        in_groups(params, groups), max_grad_norm=max_grad_norm, norm_type=norm_type, **options
    )
    train(by_torch, torch_grads, before_step)
    train(reference, wide_grads, before_step)
    scales = [param.detach().abs().max().item() if param.numel() else 0.0 for param in params]
    train(optimizer, grads, before_step)
    assert_same_training(optimizer, reference, by_torch, scales)
    return optimizer


def assert_same_training(
    optimizer: torch.optim.Optimizer,
    reference: torch.optim.Optimizer,
    by_torch: torch.optim.Optimizer,
    scales: Sequence[float],
) -> None:
    """Compare parameters and state of three runs; ``scales``: largest initial magnitudes."""
    columns = zip(*map(params_of, (optimizer, reference, by_torch)), scales, strict=True)
    for param, expected, torch_param, scale in columns:
        largest = max(scale, expected.detach().abs().max().item()) if expected.numel() else scale
        assert_close_to_reference(param, expected.detach(), torch_param, scale=largest)
        state, state64 = optimizer.state.get(param, {}), reference.state.get(expected, {})
        torch_state = by_torch.state.get(torch_param, {})
        assert state.keys() == state64.keys()
        if not state:
            continue
        assert state["step"].item() == state64["step"].item()
        for key in MOMENTS:
            if key in state:
                assert_close_to_reference(state[key], state64[key], torch_state[key])


def assert_like_torch(
    params: list[Tensor], drive: Callable[[torch.optim.Optimizer], object], **options: Any
) -> torch.optim.Optimizer:
    """Drive our optimizer, torch's and torch's in float64 through the same program."""
    runs = []
    for cls, of_run in (
        (fastremedy.optim.AdamW, params),
        (torch.optim.AdamW, [wide(param).requires_grad_() for param in params]),
        (torch.optim.AdamW, copy_params(params)),
    ):
        torch.manual_seed(1)  # of the gradients that the program makes up
        optimizer = cls(of_run, **options)
        drive(optimizer)
        runs.append(optimizer)
    assert_same_training(*runs, scales=[1.0 for _ in params_of(runs[0])])
    return runs[0]


def give_grads(params: list[Tensor]) -> None:
    """Set random gradients, the same ones whatever dtype and device."""
    for param in params:
        param.grad = torch.randn(param.shape).to(param.device, param.dtype)
