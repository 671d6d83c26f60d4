"""CPU kernels give the same bits on any number of threads, also on more than have a share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastremedy


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    if fastremedy.backends.available()["cpu"] is not None:
        pytest.skip(str(fastremedy.backends.available()["cpu"]))
    before = torch.get_num_threads()
    with fastremedy.backends.use("cpu"):
        yield
    torch.set_num_threads(before)


def batch_norm(memory_format: torch.memory_format) -> list[Tensor]:
    torch.manual_seed(0)
    x, grad = (torch.randn(9, 37, 23, 29).contiguous(memory_format=memory_format) for _ in range(2))
    module = fastremedy.nn.BatchNormReLU2d(37)
    module.collect_stats = True
    leaf = x.clone().requires_grad_()
    y = module(leaf, residual=x)
    y.backward(grad)
    assert module.last_stats is not None
    assert leaf.grad is not None
    assert module.weight.grad is not None
    return [y.detach(), leaf.grad, module.weight.grad, module.last_stats.dead]


def two_steps() -> list[Tensor]:
    params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (1, 16384, 16385, 70000, 300000)]
    for param in params:
        param.grad = (7 * param.detach()).sin()
    optimizer = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
    for _ in range(2):
        optimizer.step()
    assert optimizer.grad_norm is not None
    return [*(param.detach() for param in params), optimizer.grad_norm]


def statistics() -> list[Tensor]:
    statistics = fastremedy.stats.Statistics(histogram=True)
    statistics.update(torch.linspace(-3, 3, 2**20))
    assert statistics.histogram is not None
    return [statistics.moments, statistics.counts, statistics.histogram]


def focal_loss() -> list[Tensor]:
    logits = torch.linspace(-9, 9, 40000 * 5).reshape(40000, 5).requires_grad_()
    labels = torch.arange(40000) % 5
    results = []
    for loss in (fastremedy.nn.FocalLoss(), fastremedy.nn.SigmoidFocalLoss(reduction="mean")):
        value = loss(logits, labels)
        results += [value.detach(), *torch.autograd.grad(value, logits)]
    return results


@pytest.mark.parametrize("num_threads", [2, 3, 70])
def test_same_bits(num_threads: int) -> None:
    def run() -> list[Tensor]:
        formats = (torch.contiguous_format, torch.channels_last)
        norms = [result for memory_format in formats for result in batch_norm(memory_format)]
        return [*norms, *two_steps(), *statistics(), *focal_loss()]

    torch.set_num_threads(1)
    expected = run()
    torch.set_num_threads(num_threads)
    for result, of_one in zip(run(), expected, strict=True):
        assert torch.equal(result, of_one)


FORK = """
import os, torch, fastremedy
torch.set_num_threads(2)
params = [torch.nn.Parameter(torch.ones(100)) for _ in range(600)]
for param in params:
    param.grad = torch.ones(100)
optimizer = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
optimizer.step()
child = os.fork()
optimizer.step()
if child == 0:
    os._exit(int(optimizer.state[params[-1]]["step"]))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_child_of_a_fork_has_no_pool() -> None:
    """It would wait for threads that only its parent has, as torch's large operators do."""
    result = subprocess.run([sys.executable, "-c", FORK], capture_output=True, timeout=60)
    assert result.stdout == b"2\n", result.stderr
