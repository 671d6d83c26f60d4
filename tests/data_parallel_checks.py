"""What ranks with whole parameters do together; tests/test_distributed.py starts them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastremedy
from fastremedy.optim import AdamW

from .process_group import Checks, registry

CHECKS: Checks = {}
check = registry(CHECKS)


def network() -> nn.Module:
    """Return a network whose odd sizes put gradients at odd offsets of a bucket."""
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 1))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    max_norm: float | None = None,
) -> list[torch.Tensor]:
    """Train on batches; return the norms, by ``clip_`` or of the optimizer."""
    norms = []
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if max_norm is not None:
            norms.append(fastremedy.clip_(model.parameters(), max_norm))
        optimizer.step()
        if max_norm is None:
            norms.append(optimizer.grad_norm)  # type: ignore[attr-defined]
    return norms


def compare(alone: nn.Module, together: nn.Module, norms: list[list[torch.Tensor]]) -> None:
    """Compare parameters and norms."""
    torch.testing.assert_close(norms[0], norms[1])
    for own, whole in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-5)


def batches_of(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return whole batches, and this rank's shares of them."""
    whole = torch.randn(4, 2 * world_size, 5)
    return whole, whole[:, 2 * rank : 2 * rank + 2]


@check
def distributed_data_parallel(rank: int, world_size: int) -> None:
    for as_view in (True, False):
        for max_norm in (None, 0.05):
            alone = network()
            together = copy.deepcopy(alone)
            parallel = DistributedDataParallel(together, gradient_as_bucket_view=as_view)
            norms = []
            for model, batches in zip((alone, parallel), batches_of(rank, world_size), strict=True):
                clipping = {"max_grad_norm": 0.05} if max_norm is None else {}
                optimizer = AdamW(model.parameters(), lr=0.01, **clipping)
                norms.append(train(model, optimizer, batches, max_norm))
            if as_view:
                addresses = [p.grad.data_ptr() % 16 for p in together.parameters()]
                assert any(addresses)  # some are not where vectors of 16 bytes begin
            compare(alone, together, norms)


@check
def zero_redundancy(rank: int, world_size: int) -> None:
    # Its package warns at import, which pytest takes for an error where it collects the checks.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for as_view in (False, True):
        alone = network()
        together = copy.deepcopy(alone)
        parallel = DistributedDataParallel(together)
        options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
        optimizers = [
            AdamW(alone.parameters(), **options),
            ZeroRedundancyOptimizer(
                parallel.parameters(), AdamW, parameters_as_bucket_view=as_view, **options
            ),
        ]
        runs = zip((alone, parallel), optimizers, batches_of(rank, world_size), strict=True)
        norms = [train(*run, max_norm=0.05) for run in runs]
        compare(alone, together, norms)
