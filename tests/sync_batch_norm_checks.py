"""What the ranks of a process group do together; tests/test_sync_batch_norm_relu.py starts them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastremedy.nn import BatchNormReLU1d, BatchNormReLU2d, SyncBatchNormReLU

from .process_group import Checks, registry

CHANNELS = 5
CHECKS: Checks = {}
check = registry(CHECKS)


def share(tensor: Tensor, rank: int, sizes: list[int]) -> Tensor:
    """Return the part of a batch that is on this rank."""
    return tensor.split(sizes)[rank]


def initialize(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)


def compare(
    rank: int,
    sizes: list[int],
    residual: bool = False,
    dtype: torch.dtype = torch.float32,
    arrange: Callable[[Tensor], Tensor] = lambda t: t,
    steps: int = 2,
    mean: float = 0.0,
    **options: Any,
) -> None:
    """Train one layer on the ranks' batches, and on all of them at once in float64."""
    together = SyncBatchNormReLU(CHANNELS, **options)
    initialize(together)
    alone = BatchNormReLU2d(CHANNELS, **options)
    alone.load_state_dict(together.state_dict())
    alone.double()
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {}
    for _ in range(steps):
        values = [torch.randn(sum(sizes), CHANNELS, 3, 4).to(dtype) for _ in range(3)]
        values[0] += mean
        x, r, grad = (t.double().requires_grad_() for t in values)
        expected = alone(x, r if residual else None)
        expected.backward(grad)
        own_x, own_r, own_grad = (
            arrange(share(t, rank, sizes)).detach().requires_grad_() for t in values
        )
        output = together(own_x, own_r if residual else None)
        output.backward(own_grad)
        assert output.stride() == torch.empty_like(own_x).stride() or not own_x.numel()
        pairs = [(output, expected), (own_x.grad, x.grad)]
        if residual:
            pairs.append((own_r.grad, r.grad))
        for own, whole in pairs:
            assert own is not None
            assert whole is not None
            torch.testing.assert_close(own, share(whole, rank, sizes).to(dtype), **close)
        for name, buffer in together.named_buffers():
            whole = alone.get_buffer(name).to(buffer.dtype)
            torch.testing.assert_close(buffer, whole, rtol=1e-6, atol=1e-6)
    for name, parameter in together.named_parameters():  # of this rank alone, as in torch
        assert parameter.grad is not None
        total = parameter.grad.clone()
        dist.all_reduce(total)
        whole = alone.get_parameter(name).grad
        assert whole is not None
        torch.testing.assert_close(total, whole.to(total.dtype), rtol=1e-4, atol=1e-4)


@check
def equals_one_process(rank: int, world_size: int) -> None:
    compare(rank, [3] * world_size)
    compare(rank, [3] * world_size, residual=True)


@check
def batches_of_different_sizes(rank: int, world_size: int) -> None:
    compare(rank, [1, 4, 2][:world_size], residual=True)


@check
def an_empty_rank(rank: int, world_size: int) -> None:
    for residual in (False, True):
        compare(rank, [4, 0, 3][:world_size], residual)
        compare(rank, [0, 2, 0][:world_size], residual)


@check
def one_value_on_a_rank(rank: int, world_size: int) -> None:
    """The others' count: torch refuses a single value per channel, all ranks have more."""
    norm = SyncBatchNormReLU(2)
    x = torch.tensor([[float(rank), -rank]])
    output = norm(x)
    all_x = torch.stack([torch.tensor([float(r), -r]) for r in range(world_size)])
    expected = torch.nn.functional.batch_norm(all_x, None, None, training=True).relu()
    torch.testing.assert_close(output, expected[rank : rank + 1], rtol=1e-4, atol=1e-5)


@check
def channels_last(rank: int, world_size: int) -> None:
    for residual in (False, True):
        compare(
            rank,
            [2] * world_size,
            residual,
            arrange=lambda t: t.contiguous(memory_format=torch.channels_last),
        )


@check
def any_strides(rank: int, world_size: int) -> None:
    compare(rank, [2] * world_size, True, arrange=lambda t: t.repeat_interleave(2, 3)[..., ::2])


@check
def one_rank_of_another_layout(rank: int, world_size: int) -> None:
    memory_format = torch.channels_last if rank == 1 else torch.contiguous_format
    compare(rank, [2] * world_size, arrange=lambda t: t.contiguous(memory_format=memory_format))


@check
def dtypes(rank: int, world_size: int) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        compare(rank, [3] * world_size, dtype=dtype)


@check
def far_from_zero(rank: int, world_size: int) -> None:
    compare(rank, [20] * world_size, mean=1e3, steps=1)


@check
def activations(rank: int, world_size: int) -> None:
    for activation in ("leaky_relu", "elu", "silu", "identity"):
        compare(rank, [2] * world_size, True, activation=activation, negative_slope=0.2, steps=1)


@check
def average_over_all_batches(rank: int, world_size: int) -> None:
    compare(rank, [3] * world_size, steps=4, momentum=None)


@check
def without_parameters_or_running_statistics(rank: int, world_size: int) -> None:
    compare(rank, [3] * world_size, affine=False)
    compare(rank, [3] * world_size, bias=False)
    compare(rank, [3] * world_size, track_running_stats=False)


@check
def evaluation_needs_nobody(rank: int, world_size: int) -> None:
    with mock.patch.object(dist, "all_reduce", side_effect=AssertionError("synchronised")):
        norm = SyncBatchNormReLU(CHANNELS).eval()
        plain = BatchNormReLU2d(CHANNELS).eval()
        if rank == 0:  # the others are not here
            x = torch.randn(2, CHANNELS, 3, 3)
            torch.testing.assert_close(norm(x), plain(x))


@check
def one_all_reduce_in_each_direction(rank: int, world_size: int) -> None:
    norm = SyncBatchNormReLU(CHANNELS)
    for count in (3, 0 if rank == 1 else 3):
        x = torch.randn(count, CHANNELS, 2, requires_grad=True)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            output = norm(x, x)
            assert all_reduce.call_count == 1
            assert all_reduce.call_args.args[0].numel() == 2 * CHANNELS + 1
            output.sum().backward()
            assert all_reduce.call_count == 2


@check
def frozen_parameters(rank: int, world_size: int) -> None:
    norm = SyncBatchNormReLU(CHANNELS)
    norm.weight.requires_grad_(False)
    norm.bias.requires_grad_(False)
    x = torch.randn(3, CHANNELS, 2, requires_grad=True)
    norm(x).square().sum().backward()
    assert x.grad is not None
    assert norm.weight.grad is None
    assert norm.bias.grad is None


@check
def sub_groups(rank: int, world_size: int) -> None:
    """Ranks 0 and 1 are one group; a third is another, which has nobody to wait for."""
    groups = [dist.new_group([0, 1]), dist.new_group(list(range(2, world_size)) or [0])]
    group = groups[0 if rank < 2 else 1]
    norm = SyncBatchNormReLU(CHANNELS, process_group=group)
    x = torch.randn(2 * world_size, CHANNELS, 3)
    members = slice(0, 4) if rank < 2 else slice(4, None)
    expected = torch.nn.functional.batch_norm(x[members], None, None, training=True).relu()
    mine = x[2 * rank : 2 * rank + 2]
    first = 2 * rank if rank < 2 else 0
    torch.testing.assert_close(norm(mine), expected[first : first + 2], rtol=1e-5, atol=1e-5)


@check
def statistics_are_of_all_ranks(rank: int, world_size: int) -> None:
    norm = SyncBatchNormReLU(CHANNELS)
    norm.collect_stats = True
    x = torch.randn(2 * world_size, CHANNELS, 7) + 2
    output = norm(x[2 * rank : 2 * rank + 2], torch.zeros(2, CHANNELS, 7))
    stats = norm.last_stats
    assert stats is not None
    var, mean = torch.var_mean(x, (0, 2), correction=0)
    torch.testing.assert_close(stats.mean, mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.var, var, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.dead, (output <= 0).float().mean((0, 2)))
    assert not stats.nonfinite.any()


@check
def nan_stays_in_its_channel(rank: int, world_size: int) -> None:
    norm = SyncBatchNormReLU(CHANNELS)
    x = torch.randn(3, CHANNELS, 2)
    if rank == 0:
        x[0, 2, 0] = float("nan")
    output = norm(x)
    assert output[:, 2].isnan().all()
    assert output[:, [0, 1, 3, 4]].isfinite().all()


@check
def cannot_be_differentiated_twice(rank: int, world_size: int) -> None:
    x = torch.randn(3, CHANNELS, 2, requires_grad=True)
    output = SyncBatchNormReLU(CHANNELS)(x)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@check
def checkpointing(rank: int, world_size: int) -> None:
    norm = SyncBatchNormReLU(CHANNELS)
    grads = []
    x = torch.randn(3, CHANNELS, 2)
    for wrap in (False, True):
        leaf = x.clone().requires_grad_()
        if wrap:
            output = torch.utils.checkpoint.checkpoint(norm, leaf, use_reentrant=False)
        else:
            output = norm(leaf)
        output.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


def make_net(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), norm(6), nn.Conv2d(6, 4, 2), norm(4), nn.Flatten(), nn.LazyLinear(3)
    )


@check
def distributed_data_parallel(rank: int, world_size: int) -> None:
    """Three steps of a small network give the parameters that one process finds."""
    alone, model = make_net(BatchNormReLU2d), make_net(SyncBatchNormReLU)
    with torch.no_grad():
        alone.eval()(torch.zeros(1, 2, 7, 7))
        model.eval()(torch.zeros(1, 2, 7, 7))
    model.load_state_dict(alone.state_dict())
    alone.train()
    parallel = nn.parallel.DistributedDataParallel(model.train())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (alone, parallel)]
    for step in range(3):
        torch.manual_seed(step)
        x, target = torch.randn(2 * world_size, 2, 7, 7), torch.randn(2 * world_size, 3)
        mine = slice(2 * rank, 2 * rank + 2)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.nn.functional.mse_loss(alone(x), target).backward()
        torch.nn.functional.mse_loss(parallel(x[mine]), target[mine]).backward()
        for optimizer in optimizers:
            optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], rtol=1e-4, atol=1e-5)


@check
def compiled_into_one_graph(rank: int, world_size: int) -> None:
    norm = SyncBatchNormReLU(CHANNELS)
    torch.compiler.reset()
    copied = copy.deepcopy(norm)
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    for residual in (False, True):
        x, r = torch.randn(2, 3 + rank, CHANNELS, 2)
        results = []
        for module in (norm, compiled):
            leaf = x.clone().requires_grad_()
            output = module(leaf, r) if residual else module(leaf)
            output.square().sum().backward()
            results.append((output.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    for name, buffer in norm.named_buffers():
        torch.testing.assert_close(copied.get_buffer(name), buffer)


@check
def converted_model(rank: int, world_size: int) -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(CHANNELS),
        BatchNormReLU1d(CHANNELS, momentum=None, activation="silu"),
        nn.Sequential(nn.Linear(CHANNELS, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU()),
        nn.BatchNorm1d(4, track_running_stats=False),
    )
    plain = copy.deepcopy(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    converted = SyncBatchNormReLU.convert_sync_batchnorm(model)
    assert converted is model
    after = dict(model.named_parameters()) | dict(model.named_buffers())
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor for name, tensor in tensors.items())
    kinds = [type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [SyncBatchNormReLU] * 4
    assert [model[0].activation, model[1].activation] == ["identity", "silu"]
    x = torch.randn(3 * world_size, CHANNELS)
    expected = plain(x)[3 * rank : 3 * rank + 3]
    torch.testing.assert_close(model(x[3 * rank : 3 * rank + 3]), expected, rtol=1e-4, atol=1e-4)
