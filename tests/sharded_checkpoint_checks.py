"""Checkpoints of optimizers with DTensors; tests/test_sharded.py starts them."""

from __future__ import annotations

import copy
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastremedy.optim import AdamW

from .process_group import Checks, registry
from .sharded_networks import network

CHECKS: Checks = {}
check = registry(CHECKS)


@check
def checkpoint(rank: int, world_size: int) -> None:
    """Saved on all ranks, resumed on fewer or none, by torch's AdamW or by ours."""
    with tempfile.TemporaryDirectory() as mine:
        folders: list[Any] = [mine]
        dist.broadcast_object_list(folders)
        for saves, loads in (
            (AdamW, AdamW),
            (AdamW, torch.optim.AdamW),
            (torch.optim.AdamW, AdamW),
        ):
            for sizes in ((world_size, world_size // 2), (world_size // 2, world_size)):
                name = "-".join(map(str, (saves.__module__, loads.__module__, *sizes)))
                _save_and_load(world_size, f"{folders[0]}/{name}", saves, loads, *sizes)
        dist.barrier()


def _save_and_load(
    world_size: int, folder: str, saves: Any, loads: Any, save_size: int, load_size: int
) -> None:
    torch.manual_seed(7)
    alone = network()
    before = _resharded(alone, _mesh(world_size, save_size))
    _train(before, optimizer := saves(before.parameters()), 2)
    dcp.save(_state(before, optimizer), checkpoint_id=folder)
    _train(before, optimizer, 2)
    after = _resharded(alone, _mesh(world_size, load_size))
    optimizer = loads(after.parameters())
    state = _state(after, optimizer)
    dcp.load(state, checkpoint_id=folder)
    after.load_state_dict(state["model"])
    set_optimizer_state_dict(after, optimizer, state["optim"])
    _train(after, optimizer, 2)
    for name, param in after.named_parameters():
        expected = before.get_parameter(name).full_tensor()
        torch.testing.assert_close(param.full_tensor(), expected)


def _mesh(world_size: int, size: int) -> DeviceMesh:
    """Return this rank's mesh of a size; other ranks hold replicas that do not talk."""
    mesh = init_device_mesh("cpu", (world_size // size, size), mesh_dim_names=("copies", "shards"))
    return mesh["shards"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}


def _resharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    copied = copy.deepcopy(model)
    fully_shard(copied, mesh=mesh)
    return copied


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    torch.manual_seed(num_steps)
    x = torch.randn(4, 6)
    for _ in range(num_steps):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
