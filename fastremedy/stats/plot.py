"""A report as a picture: layers from input to output against steps."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .layers import Layers, title
from .report import Report
from .table import ailments, columns, covered, number_of_layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNKNOWN = "#d9d9d9"
NON_FINITE = "#e6002d"  # on none of the colour maps
RATIO_RANGE = (1e-6, 1.0)  # around the usual 1e-3
LEAST_DECADES, MOST_DECADES = 4.0, 12.0  # a scale never makes much of little, nor hides much
MAX_COLUMNS = 150  # further steps are joined: one with NaN is 3 pixels wide
LONGEST_LABEL = 36  # characters


@dataclass(frozen=True)
class Panel:
    """A heat map of rows of ``values`` ``[steps, layers]``, red where ``non_finite``."""

    heading: str
    rows: list[int]
    values: Tensor
    non_finite: Tensor
    limits: tuple[float, float]
    color_map: str = "viridis"
    is_log: bool = True


def draw(report: Report, path: str | os.PathLike[str]) -> None:
    """Draw activations and updates of layers (rows, input on top) against steps.

    Grey is unknown and red has NaN or infinity. Between full steps the standard deviation of
    outputs that fused modules do not show is that of the last one. The colour maps are fit for the
    colour-blind.

    Args:
        report: of a monitor.
        path: to write to; its suffix says in which format.

    Raises:
        ModuleNotFoundError: Matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        reason = f"{error}: pip install 'fastremedy[stats]'"
        raise ModuleNotFoundError(reason, name=error.name) from error

    layers = Layers(report)
    panels = [*_activations(layers), *_updates(layers)] if report.steps else []
    num_rows = max((len(panel.rows) for panel in panels), default=0)
    height = min(2.4 + 0.16 * max(num_rows, 8), 16.0)
    labels = [
        [] if index and panels[index - 1].rows == panel.rows else _labels(layers, panel.rows)
        for index, panel in enumerate(panels)
    ]
    longest = sum(max(map(len, names), default=0) for names in labels)
    width = 1 + 3 * max(len(panels), 1) + 0.06 * longest  # inches, as everywhere
    figure = Figure(figsize=(width, height), layout="constrained")
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        _draw_panel(axes, report.steps, panel, height)
        _label_rows(axes, labels[index], height)
    figure.suptitle(_headline(report, layers), fontsize=11)
    _add_legend(figure, panels)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _activations(layers: Layers) -> list[Panel]:
    def known(column: str) -> Tensor:
        return layers.reduce("activations", layers.by_step("activations", column))

    non_finite = _non_finite(layers, "activations")
    counts = known("count")
    std = _held(known("std"), counts > 0)
    idle = torch.fmax(known("dead"), known("saturated"))
    heading = "dead or saturated share"
    if idle.isnan().all():
        idle, heading = known("zeros"), "share of zeros"
    # Layers that were never called have nothing to show, as those that fuse_ has fused away.
    rows = [row for row in layers.rows_of("activations") if not (counts[:, row] == 0).all()]
    can_idle = [row for row in rows if not idle[:, row].isnan().all()]
    return _worth_drawing(
        Panel("std of activations", rows, std, non_finite, _log_limits(std)),
        Panel(heading, can_idle, idle, non_finite, (0.0, 1.0), is_log=False),
    )


def _held(values: Tensor, was_called: Tensor) -> Tensor:
    """Return values ``[steps, layers]``; one that was not read is that of the last full step."""
    steps = torch.arange(len(values), device=values.device).unsqueeze(1)
    last = torch.where(values.isnan(), -1, steps).cummax(0).values
    held = values.gather(0, last.clamp(min=0)).where(last >= 0, torch.nan)
    return held.where(was_called, values)


def _updates(layers: Layers) -> list[Panel]:
    rows = layers.rows_of("gradients", "updates")
    norm, ratio = layers.grad_norm(), layers.update_ratio()
    non_finite = _non_finite(layers, "gradients")
    heading = "update ratio, usually 0.001"
    return _worth_drawing(
        Panel("norm of gradients", rows, norm, non_finite, _log_limits(norm)),
        Panel(heading, rows, ratio, torch.zeros_like(non_finite), RATIO_RANGE, "PuOr_r"),
    )


def _worth_drawing(*panels: Panel) -> list[Panel]:
    def is_known(panel: Panel) -> bool:
        known = ~panel.values.isnan() | panel.non_finite
        return bool(known[:, panel.rows].any())

    return [panel for panel in panels if is_known(panel)]


def _non_finite(layers: Layers, part: str) -> Tensor:
    found = (layers.by_step(part, "nan") > 0) | (layers.by_step(part, "inf") > 0)
    return layers.reduce(part, found.double()) > 0


def _log_limits(values: Tensor) -> tuple[float, float]:
    """Return the ends of a scale of at least 4 decades, at most 12 around the median."""
    exponents = values[(values > 0) & values.isfinite()].log10()
    if not len(exponents):
        return 10 ** (-LEAST_DECADES / 2), 10 ** (LEAST_DECADES / 2)
    median = exponents.median().item()
    low = max(exponents.min().item(), median - MOST_DECADES / 2)
    high = min(exponents.max().item(), median + MOST_DECADES / 2)
    missing = max(LEAST_DECADES - (high - low), 0.0)
    return 10 ** (low - missing / 2), 10 ** (high + missing / 2)


def _join_steps(panel: Panel, num: int) -> tuple[Tensor, Tensor]:
    """Return values and non-finite ones ``[ceil(steps / num), layers]`` of so many steps each."""
    values = panel.values.log10() if panel.is_log else panel.values
    joined = torch.stack([group.nanmean(0) for group in values.split(num)])
    non_finite = torch.stack([group.any(0) for group in panel.non_finite.split(num)])
    return 10**joined if panel.is_log else joined, non_finite


def _draw_panel(axes: Axes, steps: list[int], panel: Panel, height: float) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize, to_rgba
    from matplotlib.ticker import MaxNLocator

    num = math.ceil(len(steps) / MAX_COLUMNS)
    values, non_finite = (result[:, panel.rows].T for result in _join_steps(panel, num))
    low, high = panel.limits
    norm = (LogNorm if panel.is_log else Normalize)(low, high)
    colors = ScalarMappable(norm, colormaps[panel.color_map])
    rgba = colors.to_rgba(values.clamp(low, high).numpy())
    rgba[values.isnan().numpy()] = to_rgba(UNKNOWN)
    rgba[non_finite.numpy()] = to_rgba(NON_FINITE)
    axes.pcolormesh(_borders(steps, num), range(len(panel.rows) + 1), rgba, rasterized=True)
    axes.invert_yaxis()
    axes.set_xlabel("step")
    if len(steps) < 5:
        axes.set_xticks(steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    below, above = bool((values < low).any()), bool((values > high).any())
    extend = {(True, True): "both", (True, False): "min", (False, True): "max"}
    bar = axes.figure.colorbar(
        colors,
        ax=axes,
        location="top",
        fraction=0.5 / height,
        pad=0.2 / height,
        aspect=20,
        extend=extend.get((below, above), "neither"),
    )
    bar.set_label(panel.heading)


def _borders(steps: list[int], num: int) -> list[float]:
    """Return the ends of columns of ``num`` steps each, halfway between neighbours."""
    halves = [(after - before) / 2 for before, after in itertools.pairwise(steps)] or [0.5]
    inner = [steps[i] - halves[i - 1] for i in range(num, len(steps), num)]
    return [steps[0] - halves[0], *inner, steps[-1] + halves[-1]]


def _labels(layers: Layers, rows: list[int]) -> list[str]:
    names = [title(layers.names[row]) for row in rows]
    return [
        name if len(name) <= LONGEST_LABEL else "..." + name[3 - LONGEST_LABEL :] for name in names
    ]


def _label_rows(axes: Axes, labels: list[str], height: float) -> None:
    every = max(math.ceil(len(labels) * 0.13 / (height - 2)), 1)  # 0.13 inches a label
    places = [row + 0.5 for row in range(0, len(labels), every)]
    # Names may have dollar signs.
    axes.set_yticks(places, labels[::every], fontsize=7, parse_math=False)


def _headline(report: Report, layers: Layers) -> str:
    found = [
        f"{column.name}: {number_of_layers(len(sick))}"
        for column, sick in ailments(layers, columns(layers))
    ]
    ill = ", ".join(found) or "nothing stands out"
    return f"{number_of_layers(len(layers.names))}, {covered(report)}\n{ill}"


def _add_legend(figure: Figure, panels: list[Panel]) -> None:
    from matplotlib.patches import Patch

    handles = []
    if any(panel.non_finite[:, panel.rows].any() for panel in panels):
        handles.append(Patch(color=NON_FINITE, label="NaN or infinite values"))
    if any(panel.values[:, panel.rows].isnan().any() for panel in panels):
        handles.append(Patch(color=UNKNOWN, label="unknown"))
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
