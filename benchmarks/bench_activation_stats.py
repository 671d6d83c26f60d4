"""Statistics in one read against torch's own reductions, eager and compiled."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastremedy import bench, demo
from fastremedy.stats import Monitor, Statistics


@dataclass(frozen=True)
class StatsCase:
    """An activation ``[N, C, H, H]``."""

    shape: tuple[int, ...]
    rounds: int
    dtype: torch.dtype = torch.float32
    target: float | None = None

    def __str__(self) -> str:
        """Return a name such as ``64x256x56x56``."""
        dtype = "" if self.dtype == torch.float32 else f"-{self.dtype}".replace("torch.", "")
        return "x".join(map(str, self.shape)) + dtype

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _cases() -> list[tuple[torch.device, StatsCase]]:
    result = []
    large, small = (64, 256, 56, 56), (64, 100)
    for device in bench.devices():
        if device.type == "cpu":
            result.append((device, StatsCase(large, 7, target=60)))
            result.append((device, StatsCase(small, 200)))
            continue
        for dtype in (torch.float32, torch.bfloat16):
            result += [(device, StatsCase(shape, 50, dtype)) for shape in (large, small)]
    return result


CASES = _cases()


def stock(x: Tensor) -> tuple[Tensor, ...]:
    """Return what our kernels return in one read, but for the histogram."""
    variance, mean = torch.var_mean(x, correction=0)
    d = x - mean
    squares = d * d
    third, fourth = (squares * d).mean(), (squares * squares).mean()
    least, most = x.aminmax()
    counts = ((x == 0).sum(), (x < 0).sum(), x.isnan().sum(), x.isinf().sum())
    return mean, variance, third, fourth, least, most, x.abs().sum(), *counts


@pytest.mark.filterwarnings("ignore")  # torch.compile has deprecation warnings of its own
@pytest.mark.parametrize("histogram", [False, True], ids=["moments", "histogram"])
@pytest.mark.parametrize(("device", "case"), CASES, ids=str)
def bench_statistics(
    device: torch.device, case: StatsCase, histogram: bool, compare: Callable[..., None]
) -> None:
    x = torch.randn(case.shape, device=device, dtype=case.dtype)
    statistics = Statistics(histogram=histogram, device=device)
    compiled = torch.compile(stock)
    candidates: bench.Candidates = {
        bench.OURS: lambda: statistics.update(x),
        bench.STOCK: lambda: stock(x),
        bench.COMPILED: lambda: compiled(x),
    }
    note = "with histogram, which stock has not" if histogram else ""
    num_bytes = case.dtype.itemsize
    compare("activation_stats", case, candidates, device, note=note, bytes_per_element=num_bytes)


@dataclass(frozen=True)
class StepsCase:
    """Training steps of the demo, of which times are added up."""

    steps: int = 8  # one of them is a full one
    rounds: int = 60  # right to 1.5 % of a step on a virtual machine whose steps vary by 14 %
    target: float | None = None
    elements: int = 0  # not a matter of bandwidth

    def __str__(self) -> str:
        """Return what the steps are of."""
        return f"{self.steps} training steps of the demo"


@pytest.mark.parametrize("device", bench.devices(), ids=str)
def bench_monitor(device: torch.device, compare: Callable[..., None]) -> None:
    case = StepsCase()
    images = torch.randn(demo.BATCH_SIZE, 1, 8, 8, device=device)
    labels = torch.randint(10, (demo.BATCH_SIZE,), device=device)

    with demo.exact(), contextlib.ExitStack() as monitors:

        def training(every: int | None) -> Callable[[], object]:
            run = demo.our_run("", demo.network().to(device), num_steps=10**6)
            monitor = None
            if every is not None:
                monitor = monitors.enter_context(Monitor(run.model, every))

            def train() -> None:
                run.step(images, labels)
                if monitor is not None:
                    monitor.step()

            return train

        candidates = {
            bench.OURS: training(every=1),
            "not monitored": training(every=None),
            "between": training(every=10**6),
        }
        note = "a monitor of every step"
        compare("activation_stats", case, candidates, device, note=note, together=case.steps)
