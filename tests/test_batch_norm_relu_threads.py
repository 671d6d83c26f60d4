"""BatchNorm adds up in the same order for any number of threads, however it shares out the work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
