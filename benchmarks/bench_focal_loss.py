"""Focal loss against torchvision's formula and cross entropy's, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastremedy import bench
from fastremedy.functional import focal_loss, sigmoid_focal_loss

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossCase:
    """``rows`` with ``classes`` logits each."""

    rows: int
    classes: int
    rounds: int
    dtype: torch.dtype = torch.float32
    target: float | None = None

    def __str__(self) -> str:
        """Return a name such as ``100000x80``."""
        dtype = "" if self.dtype == torch.float32 else f"-{self.dtype}".replace("torch.", "")
        return f"{self.rows}x{self.classes}{dtype}"

    @property
    def elements(self) -> int:
        """Number of logits."""
        return self.rows * self.classes

    def logits(self, device: torch.device) -> Tensor:
        """Return random logits that require a gradient."""
        logits = torch.randn(self.rows, self.classes, device=device, dtype=self.dtype)
        return logits.requires_grad_()

    def labels(self, device: torch.device) -> Tensor:
        """Return random labels."""
        return torch.randint(self.classes, (self.rows,), device=device)


def stock_sigmoid(inputs: Tensor, targets: Tensor) -> Tensor:
    """Return torchvision's formula, with its alpha and gamma."""
    p = inputs.sigmoid()
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = 0.25 * targets + 0.75 * (1 - targets)
    return (alpha_t * ce_loss * (1 - p_t) ** 2.0).sum()


def stock_sigmoid_of_labels(inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the same for labels: torchvision wants them one-hot."""
    return stock_sigmoid(inputs, F.one_hot(labels, inputs.shape[1]).to(inputs.dtype))


def stock_softmax(input: Tensor, target: Tensor) -> Tensor:
    """Return the usual formula."""
    log_p = F.log_softmax(input, 1).gather(1, target.unsqueeze(1)).squeeze(1)
    return (-((1 - log_p.exp()) ** 2.0) * log_p).mean()


def _sum_of_sigmoid(inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = sigmoid_focal_loss(inputs, targets, reduction="sum")
    return loss


def _mean_of_softmax(input: Tensor, target: Tensor) -> Tensor:
    loss: Tensor = focal_loss(input, target)
    return loss


def _cases(
    *cpu: LossCase, cuda: tuple[tuple[int, int], ...]
) -> list[tuple[torch.device, LossCase]]:
    result = []
    for device in bench.devices():
        if device.type == "cpu":
            result += [(device, case) for case in cpu]
            continue
        for dtype in (torch.float32, torch.bfloat16):
            result += [(device, LossCase(rows, classes, 50, dtype)) for rows, classes in cuda]
    return result


DETECTION = ((100_000, 80), (1_000_000, 80))
DENSE = _cases(LossCase(100_000, 80, 15, target=15), cuda=DETECTION)
LABELS = _cases(LossCase(100_000, 80, 15, target=15), cuda=DETECTION)
SOFTMAX = _cases(
    LossCase(32_768, 1000, 9, target=8),
    LossCase(100_000, 10, 15),
    cuda=((32_768, 1000), (8_192, 32_000), (4_096, 128_256)),
)


@pytest.mark.filterwarnings("ignore")  # torch.compile has deprecation warnings of its own
@pytest.mark.parametrize(("device", "case"), DENSE, ids=str)
def bench_sigmoid(device: torch.device, case: LossCase, compare: Callable[..., None]) -> None:
    targets = (torch.rand(case.rows, case.classes, device=device) > 0.99).to(case.dtype)
    # Logits and targets are read once in either direction, the gradient written.
    _compare(compare, device, case, targets, _sum_of_sigmoid, stock_sigmoid, "sigmoid, dense", 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "case"), LABELS, ids=str)
def bench_sigmoid_of_labels(
    device: torch.device, case: LossCase, compare: Callable[..., None]
) -> None:
    labels, stock = case.labels(device), stock_sigmoid_of_labels
    _compare(compare, device, case, labels, _sum_of_sigmoid, stock, "sigmoid, labels", 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "case"), SOFTMAX, ids=str)
def bench_softmax(device: torch.device, case: LossCase, compare: Callable[..., None]) -> None:
    labels = case.labels(device)
    _compare(compare, device, case, labels, _mean_of_softmax, stock_softmax, "softmax", 3)


def _compare(
    compare: Callable[..., None],
    device: torch.device,
    case: LossCase,
    target: Tensor,
    ours: Loss,
    stock: Loss,
    note: str,
    accesses: int,
) -> None:
    logits = case.logits(device)

    def step(loss: Loss) -> Callable[[], None]:
        def run() -> None:
            loss(logits, target).backward()
            logits.grad = None  # each frees its own: for 131 MB that can take 10 ms

        return run

    candidates = {
        bench.OURS: step(ours),
        bench.STOCK: step(stock),
        bench.COMPILED: step(torch.compile(stock)),
    }
    if device.type == "cpu":
        accesses -= 1 if note != "sigmoid, dense" else 2  # the gradient comes with the loss
    num_bytes = accesses * case.dtype.itemsize
    compare("focal_loss", case, candidates, device, note=note, bytes_per_element=num_bytes)
