"""The host side of a monitor: what the last steps have left, and the report on them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops.activation_stats import COUNTS, MOMENTS, NUM_BUCKETS, empty_moments, merge
from ..ops.adamw import UPDATE_STATS
from ..ops.shards import is_dtensor, local
from ..optim.update_stats import columns_of
from .courier import Parcel
from .ranks import least_known, over_ranks
from .report import COLUMNS, STATISTICS, Part, Report
from .selection import Layer, Parameter
from .statistics import summarize
from .units import UNIT_SUMS, condense

_TOGETHER = 32  # steps that are condensed at a time
_EDGE = 15 / 16  # outputs of a sigmoid or tanh beyond it count as saturated


@dataclass(frozen=True)
class Rows:
    """Where the numbers of layers and parameters stand in the statistics of a step."""

    layers: list[Layer]
    params: list[Parameter]
    gradients: bool
    weights: bool

    @property
    def first_gradient(self) -> int:
        """Row of the gradient of the first parameter."""
        return len(self.layers)

    @property
    def first_weight(self) -> int:
        """Row of the first parameter."""
        return self.first_gradient + len(self.params) * self.gradients

    @property
    def count(self) -> int:
        """Number of rows."""
        return self.first_weight + len(self.params) * self.weights

    @property
    def saturating(self) -> list[int]:
        """Layers whose outputs saturate."""
        return [row for row, layer in enumerate(self.layers) if layer.kind is not None]


@dataclass(frozen=True)
class _Step:
    """The numbers of a step, as float64; NaN where nothing is known."""

    moments: Tensor  # [rows, 8]
    counts: Tensor  # [rows, 5]
    dead: Tensor  # [layers]
    diversity: Tensor  # [layers]
    updates: Tensor  # [params, 5]
    saturated: Tensor  # [layers, 2]: number of saturated and of all values since a full step


class History:
    """What the last steps have left; older ones are forgotten."""

    def __init__(self, rows: Rows, capacity: int) -> None:
        """Nothing has come in yet."""
        self.rows = rows
        self._kept: deque[tuple[int, Parcel]] = deque(maxlen=capacity)
        self._fresh: list[tuple[int, Parcel]] = []
        self._largest = 0  # bytes of what a step has left, before it is condensed
        self._saturated_before: dict[str, Tensor] = {}

    def add(self, arrived: Iterable[tuple[int, Parcel]]) -> None:
        """Keep what steps have left."""
        self._fresh.extend(arrived)
        if len(self._fresh) >= _TOGETHER:
            self._condense()

    @property
    def num_bytes(self) -> int:
        """Memory of what is kept, once there are as many steps as are kept at most."""
        self._condense()
        kept = max((_bytes_of(kept) for _, kept in self._kept), default=0)
        return kept * (self._kept.maxlen or 0) + self._largest * _TOGETHER

    def _condense(self) -> None:
        """Keep numbers of layers instead of those of their units and buckets."""
        self._largest = max([self._largest, *(_bytes_of(parcel) for _, parcel in self._fresh)])
        condensed = condense([parcel for _, parcel in self._fresh])
        for (step, _), kept in zip(self._fresh, condensed, strict=True):
            for key, value in kept.items():
                what, where = key
                if what == "histogram":  # of all steps so far
                    saturated = self._saturated(value)
                    kept[key] = saturated - self._saturated_before.get(where, 0.0)
                    self._saturated_before[where] = saturated
            self._kept.append((step, kept))
        self._fresh = []

    def report(
        self, parts: Iterable[str], histogram: Tensor, num_bytes: int, group: Any | None = None
    ) -> Report:
        """Return what is known of these parts, of all ranks of a group together if there is one."""
        self._condense()
        rows = self.rows
        numbers = self._numbers(histogram)
        kept = [step for step, _ in self._kept]
        if group is not None:
            numbers = over_ranks(kept, numbers, self._is_split(), group)
        spans = {
            "activations": (0, [layer.name for layer in rows.layers]),
            "gradients": (rows.first_gradient, [param.name for param in rows.params]),
            "weights": (rows.first_weight, [param.name for param in rows.params]),
        }
        report = Report(kept, {}, num_bytes)
        for name in parts:
            if name == "updates":
                # Shards are parts of a parameter; those of all ranks are the whole.
                params = [p.tensor if group is not None else local(p.tensor) for p in rows.params]
                numels = torch.tensor([param.numel() for param in params], device="cpu").double()
                columns = columns_of(numbers["updates"], numels)
                by_step = dict(zip(COLUMNS[name], columns, strict=True))
                overall = {column: _median(values) for column, values in by_step.items()}
                report.parts[name] = Part([p.name for p in rows.params], by_step, overall)
                continue
            first, names = spans[name]
            span = slice(first, first + len(names))
            moments, counts = numbers["moments"][:, span], numbers["counts"][:, span]
            by_step = _columns(moments, counts)
            overall = _overall(moments, counts)
            if name == "activations":
                _add_units(numbers, by_step, overall)
            report.parts[name] = Part(names, by_step, overall, numbers["histogram"][span])
        return report

    def _numbers(self, histogram: Tensor) -> dict[str, Tensor]:
        """Return the numbers of all steps ``[S, *]``, and the histograms of rows."""
        num_rows, num_layers, num_params = (
            max(1, self.rows.count),
            len(self.rows.layers),
            len(self.rows.params),
        )
        shapes = {
            "moments": (num_rows, len(MOMENTS)),
            "counts": (num_rows, len(COUNTS)),
            "dead": (num_layers,),
            "diversity": (num_layers,),
            "updates": (num_params, len(UPDATE_STATS)),
            "saturated": (num_layers, 2),
        }
        steps = [self._step(kept) for _, kept in self._kept]
        numbers = {
            name: torch.stack([getattr(step, name) for step in steps])
            if steps
            else torch.zeros(0, *shape, dtype=torch.float64, device="cpu")
            for name, shape in shapes.items()
        }
        return {**numbers, "histogram": histogram}

    def _is_split(self) -> dict[str, Tensor]:
        """Return which rows and parameters differ from rank to rank: outputs, and local shards."""
        params = [is_dtensor(param.tensor) for param in self.rows.params]
        each_part = params * (self.rows.gradients + self.rows.weights)
        rows = [True] * len(self.rows.layers) + each_part
        return {
            "rows": torch.tensor(rows or [True], device="cpu"),
            "params": torch.tensor(params, dtype=torch.bool, device="cpu"),
        }

    def _step(self, kept: Parcel) -> _Step:
        rows, num_layers = self.rows, len(self.rows.layers)
        moments = empty_moments(max(1, rows.count), "cpu")
        counts = moments.new_zeros(max(1, rows.count), len(COUNTS))
        dead = moments.new_full((num_layers,), torch.nan)
        diversity = dead.clone()
        saturated = dead.new_full((num_layers, 2), torch.nan)
        updates = dead.new_full((len(rows.params), len(UPDATE_STATS)), torch.nan)
        for (what, where), tensor in kept.items():
            if what == "moments":
                moments[: len(tensor)] = merge(moments[: len(tensor)], tensor)
            elif what == "counts":
                counts[: len(tensor)] += tensor
            elif what == "histogram":
                saturated[rows.saturating] = saturated[rows.saturating].nan_to_num(0.0) + tensor
            elif what in ("fused", "units"):
                layers, sums = tensor[:, 0].long(), tensor[:, 1:]
                if what == "fused":
                    unread = moments[layers, 0] + counts[layers, 2:].sum(1) == 0
                    moments[layers[unread]] = _moments_of_units(sums[unread])
                    self._add_fused_counts(counts, layers[unread], sums[unread])
                dead[layers], diversity[layers] = self._health_of_units(what, layers, sums)
            elif what == "updates":
                _place(updates, kept["update rows", where], tensor)
        for (what, where), tensor in kept.items():  # measured before clipping: these win
            if what == "norms":
                _place(updates[:, :1], kept["norm rows", where], tensor.square()[:, None])
        return _Step(moments, counts, dead, diversity, updates, saturated)

    def _is_relu(self, layers: Tensor) -> Tensor:
        modules = [self.rows.layers[row].module for row in layers.tolist()]
        is_relu = [getattr(module, "activation", "") == "relu" for module in modules]
        return torch.tensor(is_relu, dtype=torch.bool, device="cpu")

    def _add_fused_counts(self, counts: Tensor, layers: Tensor, sums: Tensor) -> None:
        zeros, nonfinite = sums[:, UNIT_SUMS.index("zeros") - 1], sums[:, -1]
        counts[layers, 0] += torch.where(self._is_relu(layers), zeros, torch.nan)
        counts[layers, 1] += torch.where(self._is_relu(layers), 0.0, torch.nan)
        counts[layers, 2] += nonfinite

    def _health_of_units(self, what: str, layers: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
        units, _, _, between, within, _, num_dead, nonfinite = sums.unbind(1)
        dead = num_dead / (units + nonfinite)
        if what == "fused":
            dead = torch.where(self._is_relu(layers), dead, torch.nan)
        return dead, between / (between + within)

    def _saturated(self, histogram: Tensor) -> Tensor:
        """Return the numbers of saturated and of all values, from rows that saturate."""
        buckets = torch.arange(NUM_BUCKETS, dtype=torch.int32, device="cpu")
        lower = (buckets << 20).view(torch.float32)  # of the magnitude, with its sign
        is_saturated = {
            "sigmoid": (lower < 1 - _EDGE) | (lower >= _EDGE),
            "tanh": lower.abs() >= _EDGE,
        }
        kinds = [str(self.rows.layers[row].kind) for row in self.rows.saturating]
        parts = [
            torch.stack([row[is_saturated[kind]].sum(), row.sum()])
            for row, kind in zip(histogram, kinds, strict=True)
        ]
        return torch.stack(parts).double()


def _add_units(
    numbers: dict[str, Tensor], by_step: dict[str, Tensor], overall: dict[str, Tensor]
) -> None:
    """Add the columns that units of layers say."""
    dead, diversity, saturated = (numbers[n] for n in ("dead", "diversity", "saturated"))
    by_step["dead"], by_step["diversity"] = dead, diversity
    # Units that are dead all the time are at most those of any step.
    overall["dead"] = least_known(dead)
    overall["diversity"] = diversity.nanmean(0)
    total = saturated.nansum(0)
    by_step["saturated"] = saturated[..., 0] / saturated[..., 1]
    overall["saturated"] = total[:, 0] / total[:, 1]


def _columns(moments: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return the columns :data:`STATISTICS`."""
    summary = summarize(moments, counts)
    columns = {
        name: getattr(summary, name).double() for name in STATISTICS if hasattr(summary, name)
    }
    columns["mean_abs"] = summary.l1 / moments[..., 0]
    columns["inf"] = (summary.positive_inf + summary.negative_inf).double()
    return {name: columns[name] for name in STATISTICS}


def _moments_of_units(sums: Tensor) -> Tensor:
    """Return moments ``[n, 8]`` of outputs of which units tell the number alone; NaN the rest."""
    moments = sums.new_full((len(sums), len(MOMENTS)), torch.nan)
    moments[:, 0] = sums[:, UNIT_SUMS.index("count") - 1]
    return moments


def _overall(moments: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return the columns of all steps together; moments are of the steps that know them."""
    number = moments[..., 0].sum(0)
    total = torch.where(counts.isnan().all(0), torch.nan, counts.nansum(0))
    nothing = empty_moments(moments.shape[1], moments.device).expand_as(moments)
    is_known = ~moments[..., 1:2].isnan()
    columns = _columns(_merged(torch.where(is_known, moments, nothing)), total)
    shares = {"zeros": total[:, 0] / number, "negatives": total[:, 1] / number}
    return {**columns, "count": number, **shares}


def _merged(moments: Tensor) -> Tensor:
    """Return the moments of all steps ``[S, R, 8]`` together ``[R, 8]``, pair by pair."""
    if len(moments) == 0:
        return empty_moments(moments.shape[1], moments.device)
    while len(moments) > 1:
        half = len(moments) // 2
        pairs = moments[: 2 * half].reshape(half, 2, -1, len(MOMENTS))
        both = merge(pairs[:, 0].reshape(-1, len(MOMENTS)), pairs[:, 1].reshape(-1, len(MOMENTS)))
        moments = torch.cat([both.reshape(half, -1, len(MOMENTS)), moments[2 * half :]])
    return moments[0]


def _bytes_of(kept: Parcel) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def _place(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Write values to the rows that are ours, not those numbered -1."""
    ours = rows >= 0
    target[rows[ours]] = values[ours]


def _median(values: Tensor) -> Tensor:
    """Return medians over the steps that are known; a first step from zero has no finite ratio."""
    empty = values.new_full(values.shape[1:], torch.nan)
    return values.nanmedian(0).values if len(values) else empty
