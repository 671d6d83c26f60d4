"""Norms and clipping of DTensors, which ranks do together; tests/test_sharded.py starts them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fastremedy
from fastremedy import clip
from fastremedy.optim import AdamW

from .process_group import Checks, registry
from .sharded_networks import Pair, local, pairs

CHECKS: Checks = {}
check = registry(CHECKS)


@check
def norms(rank: int, world_size: int) -> None:
    for pair in pairs(world_size):
        for norm_type in (1.0, 2.0, math.inf, -math.inf, 0.0, 3.0, -1.0):
            pair.set_grads()
            expected = fastremedy.grad_norm(pair.plain, norm_type)
            actual = fastremedy.grad_norm(pair.params, norm_type)
            assert type(actual) is Tensor
            torch.testing.assert_close(actual, expected)


@check
def clipping(rank: int, world_size: int) -> None:
    for pair in pairs(world_size):
        for max_norm in (0.5, 100.0):
            pair.set_grads()
            grads = [p.grad for p in pair.params]
            before = [local(grad).clone() for grad in grads]
            versions = [grad._version for grad in grads]
            expected = fastremedy.clip_(pair.plain, max_norm)
            actual = fastremedy.clip_(pair.params, max_norm)
            torch.testing.assert_close(actual, expected)
            for i, (param, whole) in enumerate(zip(pair.params, pair.plain, strict=True)):
                assert param.grad is grads[i]
                here = whole.grad.flatten()[pair.places[i]]
                torch.testing.assert_close(local(grads[i]), here)
                if max_norm == 100.0:
                    assert torch.equal(local(grads[i]), before[i])
                assert (grads[i]._version > versions[i]) == (max_norm == 0.5)


@check
def nan_of_one_rank(rank: int, world_size: int) -> None:
    for norm_type in (1.0, 2.0, math.inf, -math.inf, 3.0):
        pair = Pair("fsdp", world_size)
        pair.set_grads()
        if rank == 1:
            local(pair.params[0].grad).view(-1)[0] = math.nan
        assert fastremedy.grad_norm(pair.params, norm_type).isnan()
        with pytest.raises(RuntimeError, match="non-finite"):
            fastremedy.clip_(pair.params, 1.0, norm_type, error_if_nonfinite=True)


@check
def ranks_without_gradient(rank: int, world_size: int) -> None:
    """Collectives follow from placements: nobody waits for a rank that has nothing to say."""
    pair = Pair("fsdp", world_size)
    pair.set_grads()
    if rank == 0:
        for param in pair.params:
            param.grad = None
    norms = [fastremedy.clip_(pair.params, math.inf)]
    optimizer = AdamW(pair.params, max_grad_norm=1.0)
    optimizer.step()
    norms.append(optimizer.grad_norm)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, norms)
    assert all(torch.equal(g[0], g[1]) and torch.equal(g[0], norms[0]) for g in gathered)


@check
def observers_see_whole_norms(rank: int, world_size: int) -> None:
    class Observer:
        def before_clipping(self, tensors: list[Tensor]) -> None: ...

        def after_clipping(self, tensors: list[Tensor], norms: Tensor) -> None:
            self.norms = norms

    for pair in pairs(world_size):
        pair.set_grads()
        clip.observers.append(observer := Observer())
        fastremedy.clip_(pair.params, 1.0)
        clip.observers.remove(observer)
        expected = [whole.grad.double().norm() for whole in pair.plain]
        torch.testing.assert_close(observer.norms, torch.stack(expected))


@check
def same_gradient_twice(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
    param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
    version = param.grad._version
    assert fastremedy.clip_([param, param], 1.0).item() == 4.0
    assert param.grad._version > version
    torch.testing.assert_close(param.grad.full_tensor(), torch.full((4, 2), 1 / 16))
