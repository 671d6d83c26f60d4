"""``BatchNormReLU2d`` against ``relu(BatchNorm2d)``, eager and compiled, on ResNet-50's shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastremedy import bench
from fastremedy.nn import BatchNormReLU2d

# Channels and height of every BatchNorm that a ReLU follows.
RESNET50 = (
    (64, 112),
    (64, 56),
    (128, 56),
    (256, 56),
    (128, 28),
    (256, 28),
    (512, 28),
    (256, 14),
    (512, 14),
    (1024, 14),
    (512, 7),
    (2048, 7),
)
# Those of them that take a residual.
BLOCK_ENDS = ((256, 56), (512, 28), (1024, 14), (2048, 7))
MAIN = (64, 56)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
CPU_TARGETS = {"contiguous": 3.0, "channels last": 2.0}

# Forward reads the input twice and writes once; backward reads input and gradient twice and writes.
ACCESSES = 8


@dataclass(frozen=True)
class NormCase:
    """A batch of maps ``[N, C, H, H]``."""

    batch: int
    channels: int
    height: int
    layout: str
    rounds: int
    dtype: torch.dtype = torch.float32
    target: float | None = None

    def __str__(self) -> str:
        """Return a name such as ``32x64x56x56``."""
        dtype = "" if self.dtype == torch.float32 else f"-{self.dtype}".replace("torch.", "")
        return f"{self.batch}x{self.channels}x{self.height}x{self.height}{dtype}"

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the input."""
        return self.batch, self.channels, self.height, self.height

    def tensor(self, device: torch.device) -> Tensor:
        """Return random values."""
        values = torch.randn(self.shape, device=device, dtype=self.dtype)
        return values.contiguous(memory_format=LAYOUTS[self.layout])


def _cases(layout: str) -> list[tuple[torch.device, NormCase]]:
    result = []
    for device in bench.devices():
        is_cuda = device.type == "cuda"
        dtype = torch.bfloat16 if is_cuda else torch.float32
        for batch in (32, 256) if is_cuda else (1, 32):
            for channels, height in RESNET50:
                is_main = not is_cuda and batch == 32 and (channels, height) == MAIN
                target = CPU_TARGETS[layout] if is_main else None
                rounds = 100 if batch == 1 else 15
                case = NormCase(batch, channels, height, layout, rounds, dtype, target)
                result.append((device, case))
    return result


CASES = [case for layout in LAYOUTS for case in _cases(layout)]
MAIN_CASES = [
    (device, case)
    for device, case in CASES
    if case.batch == 32 and (case.channels, case.height) == MAIN
]
RESIDUAL_CASES = [
    (device, case)
    for device, case in CASES
    if (device, case) in MAIN_CASES or (case.channels, case.height) in BLOCK_ENDS
]
# Compiling one takes seconds on a GPU, and half a minute on a CPU.
COMPILED_CASES = [
    (device, case)
    for device, case in CASES
    if (device, case) in MAIN_CASES
    or (device.type == "cuda" and case.batch == 32 and case.layout == "channels last")
]


def _step(
    forward: Callable[..., Tensor], modules: nn.Module, inputs: tuple[Tensor, ...], grad: Tensor
) -> Callable[[], object]:
    def run() -> None:
        forward(*inputs).backward(grad)
        modules.zero_grad()
        for tensor in inputs:
            tensor.grad = None  # each frees its own

    return run


def _stock(norm: nn.Module) -> Callable[..., Tensor]:
    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        z = norm(x)
        return F.relu(z if residual is None else z + residual)

    return forward


def _candidates(
    case: NormCase, device: torch.device, *, residual: bool = False, compiled: bool = False
) -> bench.Candidates:
    inputs = tuple(case.tensor(device).requires_grad_() for _ in range(1 + residual))
    grad = case.tensor(device)
    ours = BatchNormReLU2d(case.channels, device=device)
    stock = nn.BatchNorm2d(case.channels, device=device)
    result = {
        bench.OURS: _step(ours, ours, inputs, grad),
        bench.STOCK: _step(_stock(stock), stock, inputs, grad),
    }
    if compiled:
        norm = nn.BatchNorm2d(case.channels, device=device)
        result[bench.COMPILED] = _step(torch.compile(_stock(norm)), norm, inputs, grad)
    return result


@pytest.mark.parametrize(("device", "case"), CASES, ids=str)
def bench_training(device: torch.device, case: NormCase, compare: Callable[..., None]) -> None:
    candidates = _candidates(case, device)
    _compare(compare, case, candidates, device, f"forward + backward, {case.layout}", ACCESSES)


@pytest.mark.filterwarnings("ignore")  # torch.compile has deprecation warnings of its own
@pytest.mark.parametrize(("device", "case"), COMPILED_CASES, ids=str)
def bench_training_against_compiled(
    device: torch.device, case: NormCase, compare: Callable[..., None]
) -> None:
    candidates = _candidates(case, device, compiled=True)
    _compare(compare, case, candidates, device, f"against torch.compile, {case.layout}", ACCESSES)


@pytest.mark.parametrize(("device", "case"), RESIDUAL_CASES, ids=str)
def bench_residual(device: torch.device, case: NormCase, compare: Callable[..., None]) -> None:
    candidates = _candidates(case, device, residual=True)
    note = f"with residual, {case.layout}"
    _compare(compare, case, candidates, device, note, ACCESSES + 2)


@pytest.mark.parametrize(("device", "case"), MAIN_CASES, ids=str)
def bench_evaluation(device: torch.device, case: NormCase, compare: Callable[..., None]) -> None:
    x = case.tensor(device)
    ours = BatchNormReLU2d(case.channels, device=device).eval()
    stock = nn.BatchNorm2d(case.channels, device=device).eval()

    @torch.no_grad()
    def run(forward: Callable[..., Tensor]) -> None:
        forward(x)

    candidates: bench.Candidates = {
        bench.OURS: lambda: run(ours),
        bench.STOCK: lambda: run(_stock(stock)),
    }
    _compare(compare, case, candidates, device, f"evaluation, {case.layout}", 2)


def _compare(
    compare: Callable[..., None],
    case: NormCase,
    candidates: bench.Candidates,
    device: torch.device,
    note: str,
    accesses: int,
) -> None:
    num_bytes = accesses * case.dtype.itemsize
    compare("batch_norm_relu", case, candidates, device, note=note, bytes_per_element=num_bytes)
