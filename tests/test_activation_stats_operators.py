"""Statistics in torch.compile and other tracers, under autograd and in process groups."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fastremedy.stats import Statistics

from .activation_stats_reference import (
    assert_same,
    buffers,
    check,
    check_row,
    data_of_rank,
    of,
    run_rank,
    spare_interpreted,
)
from .conftest import HAS_GPU
from .process_group import spawn
from .reference import assert_same_bits

OPS = torch.ops.fastremedy


@pytest.mark.parametrize("histogram", [True, False], ids=["histogram", "moments"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_opcheck(backend: str, device: torch.device, per_channel: bool, histogram: bool) -> None:
    spare_interpreted(backend, per_channel != histogram)
    statistics = Statistics(6, histogram=histogram, device=device)
    tensors = [torch.randn(4, 3, 5, device=device), torch.randn(2, 2, device=device).half()]
    armed = torch.ones((), dtype=torch.int32, device=device) if per_channel else None
    parts = (statistics.moments, statistics.counts, statistics.histogram)
    torch.library.opcheck(
        OPS.activation_stats_.default, (tensors, [3, 0], per_channel, armed, *parts)
    )


def test_operator_is_an_update(backend: str, device: torch.device) -> None:
    tensor = torch.randn(4, 3, 5, device=device)
    direct, by_operator = Statistics(4, device=device), Statistics(4, device=device)
    direct.update(tensor, 1, per_channel=True)
    parts = (by_operator.moments, by_operator.counts, by_operator.histogram)
    assert OPS.activation_stats_([tensor], [1], True, None, *parts) is None
    assert_same(by_operator, buffers(direct))


@pytest.mark.parametrize("histogram", [True, False], ids=["histogram", "moments"])
def test_compiled(backend: str, device: torch.device, histogram: bool) -> None:
    """One graph without breaks, forward and backward; statistics and results are eager's."""
    spare_interpreted(backend, histogram)
    sides = [Statistics(7, histogram=histogram, device=device) for _ in range(2)]
    armed = torch.ones((), dtype=torch.int32, device=device)
    weights = [torch.randn(3, 3, device=device) for _ in range(2)]
    leaves = [weights[0].requires_grad_(), weights[0].detach().clone().requires_grad_()]

    def step_with(statistics: Statistics, weight: Tensor, x: Tensor) -> Tensor:
        y = x @ weight
        statistics.update(y)
        z = y.relu()
        statistics.update([z, x], [1, 2])
        statistics.update(z, 3, per_channel=True, armed=armed)
        return z.square().sum()

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step_with, fullgraph=True, backend=counter)
    for step in range(3):
        x = torch.randn(5, 3, device=device)
        armed.fill_(step != 1)
        for function, statistics, leaf in zip((step_with, compiled), sides, leaves, strict=True):
            loss = function(statistics, leaf, x)
            loss.backward()
        assert leaves[0].grad is not None
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
        assert_same(sides[1], buffers(sides[0]))
    assert counter.frame_count == 1


def test_compiled_for_every_size(backend: str, device: torch.device) -> None:
    spare_interpreted(backend, backend == "triton")
    statistics = Statistics(4, device=device)

    def step(x: Tensor) -> Tensor:
        statistics.update(x * 2, 0)
        statistics.update(x, 1, per_channel=True)
        return x + 1

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    given: list[Tensor] = []
    # A size that is that of a buffer by chance would be taken for the same.
    for shape in ((6, 3, 7), (10, 3, 9), (11, 3, 12)):
        given.append(torch.randn(shape, device=device))
        assert_same_bits(compiled(given[-1]), given[-1] + 1)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3
    rows = [torch.cat([x.reshape(-1) for x in given]) * 2]
    rows += [torch.cat([x[:, c].reshape(-1) for x in given]) for c in range(3)]
    check(statistics, rows, 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_inductor(backend: str, device: torch.device) -> None:
    if backend != "cpu" and not HAS_GPU:
        pytest.skip("others are the same as in aot_eager")
    sides = [Statistics(2, device=device) for _ in range(2)]

    def step(statistics: Statistics, x: Tensor) -> Tensor:
        statistics.update([x, x[0]], [0, 1])
        return x + 1

    torch.compiler.reset()
    x = torch.randn(50, 30, device=device)
    for function, statistics in zip(
        (step, torch.compile(step, fullgraph=True)), sides, strict=True
    ):
        assert_same_bits(function(statistics, x), x + 1)
        assert_same_bits(function(statistics, x), x + 1)
    assert_same(sides[1], buffers(sides[0]))


def test_fake_tensors(backend: str, device: torch.device) -> None:
    with FakeTensorMode():
        statistics = Statistics(3, device=device)
        statistics.update(torch.randn(4, 3, 5, device=device), per_channel=True)
        assert statistics.moments.shape == (3, 8)


def test_make_fx(backend: str, device: torch.device) -> None:
    statistics = Statistics(device=device)

    def function(x: Tensor, moments: Tensor, counts: Tensor) -> Tensor:
        OPS.activation_stats_([x], [0], False, None, moments, counts, None)
        return x + 1

    x = torch.randn(20, device=device)
    graph = make_fx(function)(x, statistics.moments, statistics.counts)
    statistics.reset()
    graph(x + 1, statistics.moments, statistics.counts)
    statistics.histogram = None
    check(statistics, [x + 1], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_no_graph_is_kept(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Neither the graph of a tensor nor its memory outlives the update; backward is as before."""
    statistics = Statistics(3, device=device)
    leaf = torch.randn(4, 3, 5, device=device, dtype=dtype, requires_grad=True)
    y = leaf.exp()
    for tensor in (leaf, y, y.transpose(0, 2), y.half()):
        statistics.update(tensor)
    statistics.update(y, per_channel=True)
    for part in buffers(statistics):
        assert not part.requires_grad
        assert part.grad_fn is None
    assert not statistics.compute().mean.requires_grad
    y.sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, leaf.detach().exp())
    tensor = weakref.ref(y)
    del y
    gc.collect()
    assert tensor() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd(backend: str, device: torch.device, mode: type) -> None:
    statistics = Statistics(device=device)
    x = torch.randn(40, device=device)
    statistics.update(x)
    with mode():
        statistics.update(x * 2)
        other = of(x * 3)
    statistics.merge(other)
    statistics.update(x * 4)
    check_row(statistics, 0, torch.cat([x, x * 2, x * 3, x * 4]), 1e-6)


def test_within_forward_and_backward(backend: str, device: torch.device) -> None:
    """In hooks of modules and gradients, and where torch saves what it needs."""
    statistics = Statistics(2, device=device)
    layer = torch.nn.Linear(3, 4).to(device)
    seen: list[Tensor] = []

    def observe(row: int, tensor: Tensor) -> None:
        seen.append(tensor.detach().clone())
        statistics.update(tensor, row)

    layer.register_forward_hook(lambda module, args, output: observe(0, output))
    layer.weight.register_hook(lambda grad: observe(1, grad))
    layer(torch.randn(5, 3, device=device)).square().sum().backward()
    check(statistics, [tensor.reshape(-1) for tensor in seen], 1e-6)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")
def test_all_reduce(tmp_path: Path) -> None:
    """Ranks with unequal data hold the same bits afterwards: those of one pass over all of it."""
    spawn(run_rank, 2, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    rows = [torch.cat(parts) for parts in zip(*map(data_of_rank, range(2)), strict=True)]
    for first, second in zip(*ranks, strict=True):
        statistics = Statistics(4, histogram=len(first) == 3)
        statistics.moments, statistics.counts = first[:2]
        statistics.histogram = first[2] if len(first) == 3 else None
        assert_same(statistics, second)
        check(statistics, rows, 1e-6)


@pytest.mark.needs_cuda
def test_cuda_graph(gpu: torch.device) -> None:
    """No update waits for the device; a replay sees new values and the flag."""
    x = torch.randn(64, 3, 50, device=gpu)
    armed = torch.ones((), dtype=torch.int32, device=gpu)
    captured, eager = Statistics(4, device=gpu), Statistics(4, device=gpu)

    def step(statistics: Statistics) -> None:
        statistics.update(x, per_channel=True, armed=armed)
        statistics.update(x, 3)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(captured)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    captured.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for value in (1, 0, 1):
            x.normal_()
            armed.fill_(value)
            graph.replay()
            step(eager)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(captured, buffers(eager))
