"""Steps of optimizers with DTensors, together on all ranks; tests/test_sharded.py starts them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastremedy
from fastremedy.ops import shards
from fastremedy.optim import AdamW

from .process_group import Checks, registry
from .sharded_networks import Pair, like, local, network, pairs

CHECKS: Checks = {}
check = registry(CHECKS)

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
def clip_coefficient_in_double(rank: int, world_size: int) -> None:
    """Ranks agree on it in float64, as which the update of float64 gradients has it."""
    for pair in pairs(world_size, torch.float64):
        ours, alone = (AdamW(p, max_grad_norm=0.5) for p in (pair.params, pair.plain))
        for _ in range(2):
            pair.set_grads()
            ours.step()
            alone.step()
        for param, whole in zip(pair.params, pair.plain, strict=True):
            expected = alone.state[whole]["exp_avg"].flatten()[pair.places_of(param)]
            moment = local(ours.state[param]["exp_avg"])
            torch.testing.assert_close(moment, expected, rtol=1e-13, atol=0)


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
def gradients_distributed_otherwise(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    values, grad = torch.randn(2, world_size, world_size)
    results = []
    for placement in (Shard(0), Shard(1), Replicate()):
        param = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
        param.grad = distribute_tensor(grad, mesh, [placement])
        AdamW([param], max_grad_norm=1.0).step()
        results.append(local(param).detach())
    torch.testing.assert_close(results[1:], results[:1] * 2)


@check
def gradient_of_another_mesh(rank: int, world_size: int) -> None:
    """Shape and placement are the parameter's, but the shards belong to other ranks."""
    mesh, reverse = (
        DeviceMesh("cpu", order) for order in (range(world_size), range(world_size)[::-1])
    )
    param = nn.Parameter(distribute_tensor(torch.ones(world_size, 2), mesh, [Shard(0)]))
    optimizer = AdamW([param])
    param.grad = DTensor.from_local(torch.ones(1, 2), mesh, [Shard(0)])
    optimizer.step()
    param.grad = DTensor.from_local(torch.ones(1, 2), reverse, [Shard(0)], run_check=False)
    with pytest.raises(ValueError, match="on its parameter's mesh"):
        optimizer.step()


@check
def gradients_on_their_way(rank: int, world_size: int) -> None:
    """The memory of a gradient may be a promise of a collective that still runs."""
    mesh = init_device_mesh("cpu", (world_size,))
    values, grad = torch.randn(2, 4, 3)
    results = []
    for is_promise in (True, False):
        param = nn.Parameter(DTensor.from_local(values.clone(), mesh, [Replicate()]))
        shares = DTensor.from_local(grad / world_size, mesh, [Partial()], run_check=False)
        param.grad = shares.redistribute(placements=[Replicate()], async_op=is_promise)
        assert (type(local(param.grad)) is not torch.Tensor) == is_promise
        AdamW([param], max_grad_norm=1.0).step()
        results.append(local(param).detach())
    torch.testing.assert_close(*results)


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
    if fastremedy.backends.active("adamw", torch.device("cpu")) == "cpu":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shards, "memory_as", None)  # the native library reads the gradients
            optimizer.step()
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
