"""Networks that are distributed over a mesh, each beside the same one on a single process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

KINDS = ("fsdp", "tp", "fsdp+tp", "hsdp", "several meshes")


def network() -> nn.Sequential:
    """Return a network whose 3 and 5 rows leave uneven and, on 4 ranks, empty shards."""
    layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(5, 3, bias=False)]
    return nn.Sequential(*layers)


def shard(model: nn.Sequential, kind: str, world_size: int) -> None:
    """Distribute a network in one of the ways that there are."""
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world_size,))
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
        return
    square = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp"))
    if kind == "hsdp":
        fully_shard(model, mesh=square)
        return
    if kind == "several meshes":
        meshes = [init_device_mesh("cpu", (world_size,)), square]
        placements = [[Shard(0)], [Replicate(), Shard(0)], [Shard(0), Shard(0)], [Replicate()]]
        for i, (name, param) in enumerate(list(model.named_parameters())[:6]):
            chosen = placements[i % 4]
            distributed = distribute_tensor(param.detach(), meshes[len(chosen) - 1], chosen)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(distributed))
        return
    styles = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    if kind == "tp":
        parallelize_module(model, init_device_mesh("cpu", (world_size,)), styles)
        return
    parallelize_module(model, square["tp"], styles)
    fully_shard(model, mesh=square["dp"])


class Pair:
    """A network on one process and the same one, distributed, with gradients that are given."""

    def __init__(self, kind: str, world_size: int, dtype: torch.dtype = torch.float32) -> None:
        """Distribute a network of places to see which element goes where."""
        plain, distributed = network(), network()
        with torch.no_grad():
            for param in distributed.parameters():
                param.copy_(torch.arange(param.numel()).reshape(param.shape))
        shard(distributed, kind, world_size)
        self.plain = [p.detach().to(dtype).requires_grad_() for p in plain.parameters()]
        self.model = distributed.to(dtype)
        self.params = list(distributed.parameters())
        self.places = [local(p).detach().long().clone() for p in self.params]
        for param, whole, places in zip(self.params, self.plain, self.places, strict=True):
            local(param).data.copy_(whole.detach().flatten()[places])

    def set_grads(self, scale: float = 1.0, dtype: torch.dtype | None = None) -> None:
        """Draw new gradients, the same on all ranks."""
        for param, whole in zip(self.params, self.plain, strict=True):
            whole.grad = scale * torch.randn_like(whole, dtype=dtype)
            memory = whole.grad.flatten()[self.places_of(param)]
            param.grad = like(memory, param)

    def places_of(self, param: Tensor) -> Tensor:
        """Return which elements of a parameter are here."""
        return next(s for p, s in zip(self.params, self.places, strict=True) if p is param)

    def assert_equal(self, **tolerance: Any) -> None:
        """Compare this rank's elements of the parameters."""
        for param, whole in zip(self.params, self.plain, strict=True):
            expected = whole.detach().flatten()[self.places_of(param)]
            torch.testing.assert_close(local(param).detach(), expected, **tolerance)


def local(tensor: Tensor) -> Tensor:
    """Return the memory on this rank."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def like(memory: Tensor, param: Tensor) -> Tensor:
    """Return a gradient of a parameter."""
    if not isinstance(param, DTensor):
        return memory
    return DTensor.from_local(
        memory,
        param.device_mesh,
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )


def pairs(world_size: int, dtype: torch.dtype = torch.float32) -> Iterator[Pair]:
    """Yield a network for every way of distributing it."""
    for kind in KINDS:
        torch.manual_seed(1)
        yield Pair(kind, world_size, dtype)
