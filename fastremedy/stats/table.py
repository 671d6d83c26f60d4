"""A report as a table: one row for each layer, and what ails them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .layers import Layers, title
from .report import Report

VANISHING = 1e-7  # mean magnitude of a gradient, as in SageMaker Debugger
MOST = 0.5  # of units or elements
SLOW, FAST = 1e-5, 1e-1  # update ratios, around the usual 1e-3
NUM_EXAMPLES = 4  # layers that are named for an ailment
NARROWEST = 16  # characters to which a narrow terminal may fold names


def render(report: Report, color: bool | None = None) -> str:
    """Return one row for each layer in model order, and a line for each ailment.

    Moments and shares are those of all steps of the report; norms and ratios are the medians of the
    steps, of all parameters of a layer together, and ``stuck`` is that of the worst parameter. What
    is sick stands behind ``!``. Columns of which nothing is known are left out.

    Args:
        report: of a monitor.
        color: show what is sick in red, and fold long names where a terminal is narrow; by default
            where standard output is a terminal.
    """
    layers = Layers(report)
    shown = columns(layers)
    cells = [[column.cell(row) for column in shown] for row in range(len(layers.names))]
    names = [title(name) for name in layers.names]
    # A ReLU that fuse_ has made part of the BatchNorm before it has nothing to tell.
    known = [row for row, texts in enumerate(cells) if any(texts)] or list(range(len(names)))
    names, cells = [names[row] for row in known], [cells[row] for row in known]
    headings = ["layer", *(column.heading for column in shown)]
    color = sys.stdout.isatty() if color is None else color
    if importlib.util.find_spec("rich") and names:
        table = _with_rich(headings, names, cells, color)
    else:
        table = _plainly(headings, names, cells)
    lines = []
    for column, sick in ailments(layers, shown):
        examples = ", ".join(sick[:NUM_EXAMPLES]) + ", ..." * (len(sick) > NUM_EXAMPLES)
        lines.append(f"! {column.name}, {number_of_layers(len(sick))}: {examples} ({column.rule})")
    held = f"monitor holds {_memory(report.num_bytes)} for {number_of_layers(len(names))}"
    return table + "\n".join([*lines, f"{covered(report)}; {held}"])


def _with_rich(headings: list[str], names: list[str], cells: list[list[str]], color: bool) -> str:
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(headings[0], overflow="fold", vertical="bottom")
    for heading in headings[1:]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, texts in zip(names, cells, strict=True):
        styled = [Text(text, "bold red" if text.startswith("!") else "") for text in texts]
        table.add_row(Text(name), *styled)
    console = Console(force_terminal=color, force_jupyter=False)
    widest = Measurement.get(console, console.options.update(max_width=10**6), table).maximum
    narrowest = widest - max(max(map(len, names)) - NARROWEST, 0)
    console.width = max(console.width, narrowest) if color else widest
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _plainly(headings: list[str], names: list[str], cells: list[list[str]]) -> str:
    flat = [heading.replace("\n", " ") for heading in headings]
    rows = [flat, *([name, *texts] for name, texts in zip(names, cells, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = [
        " ".join([name.ljust(widths[0]), *map(str.rjust, texts, widths[1:])]).rstrip()
        for name, *texts in rows
    ]
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Column:
    """One number of each layer, as text and as a finding."""

    heading: str
    values: list[float]
    write: Callable[[float], str] = "{:.3g}".format
    is_sick: Callable[[float], bool] = lambda value: False
    rule: str = ""  # what a sick layer has

    @property
    def name(self) -> str:
        """The heading on one line."""
        return self.heading.replace("\n", " ")

    def cell(self, row: int) -> str:
        """Return the text, behind ``!`` where the layer is sick, empty where nothing is known."""
        value = self.values[row]
        if value != value:
            return ""
        return "!" * self.is_sick(value) + self.write(value)


def percent(share: float) -> str:
    """Return a share as text, ``0`` only if it is."""
    return f"{share:.1%}" if share else "0"


def columns(layers: Layers) -> list[Column]:
    """Return the columns of which anything is known."""

    def known(part: str, column: str, reduce: str = "sum") -> list[float]:
        values: list[float] = layers.overall(part, column, reduce).tolist()
        return values

    def median(values: Tensor) -> list[float]:
        over_steps = values if len(values) else values.new_full((1, len(layers.names)), torch.nan)
        result: list[float] = over_steps.nanmedian(0).values.tolist()
        return result

    mean_grad = layers.overall("gradients", "l1") / layers.overall("gradients", "count")
    most = f"more than {MOST:.0%} of"
    result = [
        Column("mean", known("activations", "mean")),
        Column("std", known("activations", "std")),
        Column("|max|", known("activations", "amax")),
        Column("zeros", known("activations", "zeros"), percent),
        Column(
            "dead",
            known("activations", "dead"),
            percent,
            lambda share: share > MOST,
            f"{most} the units put out nothing but zeros",
        ),
        Column(
            "saturated",
            known("activations", "saturated"),
            percent,
            lambda share: share > MOST,
            f"{most} the outputs are where the gradient is small",
        ),
        Column(
            "NaN/inf",
            layers.non_finite().tolist(),
            "{:.0f}".format,
            lambda number: number > 0,
            "in activations, gradients or weights",
        ),
        Column("grad\nnorm", median(layers.grad_norm())),
        Column(
            "vanishing",
            mean_grad.tolist(),
            lambda size: f"{size:.1e}" if size < VANISHING else "no",
            lambda size: size < VANISHING,
            f"gradients have a mean magnitude below {VANISHING:g}",
        ),
        Column("weight\nnorm", median(layers.weight_norm())),
        Column(
            "update\nratio",
            median(layers.update_ratio()),
            is_sick=lambda ratio: ratio < SLOW or ratio > FAST,
            rule=f"updates are not {SLOW:g} to {FAST:g} of the weights",
        ),
        Column(
            "stuck",
            known("updates", "stuck", "amax"),
            percent,
            lambda share: share > MOST,
            f"{most} a parameter does not move, in spite of its gradient",
        ),
    ]
    return [column for column in result if _is_worth_showing(column)]


def _is_worth_showing(column: Column) -> bool:
    if column.heading == "NaN/inf":
        return any(value > 0 for value in column.values)
    return any(value == value for value in column.values)


def ailments(layers: Layers, shown: list[Column]) -> list[tuple[Column, list[str]]]:
    """Return the columns that find something, each with the layers that are sick."""
    names = [title(name) for name in layers.names]
    found = [
        (
            column,
            [
                name
                for name, value in zip(names, column.values, strict=True)
                if column.is_sick(value)
            ],
        )
        for column in shown
    ]
    return [(column, sick) for column, sick in found if sick]


def covered(report: Report) -> str:
    """Return which steps a report is about."""
    steps = report.steps
    if not steps:
        return "no step yet"
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {steps[0]} to {steps[-1]}, {len(steps)} monitored"


def number_of_layers(number: int) -> str:
    """Return ``1 layer`` or ``2 layers``."""
    return f"{number} layer" + "s" * (number != 1)


def _memory(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size >= 1024:
            size, unit = size / 1024, larger
    return f"{size:.3g} {unit}"
