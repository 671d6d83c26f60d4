"""Time the operators side by side with stock PyTorch.

Candidates take turns, so whatever slows the machine slows all of them. They share parameters and
gradients; each optimizer has its own state.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, info
from .clip import clip_
from .optim import AdamW

OURS = "fastremedy"
STOCK = "stock"
FUSED = "stock fused"
FOREACH = "stock foreach"
COMPILED = "stock compiled"
GRAPHED = ", CUDA graph"
ONE_GROUP = ", one group"

MAX_NORM = 1.0
NUM_THREADS = 2
WARM_UP = 3

Candidates = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """``num_tensors`` parameters with ``numel`` elements each, in ``num_groups`` param groups.

    Each candidate steps ``in_a_row`` times in its turn, ``rounds`` times in all.
    """

    num_tensors: int
    numel: int
    rounds: int
    target: float | None = None  # how many times faster than stock fused it should be
    num_groups: int = 1
    dtype: torch.dtype = torch.float32
    in_a_row: int = 1

    def __str__(self) -> str:
        """Return a name such as ``1000x64`` or ``1000x64-bfloat16``."""
        dtype = "" if self.dtype == torch.float32 else f"-{self.dtype}".replace("torch.", "")
        return f"{self.num_tensors}x{self.numel}{dtype}"

    @property
    def elements(self) -> int:
        """Number of elements of all parameters."""
        return self.num_tensors * self.numel

    def params(self, device: torch.device) -> list[nn.Parameter]:
        """Return new parameters with gradients."""
        generator = torch.Generator(device).manual_seed(0)

        def values() -> Tensor:
            shape = (self.numel,)
            return torch.randn(shape, device=device, dtype=self.dtype, generator=generator)

        params = [nn.Parameter(values()) for _ in range(self.num_tensors)]
        for param in params:
            param.grad = values()
        return params


# It takes some steps until caches and branch predictors know a thousand tensors.
CPU_CASES = (
    Case(1000, 1, rounds=200, in_a_row=20),  # nothing but overhead
    Case(1000, 64, rounds=200, target=60, in_a_row=20),
    Case(1000, 4096, rounds=200, target=6, in_a_row=20),
    Case(100, 262144, rounds=20, target=1.5),
    Case(8, 8388608, rounds=10, target=1.25),
)
CUDA_CASES = (
    Case(1000, 1, rounds=200),
    Case(1000, 64, rounds=200),
    Case(1000, 4096, rounds=100, target=5),
    Case(100, 262144, rounds=50),
    Case(120, 8388608, rounds=10, target=1.25),  # 1 G elements
    Case(120, 8388608, rounds=10, dtype=torch.bfloat16),
)
COLD_CASE = Case(1000, 64, rounds=200)
COMPILED_CASE = Case(100, 262144, rounds=20)  # a thousand tensors compile for minutes
BACKWARD_CASE = Case(1000, 64, rounds=100)
OFFLOADED_CASES = (
    Case(100, 262144, rounds=20),
    Case(100, 262144, rounds=20, dtype=torch.bfloat16),
)
GROUPED_CASE = Case(930, 64, rounds=100, num_groups=465)


def offloaded_name(case: Case) -> str:
    """Return the name of a case whose gradients come from a GPU, if there is one."""
    return f"{case}-{devices()[-1]}"


def devices() -> list[torch.device]:
    """Return the devices to measure on."""
    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [torch.device(name) for name in names]


def cases(device: torch.device) -> tuple[Case, ...]:
    """Return the sizes to measure on a device."""
    return CUDA_CASES if device.type == "cuda" else CPU_CASES


def cases_on_devices() -> list[tuple[torch.device, Case]]:
    """Return every size with every device to measure it on."""
    return [(device, case) for device in devices() for case in cases(device)]


class SideBySide:
    """Candidates that take turns; ``ms`` holds the milliseconds of every call after the warm-up."""

    def __init__(
        self,
        candidates: Candidates,
        device: torch.device,
        prepare: Callable[[], object] = lambda: None,
        together: int = 1,
        in_a_row: int = 1,
    ) -> None:
        """Keep the candidates; ``prepare`` runs untimed before each call.

        Quantiles are of the sum of so many calls ``together``, of which not each does the same.
        A turn is so many calls ``in_a_row``: with one, each finds the caches full of the others'.
        """
        self.candidates = candidates
        self.prepare = prepare
        self.together = together
        self.in_a_row = in_a_row
        self.is_cuda = device.type == "cuda"
        self.ms: dict[str, list[float]] = {name: [] for name in candidates}
        self.host_ms: dict[str, list[float]] = {name: [] for name in candidates}

    def take_turn(self, name: str) -> None:
        """Call a candidate as often as it has its turn."""
        for _ in range(self.in_a_row):
            self.prepare()
            self._call(name)

    def _call(self, name: str) -> None:
        call = self.candidates[name]
        if not self.is_cuda:
            start = time.perf_counter()
            call()
            self.ms[name].append((time.perf_counter() - start) * 1e3)
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start = time.perf_counter()
        begin.record()
        call()
        end.record()
        self.host_ms[name].append((time.perf_counter() - start) * 1e3)
        torch.cuda.synchronize()
        self.ms[name].append(begin.elapsed_time(end))

    def peers(self) -> None:
        """Let all candidates but the first have their turn."""
        for name in list(self.candidates)[1:]:
            self.take_turn(name)

    def run(self, rounds: int) -> None:
        """Let all candidates take turns."""
        for _ in range(WARM_UP + rounds):
            self.peers()
            self.take_turn(next(iter(self.candidates)))

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Return p20, p50 and p80 of every candidate's milliseconds."""
        result = {}
        for name, ms in self.ms.items():
            result[name] = _quantiles(self._sums(ms))
            if self.is_cuda:
                host = statistics.median(self._sums(self.host_ms[name]))
                result[name]["host_p50"] = round(host, 6)
        return result

    def _sums(self, ms: list[float]) -> list[float]:
        begins = range(WARM_UP * self.in_a_row, len(ms), self.together)
        return [math.fsum(ms[begin : begin + self.together]) for begin in begins]


def _quantiles(ms: list[float]) -> dict[str, float]:
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else [ms[0]] * 4
    values = {"p20": fifths[0], "p50": statistics.median(ms), "p80": fifths[3]}
    return {name: round(value, 6) for name, value in values.items()}


def adamw_candidates(params: list[nn.Parameter], case: Case) -> Candidates:
    """Return clip + step of one case, ours first."""
    return {
        OURS: _our_step(params, case),
        FUSED: _stock_step(params, case, fused=True, capturable=params[0].is_cuda),
        FOREACH: _stock_step(params, case, foreach=True),
    }


def graphed_candidates(candidates: Candidates) -> Candidates:
    """Return the same under CUDA graphs; gradients have to stay where they are."""
    return {name + GRAPHED: _graphed(candidates[name]) for name in (OURS, FUSED)}


def compiled_candidates(params: list[nn.Parameter], case: Case) -> Candidates:
    """Return clip + step, ours first, and stock compiled by ``torch.compile``."""
    compiled = _stock_step(params, case, foreach=True, capturable=params[0].is_cuda)
    return {OURS: _our_step(params, case), COMPILED: torch.compile(compiled)}


def grouped_candidates(params: list[nn.Parameter], case: Case) -> Candidates:
    """Return clip + step with many param groups and with a single one, ours first."""
    one = replace(case, num_groups=1)
    return {
        OURS: _our_step(params, case),
        FUSED: _stock_step(params, case, fused=True),
        OURS + ONE_GROUP: _our_step(params, one),
        FUSED + ONE_GROUP: _stock_step(params, one, fused=True),
    }


def clip_candidates(params: list[nn.Parameter], clips: bool) -> Candidates:
    """Return ``clip_`` and what it replaces, with a norm above or below the limit."""
    max_norm = MAX_NORM if clips else 1e9
    return {
        OURS: lambda: clip_(params, max_norm),
        STOCK: lambda: nn.utils.clip_grad_norm_(params, max_norm),
        FOREACH: lambda: nn.utils.clip_grad_norm_(params, max_norm, foreach=True),
    }


def refill(params: list[nn.Parameter]) -> Callable[[], None]:
    """Return a function that gives the gradients the values they have now."""
    grads = [param.grad for param in params if param.grad is not None]
    values = [grad.clone() for grad in grads]
    return lambda: torch._foreach_copy_(grads, values)


def arrival(params: list[nn.Parameter]) -> Callable[[], None]:
    """Return a function that copies gradients to the CPU: from a GPU, if there is one."""
    values = [param.grad for param in params if param.grad is not None]
    if not torch.cuda.is_available():
        return refill(params)
    for param, value in zip(params, values, strict=True):
        param.grad = value.pin_memory()
    values = [value.cuda() for value in values]

    def run() -> None:
        for param, value in zip(params, values, strict=True):
            assert param.grad is not None
            param.grad.copy_(value, non_blocking=True)
        torch.cuda.synchronize()

    return run


def backward(params: list[nn.Parameter]) -> Callable[[], None]:
    """Return a function that gives all parameters new gradients, as training does."""
    weights = [torch.ones_like(param) for param in params]

    def run() -> None:
        for param in params:
            param.grad = None
        losses = [(param * weight).sum() for param, weight in zip(params, weights, strict=True)]
        torch.stack(losses).sum().backward()

    return run


def _groups(params: list[nn.Parameter], case: Case) -> list[dict[str, list[nn.Parameter]]]:
    size = len(params) // case.num_groups
    return [{"params": params[i : i + size]} for i in range(0, len(params), size)]


def _our_step(params: list[nn.Parameter], case: Case) -> Callable[[], object]:
    return AdamW(_groups(params, case), max_grad_norm=MAX_NORM).step


def _stock_step(params: list[nn.Parameter], case: Case, **options: Any) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(_groups(params, case), **options)
    foreach = True if options.get("foreach") else None

    def step() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=foreach)
        optimizer.step()

    return step


def _graphed(step: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # state and tables have to exist before the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def copy_gb_per_s(device: torch.device) -> float:
    """Return the bandwidth of a large copy, bytes read and written."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    side = SideBySide({"copy": lambda: target.copy_(source)}, device)
    side.run(rounds=40)  # the first ones also wait for pages
    return round(2 * source.numel() / side.quantiles()["copy"]["p20"] / 1e6, 1)


def machine() -> dict[str, str | int | None]:
    """Return what the numbers depend on; ``name`` is fit for a file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    cpu, capability = info.cpu_name(), torch.backends.cpu.get_cpu_capability()
    name = gpu or f"{cpu} {capability} {NUM_THREADS} threads"
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        "cpu": cpu,
        "cpu_capability": capability,
        "threads": NUM_THREADS,
        "gpu": gpu,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m fastremedy bench``."""
    names = [str(device) for device in devices()]
    parser.add_argument("--device", choices=names, default=names[-1], help=f"({names[-1]})")


def run(options: argparse.Namespace) -> int:
    """Print a line for every case: milliseconds of clip + AdamW step, and the ratio."""
    device = torch.device(options.device)
    torch.set_num_threads(NUM_THREADS)
    try:
        backend = backends.active("adamw", device)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"clip + AdamW step on {device}, backend {backend}, {NUM_THREADS} threads, median ms")
    print(f"{'parameters':<16}{OURS:>12}{FUSED:>14}{FOREACH:>15}{'times faster':>14}")
    for case in cases(device):
        candidates = adamw_candidates(case.params(device), case)
        side = SideBySide(candidates, device, in_a_row=case.in_a_row)
        side.run(case.rounds // case.in_a_row)
        p50 = {name: quantiles["p50"] for name, quantiles in side.quantiles().items()}
        times = f"{p50[OURS]:>12.3f}{p50[FUSED]:>14.3f}{p50[FOREACH]:>15.3f}"
        print(f"{case!s:<16}{times}{p50[FUSED] / p50[OURS]:>14.2f}", flush=True)
    return 0
