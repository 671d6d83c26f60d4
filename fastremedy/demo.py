"""Train a small network on real data twice, stock and with fastremedy, and compare.

Both runs start from the same weights, see the same batches and take turns step by step, so that a
busy machine slows both. The network is a residual net for the 1797 handwritten digits that come
with scikit-learn: many small tensors, where stock optimizers spend their time on overhead.

How far may the two loss curves be apart? As far as rounding takes them, and PyTorch shows how far
that is: it has two implementations of the update (fused and foreach) and two of the normalisation
(contiguous and channels last), which differ by rounding alone. A third run with the other stock
implementations measures their distance. A network with ReLU magnifies rounding from step to step,
so that the bound grows: at every step it is :data:`FACTOR` times the largest distance up to there,
or times the last digit of a float32 loss if that is more. Over eight seeds (on the CPU, 4 epochs,
12 blocks) fastremedy kept 1.2 to 2.0 times the distance; a learning rate wrong by a thousandth
makes 220 to 770 times of it, a weight decay wrong by a tenth 6 to 19.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import backends
from .nn import fuse_
from .optim import AdamW
from .picture import can_be_written

if TYPE_CHECKING:
    from rich.progress import Progress

LEARNING_RATE = 1e-3
MAX_GRAD_NORM = 1.0
BATCH_SIZE = 64
SEED = 0
WARM_UP = 10  # steps whose time does not count
FACTOR = 10
STOCK_LABEL = "stock: clip_grad_norm_, AdamW(fused=True)"
OUR_LABEL = "fastremedy: fuse_(model), AdamW(max_grad_norm=1.0)"


def add_arguments(parser: argparse.ArgumentParser, epochs: int = 8, out: str = "demo.png") -> None:
    """Add the options of ``python -m fastremedy demo``, or another example's with its defaults."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument(
        "--epochs", type=positive, default=epochs, help=f"passes over the data ({epochs})"
    )
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"({devices[0]})")
    parser.add_argument("--backend", choices=backends.NAMES, help="(the fastest that can run)")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"picture ({out})")


def positive(text: str) -> int:
    """Return the number that an option is given as."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run(options: argparse.Namespace) -> int:
    """Train, print the comparison, draw it; 1 if the curves differ by more than rounding."""
    return run_example(options, "adamw", compare)


def run_example(
    options: argparse.Namespace,
    stem: str,
    example: Callable[[argparse.Namespace, torch.device, str], int],
) -> int:
    """Return the example's status on the device and backend of the options; 2 if one is missing."""
    device = torch.device(options.device)
    try:
        with backends.use(options.backend):
            backend = backends.active(stem, device)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    try:
        with backends.use(backend):
            return example(options, device, backend)
    except ModuleNotFoundError as error:
        print(f"{error}: pip install 'fastremedy[demo]'", file=sys.stderr)
        return 2


def compare(options: argparse.Namespace, device: torch.device, backend: str) -> int:
    """Run the demo."""
    if not can_be_written(options.out):
        return 2
    comparison = train(load_digits(device), options.epochs, device)
    print_comparison(comparison, backend, device)
    draw(comparison, backend, options.out)
    print(f"picture: {options.out.resolve()}")
    if not comparison.is_rounding:
        print("the loss curves differ by more than rounding: please report this", file=sys.stderr)
    return int(not comparison.is_rounding)


@dataclass
class Data:
    """Images ``[N, 1, 8, 8]`` from -1 to 1 and their labels ``[N]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(device: torch.device) -> Data:
    """Return scikit-learn's digits, a fifth of them held out."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 8 - 1
    labels = torch.tensor(digits.target, device=device)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED)).to(device)
    test, train = order[: len(images) // 5], order[len(images) // 5 :]
    return Data(images[train], labels[train], images[test], labels[test])


class Block(nn.Module):
    """Pre-norm residual block; the branch starts small, which keeps a deep network steady."""

    def __init__(self, channels: int) -> None:
        """Create two convolutions, each behind a normalisation and an activation."""
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.1))

    def forward(self, input: Tensor) -> Tensor:
        """Add the branch to ``input`` ``[N, C, H, W]``."""
        branch: Tensor = self.branch(input)
        return input + self.scale * branch


def network(depth: int = 24, channels: int = 16, num_classes: int = 10) -> nn.Module:
    """Return a residual net: 173 parameter tensors, 115 thousand elements."""
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1, bias=False),
        *[Block(channels) for _ in range(depth)],
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(channels * 16, num_classes),
    )


@dataclass
class Run:
    """One network in training: ``update`` clips the gradients and steps the optimizer."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    update: Callable[[], object]
    schedule: torch.optim.lr_scheduler.LRScheduler
    memory_format: torch.memory_format = torch.contiguous_format
    accuracy: float = math.nan
    losses: list[float] = field(default_factory=list)
    update_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch and note loss and times."""
        images = images.contiguous(memory_format=self.memory_format)
        with stopwatch(self.step_ms, images.device):
            loss = nn.functional.cross_entropy(self.model(images), labels)
            self.optimizer.zero_grad()
            loss.backward()
            with stopwatch(self.update_ms, images.device):
                self.update()
            self.schedule.step()
        self.losses.append(loss.item())

    @torch.no_grad()
    def test(self, images: Tensor, labels: Tensor) -> None:
        """Measure the accuracy on held-out images."""
        self.model.eval()
        self.accuracy = (self.model(images).argmax(1) == labels).float().mean().item()


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Compute the same every time, and on one thread: more would wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(num_threads)


def progress_bar(text: str) -> Progress:
    """Return a progress bar that ends in ``text``, a format of the fields of its task."""
    from rich import progress

    return progress.Progress(
        "training",
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn(text),
    )


@contextlib.contextmanager
def stopwatch(ms: list[float], device: torch.device) -> Iterator[None]:
    """Append the milliseconds that the block takes, work of the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ms.append((time.perf_counter() - start) * 1e3)


def stock_run(
    name: str,
    model: nn.Module,
    num_steps: int,
    memory_format: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> Run:
    """Return a run with ``clip_grad_norm_`` and one flavour of ``torch.optim.AdamW``."""
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=LEARNING_RATE, **options)

    def update() -> None:
        nn.utils.clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()

    return Run(name, model, optimizer, update, one_cycle(optimizer, num_steps), memory_format)


def our_run(name: str, model: nn.Module, num_steps: int) -> Run:
    """Return a run with fused BatchNorm + ReLU that clips inside the step of our AdamW."""
    fuse_(model)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    schedule = one_cycle(optimizer, num_steps)  # it wraps optimizer.step
    return Run(name, model, optimizer, optimizer.step, schedule)


def one_cycle(
    optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the schedule of all runs: it changes the learning rate and beta1 at every step."""
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=num_steps)


@dataclass
class Comparison:
    """The runs after training: stock, ours, and the other stock implementation as a yardstick."""

    stock: Run
    ours: Run
    yardstick: Run

    def difference(self, run: Run) -> list[float]:
        """Return ``|loss - stock loss|`` for every step."""
        return [abs(a - b) for a, b in zip(run.losses, self.stock.losses, strict=True)]

    @property
    def bound(self) -> list[float]:
        """The largest difference that counts as rounding, for every step."""
        last_digit = math.ldexp(1.0, math.frexp(max(self.stock.losses))[1] - 24)
        distances = itertools.accumulate(self.difference(self.yardstick), max, initial=last_digit)
        return [FACTOR * distance for distance in distances][1:]

    @property
    def is_rounding(self) -> bool:
        """Whether our curve is as close to stock as rounding allows; False for NaN."""
        differences = self.difference(self.ours)
        return all(a <= b for a, b in zip(differences, self.bound, strict=True))

    def speedup(self, times: Callable[[Run], list[float]]) -> float:
        """Return how many times shorter our median time is."""
        return median(times(self.stock)) / median(times(self.ours))


def median(ms: list[float]) -> float:
    """Return the median after the warm-up."""
    return statistics.median(ms[WARM_UP:] or ms)


def train(data: Data, epochs: int, device: torch.device) -> Comparison:
    """Train the runs side by side, with a progress bar."""
    num_batches = len(data.train_images) // BATCH_SIZE
    num_steps = epochs * num_batches

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        return network().to(device)

    comparison = Comparison(
        stock_run("stock", model(), num_steps, fused=True),
        our_run("fastremedy", model(), num_steps),
        stock_run("stock in other ways", model(), num_steps, torch.channels_last, foreach=True),
    )
    runs = (comparison.stock, comparison.ours, comparison.yardstick)
    shuffle = torch.Generator().manual_seed(SEED)
    text = "loss {task.fields[loss]:.4f}, differs by {task.fields[difference]:.1e}"
    with exact(), progress_bar(text) as progress:
        task = progress.add_task("training", total=num_steps, loss=math.nan, difference=0.0)
        for _ in range(epochs):
            order = torch.randperm(len(data.train_images), generator=shuffle).to(device)
            for batch in order[: num_batches * BATCH_SIZE].split(BATCH_SIZE):
                for run in runs:
                    run.step(data.train_images[batch], data.train_labels[batch])
                progress.update(
                    task,
                    advance=1,
                    loss=comparison.ours.losses[-1],
                    difference=max(comparison.difference(comparison.ours)),
                )
    for run in runs:
        run.test(data.test_images, data.test_labels)
    return comparison


def print_comparison(comparison: Comparison, backend: str, device: torch.device) -> None:
    """Print what the two runs have in common and what not."""
    from rich.console import Console
    from rich.table import Table

    stock, ours = comparison.stock, comparison.ours
    table = Table("", title=f"{len(ours.losses)} steps on {device}, backend {backend}")
    for heading in ("stock", "fastremedy", "times faster"):
        table.add_column(heading, justify="right")
    table.add_row("held-out accuracy", f"{stock.accuracy:.1%}", f"{ours.accuracy:.1%}")
    table.add_row("last loss", f"{stock.losses[-1]:.6f}", f"{ours.losses[-1]:.6f}")
    for name, times in TIMES.items():
        values = [f"{median(times(run)):.3f} ms" for run in (stock, ours)]
        table.add_row(f"{name}, median", *values, f"{comparison.speedup(times):.2f}")
    console = Console()
    console.print(table)
    largest = max(comparison.difference(ours))
    console.print(
        f"largest difference of the loss curves: {largest:.1e} "
        f"(rounding explains up to {comparison.bound[-1]:.1e})",
        highlight=False,
        soft_wrap=True,
    )


TIMES: dict[str, Callable[[Run], list[float]]] = {
    "clip + optimizer step": lambda run: run.update_ms,
    "whole training step": lambda run: run.step_ms,
}


def draw(comparison: Comparison, backend: str, path: Path) -> None:
    """Draw both curves, their difference and the times."""
    from matplotlib.figure import Figure

    stock, ours = comparison.stock, comparison.ours
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplot_mosaic([["loss", "time"], ["difference", "time"]], width_ratios=[3, 1])
    axes["loss"].plot(stock.losses, color="#9ecae1", linewidth=5, label=STOCK_LABEL)
    axes["loss"].plot(ours.losses, color="#08306b", linewidth=1, label=OUR_LABEL)
    axes["loss"].set(ylabel="training loss", ylim=(0, None))
    axes["loss"].set_title("two runs, one curve", loc="left")
    axes["loss"].legend(frameon=False)
    difference = axes["difference"]
    for run, color, size in ((comparison.yardstick, "#bdbdbd", 5), (ours, "#08306b", 2.5)):
        label = f"{run.name} against stock"
        difference.plot(comparison.difference(run), "o", color=color, markersize=size, label=label)
    difference.plot(comparison.bound, color="#cb181d", linestyle="--", label="bound")
    difference.set(xlabel="step", ylabel="|loss - stock loss|", yscale="log")
    difference.legend(frameon=False, loc="best")
    times = [median(run.update_ms) for run in (stock, ours)]
    bars = axes["time"].bar(["stock", "fastremedy"], times, color=["#9ecae1", "#08306b"])
    axes["time"].bar_label(bars, [f"{ms:.2g} ms" for ms in times], padding=2)
    axes["time"].set_title(f"clip + step: {times[0] / times[1]:.0f}x", loc="left")
    axes["time"].set_ylabel("median time of a step, ms")
    for panel in axes.values():
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"digits, {len(ours.losses)} steps, backend {backend}")
    figure.savefig(path, dpi=150)
