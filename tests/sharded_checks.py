"""What the ranks of a mesh do together; tests/test_sharded.py starts them."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastremedy
from fastremedy import clip
from fastremedy.optim import AdamW

from .process_group import Checks, registry

KINDS = ("fsdp", "tp", "fsdp+tp", "hsdp", "several meshes")
CHECKS: Checks = {}
check = registry(CHECKS)


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
def partial_gradients(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    values, grad = torch.randn(2, 4, 3)
    results = []
    for placements, share in (([Partial()], grad / world_size), ([Replicate()], grad)):
        param = nn.Parameter(distribute_tensor(values.clone(), mesh, [Replicate()]))
        param.grad = DTensor.from_local(share.clone(), mesh, placements, run_check=False)
        optimizer = AdamW([param], max_grad_norm=1.0)
        optimizer.step()
        norm = fastremedy.clip_(param, 0.5)
        results.append([norm, optimizer.grad_norm, local(param), param.grad.full_tensor()])
    torch.testing.assert_close(*results)


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


OPTIONS: list[dict[str, Any]] = [
    {},
    {"amsgrad": True, "weight_decay": 0.1},
    {"max_grad_norm": 0.5},
    {"max_grad_norm": 2.0, "norm_type": math.inf, "nonfinite": "skip"},
    {"nonfinite": "error", "state_dtype": torch.bfloat16},
]


@check
def steps(rank: int, world_size: int) -> None:
    for options in OPTIONS:
        for pair in pairs(world_size):
            ours, alone = AdamW(pair.params, **options), AdamW(pair.plain, **options)
            for _ in range(3):
                pair.set_grads()
                versions = [p._version for p in pair.params]
                ours.step()
                alone.step()
                assert all(p._version > v for p, v in zip(pair.params, versions, strict=True))
                if alone.grad_norm is not None:
                    torch.testing.assert_close(ours.grad_norm, alone.grad_norm)
                pair.assert_equal()
            for param in pair.params:
                moment = ours.state[param]["exp_avg"]
                assert isinstance(moment, DTensor) == isinstance(param, DTensor)


@check
def as_torch(rank: int, world_size: int) -> None:
    """torch's own AdamW behind its own clipping does the same to the same DTensors."""
    pair, stock = (Pair("fsdp", world_size) for _ in range(2))
    ours, by_torch = AdamW(pair.params, max_grad_norm=0.5), torch.optim.AdamW(stock.params)
    for copied, param in zip(stock.params, pair.params, strict=True):
        local(copied).data.copy_(local(param))
    for _ in range(3):
        pair.set_grads()
        for copied, param in zip(stock.params, pair.params, strict=True):
            copied.grad = like(local(param.grad).clone(), copied)
        norm = nn.utils.clip_grad_norm_(stock.params, 0.5)
        by_torch.step()
        ours.step()
        torch.testing.assert_close(ours.grad_norm, norm.full_tensor())
    for copied, param in zip(stock.params, pair.params, strict=True):
        torch.testing.assert_close(local(param), local(copied))


@check
def low_precision(rank: int, world_size: int) -> None:
    for mode in ("kahan", "master", "stochastic"):
        for pair in pairs(world_size, torch.bfloat16):
            torch.manual_seed(5)
            ours, alone = (
                AdamW(params, low_precision=mode, max_grad_norm=1.0)
                for params in (pair.params, pair.plain)
            )
            for _ in range(3):
                pair.set_grads(dtype=torch.bfloat16)
                ours.step()
                alone.step()
            pair.assert_equal(rtol=2e-2, atol=2e-3)  # one rounding, up or down


@check
def skipped_together(rank: int, world_size: int) -> None:
    pair = Pair("fsdp", world_size)
    optimizer = AdamW(pair.params, nonfinite="skip")
    pair.set_grads()
    if rank == 0:
        local(pair.params[0].grad).view(-1)[0] = math.nan
    versions = [p._version for p in pair.params]
    optimizer.step()
    assert optimizer.num_skipped == 1
    assert optimizer.grad_norm.isnan()
    pair.assert_equal(rtol=0, atol=0)
    if fastremedy.backends.active("adamw", torch.device("cpu")) == "cpu":
        assert versions == [p._version for p in pair.params]
    raising = AdamW(pair.params, nonfinite="error")
    match = r"param_groups\[0\]\['params'\]\[0\]" if rank == 0 else "another rank"
    with pytest.raises(RuntimeError, match=match):
        raising.step()
    pair.assert_equal(rtol=0, atol=0)


@check
def grad_scaler(rank: int, world_size: int) -> None:
    pair = Pair("fsdp+tp", world_size)
    ours, alone = AdamW(pair.params, max_grad_norm=1.0), AdamW(pair.plain, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        scaler.scale(torch.zeros(()))
        pair.set_grads()
        for param in pair.params:
            local(param.grad).mul_(scaler.get_scale())
        if step == 1 and rank == world_size - 1:
            local(pair.params[0].grad).view(-1)[0] = math.inf
        scaler.step(ours)
        scaler.update()
        if step != 1:
            alone.step()
        pair.assert_equal()
    assert ours.num_skipped == 1
    assert scaler.get_scale() == 2.0


@check
def trained_by_fully_shard(rank: int, world_size: int) -> None:
    """Forward and backward included: the same parameters as one process finds."""
    alone, sharded = network(), network()
    sharded.load_state_dict(alone.state_dict())
    fully_shard(sharded[0])
    fully_shard(sharded)
    optimizers = [AdamW(m.parameters(), lr=0.01, max_grad_norm=0.1) for m in (alone, sharded)]
    for _ in range(4):
        x, target = torch.randn(2 * world_size, 6), torch.randn(2 * world_size, 3)
        mine = slice(2 * rank, 2 * rank + 2)
        nn.functional.mse_loss(alone(x), target).backward()
        nn.functional.mse_loss(sharded(x[mine]), target[mine]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(optimizers[1].grad_norm, optimizers[0].grad_norm)
    for name, param in sharded.named_parameters():
        whole = alone.get_parameter(name).detach()
        torch.testing.assert_close(param.full_tensor().detach(), whole, rtol=1e-4, atol=1e-5)


@check
def gaps_in_local_memory(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    values, grad = torch.randn(2, 4, 3)
    results = []
    for stretched in (False, True):
        room = torch.zeros(4, 6)[:, ::2] if stretched else torch.zeros(4, 3)
        param = nn.Parameter(DTensor.from_local(room.copy_(values), mesh, [Replicate()]))
        param.grad = DTensor.from_local(grad.clone(), mesh, [Replicate()])
        AdamW([param], max_grad_norm=1.0).step()
        results.append(local(param).detach().contiguous())
    torch.testing.assert_close(*results)


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


class Calls(TorchDispatchMode):
    """Counts the operators that see a DTensor."""

    num_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += any(issubclass(t, DTensor) for t in types)
        return func(*args, **(kwargs or {}))


@check
def no_dispatch_of_dtensors(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    params = [
        nn.Parameter(distribute_tensor(torch.randn(world_size, 2), mesh, [Shard(0)]))
        for _ in range(20)
    ]
    optimizer = AdamW(params, max_grad_norm=0.1, nonfinite="skip")
    for param in params:
        param.grad = like(torch.randn(1, 2), param)
    with Calls() as calls:
        fastremedy.clip_(params, 0.1)
        optimizer.step()
        optimizer.step()
    assert calls.num_calls == 0
    with Calls() as calls:
        nn.utils.clip_grad_norm_(params, 0.1)
    assert calls.num_calls > 0


@check
def moved_memory(rank: int, world_size: int) -> None:
    """A parameter that gets other memory, as FSDP does after loading, is found again."""
    pair = Pair("fsdp", world_size)
    ours, alone = AdamW(pair.params), AdamW(pair.plain)
    for _ in range(3):
        pair.set_grads()
        ours.step()
        alone.step()
        pair.params[0]._local_tensor = local(pair.params[0]).clone()
    pair.assert_equal()


@check
def misfits(rank: int, world_size: int) -> None:
    pair = Pair("fsdp", world_size)
    pair.set_grads()
    optimizer = AdamW(pair.params)
    optimizer.step()
    optimizer.state[pair.params[0]]["exp_avg"] = torch.zeros(pair.params[0].shape)
    with pytest.raises(ValueError, match="if and only if"):
        optimizer.step()


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
