"""A report in TensorBoard: the last scalars, and histograms of what came since those before."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ops.activation_stats import FIRST_NON_FINITE_BUCKET, NUM_BUCKETS
from .layers import title
from .report import Report

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

MAX_LIMITS = 512  # of a histogram, as in torch's add_histogram; a normal distribution takes 400


def write(
    report: Report, writer: SummaryWriter, step: int, previous: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Write ``activations/layer1/mean`` and the like, and histograms under ``activations/layer1``.

    Scalars are the last that are known: not every step knows everything. Numbers that never were
    are left out, and so are histograms without any value. The sum of a histogram is that of the
    middles of its buckets: at most 6.3 % off where all values have one sign.

    Args:
        report: of a monitor.
        writer: to write to.
        step: to write at.
        previous: histograms of each part that were written already; empty at first.

    Returns:
        ``previous`` of the next call.
    """
    written = {}
    for part_name, part in report.parts.items():
        tags = [f"{part_name}/{title(name)}" for name in part.names]
        for column, values in part.by_step.items() if report.steps else ():
            for tag, value in zip(tags, _last_known(values).tolist(), strict=True):
                if not math.isnan(value):
                    writer.add_scalar(f"{tag}/{column}", value, step)
        if part.histogram is not None:
            written[part_name] = part.histogram
            new = part.histogram - previous.get(part_name, 0)
            for tag, cells in zip(tags, _in_order(new), strict=True):
                if cells.any():
                    _write_histogram(writer, tag, cells, step)
    return written


def _last_known(values: Tensor) -> Tensor:
    """Return the last row of ``[steps, rows]`` that is known of each; NaN if none is."""
    steps = torch.arange(len(values), device=values.device)[:, None]
    last = torch.where(values.isnan(), -1, steps).amax(0)
    return values[
        last, torch.arange(values.shape[1], device=values.device)
    ]  # -1: the last one, which is NaN


def _in_order(histogram: Tensor) -> Tensor:
    """Return counts ``[R, 4079]`` from the lowest values to the highest.

    Zeros of both signs share the cell in the middle with numbers too small to be normal.
    """
    negative = histogram[:, NUM_BUCKETS // 2 :][:, :FIRST_NON_FINITE_BUCKET]
    positive = histogram[:, :FIRST_NON_FINITE_BUCKET]
    zeros = negative[:, :1] + positive[:, :1]
    return torch.cat([negative[:, 1:].flip(1), zeros, positive[:, 1:]], 1)


def _edges() -> Tensor:
    """Return the 4080 edges of the cells, exact in float64."""
    bits = torch.arange(1, FIRST_NON_FINITE_BUCKET + 1, device="cpu") << 20
    edges = bits.int().view(torch.float32).double()
    edges[-1] = torch.finfo(torch.float32).max
    return torch.cat([-edges.flip(0), edges])


EDGES = _edges()


def _join(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Return limits ``[L + 1]`` and counts ``[L]``, empty neighbours joined.

    Where that leaves too many, so are 2, 4 or 8 neighbours of one sign: octaves have 512 limits.
    """
    cumulative = torch.cat([cells.new_zeros(1), cells.cumsum(0)])
    magnitude = torch.arange(1, FIRST_NON_FINITE_BUCKET + 1, device="cpu")
    stride = 1
    while True:
        keep = (magnitude % stride == 0) | (magnitude == 1)
        places = torch.cat([keep.flip(0), keep]).nonzero().squeeze(1)
        occupied = cumulative[places].diff() > 0
        no = occupied.new_zeros(1)
        places = places[torch.cat([no, occupied]) | torch.cat([occupied, no])]
        if len(places) <= MAX_LIMITS:
            return EDGES[places], cumulative[places].diff()
        stride *= 2


def _write_histogram(writer: SummaryWriter, tag: str, cells: Tensor, step: int) -> None:
    limits, counts = _join(cells)
    middles = (EDGES[:-1] + EDGES[1:]) / 2
    writer.add_histogram_raw(
        tag,
        # TensorBoard takes these as the outer edges of the outer buckets.
        min=limits[0].item(),
        max=limits[-1].item(),
        num=int(cells.sum()),
        sum=(cells * middles).sum().item(),
        sum_squares=(cells * middles.square()).sum().item(),
        bucket_limits=limits.tolist(),
        bucket_counts=[0, *counts.tolist()],  # up to each limit
        global_step=step,
    )
