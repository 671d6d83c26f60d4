"""Reports of a monitor made by hand, for tests of what reads them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastremedy.stats.report import COLUMNS, Part, Report

ODD_NAMES = ["", "a b", "x$^{", "[bold]", "ünï", "new\nline", "a/b", "!", "%s{0}", "\x1b[31m"]
STEPS = [0, 10, 20]


def make_part(
    kind: str,
    names: list[str],
    num_steps: int = len(STEPS),
    histogram: Tensor | None = None,
    **numbers: Any,
) -> Part:
    """Columns of ``numbers``, NaN where none are given; those of a step are those overall."""
    overall = {
        column: torch.as_tensor(numbers.get(column, math.nan)).double().expand(len(names)).clone()
        for column in COLUMNS[kind]
    }
    by_step = {column: values.repeat(num_steps, 1) for column, values in overall.items()}
    return Part(names, by_step, overall, histogram)


def make_report(num_layers: int = 3, steps: list[int] = STEPS) -> Report:
    """Healthy layers with a weight and a bias each."""
    layers = [f"blocks.{i}.fc" for i in range(num_layers)]
    params = [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    num = len(steps)
    activations = make_part(
        "activations",
        layers,
        num,
        **{"count": 640, "mean": 0.25, "std": 1.5, "amax": 6.0, "zeros": 0.5, "dead": 0.125},
        **{"nan": 0, "inf": 0},
    )
    gradients = make_part(
        "gradients", params, num, count=64, l1=6.4, l2=3.0, mean_abs=0.1, nan=0, inf=0
    )
    weights = make_part("weights", params, num, count=64, l2=4.0, nan=0, inf=0)
    updates = make_part(
        "updates", params, num, grad_norm=3.0, weight_norm=4.0, update_norm=0.004, stuck=0.0
    )
    parts = {
        "activations": activations,
        "gradients": gradients,
        "weights": weights,
        "updates": updates,
    }
    return Report(steps, parts, 1258291)


def plant(report: Report, kind: str, row: int, **numbers: float) -> None:
    for column, number in numbers.items():
        report.parts[kind].overall[column][row] = number
        report.parts[kind].by_step[column][:, row] = number


def unknown_report() -> Report:
    names = {kind: ["fc"] if kind == "activations" else ["fc.weight"] for kind in COLUMNS}
    return Report(STEPS, {kind: make_part(kind, names[kind]) for kind in COLUMNS}, 0)


POOR_REPORTS = {
    "nothing": Report([]),
    "no parts": Report(STEPS),
    "no rows": Report(STEPS, {kind: make_part(kind, []) for kind in COLUMNS}),
    "no steps": make_report(steps=[]),
    "all unknown": unknown_report(),
    **{f"only {kind}": Report(STEPS, {kind: make_report().parts[kind]}) for kind in COLUMNS},
    "odd names": Report(STEPS, {"activations": make_part("activations", ODD_NAMES, std=1.0)}),
    "infinite": Report(STEPS, {"updates": make_part("updates", ["w"], ratio=math.inf)}),
    "one step": make_report(1, [7]),
}
