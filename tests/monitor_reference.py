"""What a monitor should know, from ordinary hooks and float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastremedy.stats import Monitor
from fastremedy.stats.report import STATISTICS, Part

from .activation_stats_reference import PRECISION, expected_of

Values = dict[str, list[Tensor]]  # of one step, by name
NOTHING = torch.zeros(0)


def make_model(*last: nn.Module) -> nn.Sequential:
    """Return a small network with every kind of activation that the table tells apart."""
    return nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 4), nn.ReLU(),
        *last,
    )  # fmt: skip


def make_input(step: int = 0, size: int = 5, device: torch.device | str = "cpu") -> Tensor:
    """Return another batch for every step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 6, generator=generator).to(device) * (1 + step)


def train(
    model: nn.Module,
    monitor: Monitor | None = None,
    steps: Iterable[int] = range(1),
    optimizer: torch.optim.Optimizer | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Train some steps on :func:`make_input`; without an optimizer nothing moves."""
    for step in steps:
        model.zero_grad()
        model(make_input(step, device=device)).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
        if monitor is not None:
            monitor.step()


@contextmanager
def outputs_of(model: nn.Module) -> Iterator[Values]:
    """Collect the outputs of all modules without children; clear the dict after each step."""
    seen: Values = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.setdefault(name, []).append(
            output.detach().cpu().clone()
        )

    handles = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def grads_of(model: nn.Module) -> Values:
    """Return copies of the gradients."""
    return {
        name: [] if p.grad is None else [p.grad.detach().cpu().clone()]
        for name, p in model.named_parameters()
    }


def weights_of(model: nn.Module) -> Values:
    """Return copies of the parameters."""
    return {name: [p.detach().cpu().clone()] for name, p in model.named_parameters()}


def together(parts: Iterable[Tensor]) -> Tensor:
    """Return all values in one row."""
    rows = [part.reshape(-1) for part in parts]
    return torch.cat(rows) if rows else NOTHING


def check_statistics(
    columns: dict[str, Any], values: Tensor, precision: float = PRECISION[torch.float32]
) -> None:
    """Fail unless ``columns`` are the statistics of ``values``."""
    expected, scales = expected_of(values)
    expected["inf"] = expected.pop("positive_inf") + expected.pop("negative_inf")
    count = expected["count"]
    expected["mean_abs"] = scales["mean_abs"] = expected["l1"] / count if count else math.nan
    for name in STATISTICS:
        actual, wanted = float(columns[name]), expected[name]
        same = actual == wanted or (actual != actual and wanted != wanted)
        close = name in scales and abs(actual - wanted) <= precision * scales[name]
        assert same or close, f"{name}: got {actual!r}, expected {wanted!r}"


def check_part(part: Part, steps: list[Values], precision: float = 1e-6) -> None:
    """Fail unless every row of a part is what was seen, step by step and overall."""
    assert part.names
    for row, name in enumerate(part.names):
        of_steps = [together(step.get(name, [])) for step in steps]
        for i, values in enumerate(of_steps):
            check_statistics(step_of(part, i, name), values, precision)
        overall = {column: part.overall[column][row] for column in part.overall}
        check_statistics(overall, together(of_steps), precision)


def step_of(part: Part, step: int, name: str) -> dict[str, float]:
    """Return the columns of one row in one step."""
    row = part.names.index(name)
    return {column: values[step, row].item() for column, values in part.by_step.items()}


def counts_of(monitor: Monitor, part: str = "activations") -> dict[str, list[float]]:
    """Return how many values every row has had in every step."""
    found = monitor.report().parts[part]
    return dict(zip(found.names, found.by_step["count"].T.tolist(), strict=True))


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return all that the modules of a model hold, hooks included."""
    return [
        {key: dict(value) if isinstance(value, dict) else value for key, value in vars(m).items()}
        for m in model.modules()
    ]
