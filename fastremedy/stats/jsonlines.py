"""A report as JSON lines, one for each monitored step, and as a dictionary.

A line is ``{"step": 120, "activations": {"layer1": {"mean": 0.1, ...}, ...}, ...}``: all that
``pandas.json_normalize`` needs for a table of columns like ``activations.layer1.mean``. Names are
those of ``named_modules()`` and ``named_parameters()``, so that of the model itself is empty. JSON
has no word for NaN or infinity: both are ``null``, and numbers stay numbers to every reader. They
have 7 digits, as float32 has, unless they are integers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..ops.activation_stats import MOMENTS, quantiles
from .report import Part, Report

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
INTEGERS = ("count", "nan", "inf")

Number = int | float


def lines(report: Report, after_step: int = -1) -> Iterator[str]:
    """Yield one JSON object, without line end, for each step of a report behind ``after_step``."""
    for index, step in enumerate(report.steps):
        if step > after_step:
            parts = {
                name: _by_name(part, {key: t[index] for key, t in part.by_step.items()})
                for name, part in report.parts.items()
            }
            yield json.dumps(_short({"step": step, **parts}), allow_nan=False)


def as_dict(report: Report) -> dict[str, Any]:
    """Return the numbers over all steps: ``result["activations"]["layer1"]["mean"]``.

    Unknown numbers are NaN. Rows with a histogram also have ``"quantiles"``, by their ``q``: at
    most 6.1 % off, and since the monitor was attached.
    """
    result: dict[str, Any] = {"steps": list(report.steps), "num_bytes": report.num_bytes}
    for name, part in report.parts.items():
        result[name] = rows = _by_name(part, part.overall)
        if part.histogram is not None:
            for row, values in zip(rows.values(), _quantiles(part.histogram), strict=True):
                row["quantiles"] = dict(zip(QUANTILES, values, strict=True))
    return result


def _by_name(part: Part, columns: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    values = {key: _numbers(key, column) for key, column in columns.items()}
    return {
        name: {key: column[row] for key, column in values.items()}
        for row, name in enumerate(part.names)
    }


def _numbers(key: str, column: Tensor) -> list[Number]:
    numbers: list[Number] = column.tolist()
    if key in INTEGERS:
        return [int(number) if math.isfinite(number) else number for number in numbers]
    return numbers


def _quantiles(histogram: Tensor) -> list[list[float]]:
    # The histogram may reach further back than the extremes in a report: it is not clamped to them.
    moments = histogram.new_zeros(len(histogram), len(MOMENTS), dtype=torch.float64)
    moments[:, MOMENTS.index("min")] = -math.inf
    moments[:, MOMENTS.index("max")] = math.inf
    points = moments.new_tensor(QUANTILES)
    result: list[list[float]] = quantiles(histogram, moments, points).tolist()
    return result


def _short(value: Any) -> Any:
    """Return a value as it is written."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if not isinstance(value, float) or (value.is_integer() and abs(value) < 2**53):
        return value
    return float(f"{value:.7g}") if math.isfinite(value) else None
