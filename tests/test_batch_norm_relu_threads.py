"""BatchNorm adds up in the same order for any number of threads, however it shares out the work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastremedy


@pytest.mark.parametrize("shape", [(3, 6, 57, 57), (1, 6, 40000)], ids=str)
def test_long_rows_of_few_channels(shape: tuple[int, ...]) -> None:
    if fastremedy.backends.available()["cpu"] is not None:
        pytest.skip(str(fastremedy.backends.available()["cpu"]))
    # 6 channels are enough for one thread and too few for two; float64 shows every bit of the sums.
    x = torch.randn(shape, dtype=torch.float64) * 3 + 100
    grad = torch.randn_like(x)
    threads = torch.get_num_threads()
    results: list[list[Tensor | None]] = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            leaf = x.clone().requires_grad_()
            with fastremedy.backends.use("cpu"):
                y = fastremedy.functional.batch_norm_relu(leaf, None, None, training=True)
                y.backward(grad)
            results.append([y.detach(), leaf.grad])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


# Channels last goes down columns of what the caches hold, and along the rows of what they do not.
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        (3, 24, 31, 29),
        (2, 1300, 19, 19),
        (2, 1300, 31, 29),
        (3, 2049, 17, 19),
        (7, 333, 37, 23),
        (5, 48, 83, 61),
    ],
    ids=str,
)
def test_channels_last(shape: tuple[int, ...], dtype: torch.dtype, num_threads: int) -> None:
    if fastremedy.backends.available()["cpu"] is not None:
        pytest.skip(str(fastremedy.backends.available()["cpu"]))
    x, residual, grad = (
        torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)
    )
    weight, bias = torch.rand(2, shape[1]) + 0.5
    exact = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    z = F.batch_norm(exact[0], None, None, *exact[2:], training=True) + exact[1]
    z.relu().backward(grad.double())
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        with fastremedy.backends.use("cpu"):
            y = fastremedy.functional.batch_norm_relu(
                leaves[0], None, None, *leaves[2:], training=True, residual=leaves[1]
            )
            y.backward(grad)
    finally:
        torch.set_num_threads(threads)
    # Signs of z differ where it rounds to 0: z is right to some units in the last place.
    unsure = z.abs() < 4 * torch.finfo(dtype).eps
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), z.relu(), rtol=2 * eps, atol=4 * eps)
    for leaf, reference in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert reference.grad is not None
        difference = leaf.grad.double() - reference.grad
        if leaf.dim() == 4:
            difference = difference.masked_fill(unsure, 0)
        assert difference.norm() <= 2 * eps * reference.grad.norm()


# Threads share the channels of the first, and have the second's for themselves.
@pytest.mark.parametrize("shape", [(64, 2, 64, 64), (64, 16, 32, 32)], ids=str)
def test_dead_outputs_are_all_counted(shape: tuple[int, ...]) -> None:
    if fastremedy.backends.available()["cpu"] is not None:
        pytest.skip(str(fastremedy.backends.available()["cpu"]))
    module = fastremedy.nn.BatchNormReLU2d(shape[1])
    module.collect_stats = True
    x = torch.randn(shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with fastremedy.backends.use("cpu"):
            for _ in range(10):  # without atomics one in a hundred is right by luck
                share = (module(x) == 0).double().mean((0, 2, 3))
                assert module.last_stats is not None
                torch.testing.assert_close(module.last_stats.dead.double(), share)
    finally:
        torch.set_num_threads(threads)
