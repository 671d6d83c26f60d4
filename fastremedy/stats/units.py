"""From numbers of the units (channels, neurons) of layers to numbers of the layers, on the host.

Steps leave numbers of units as they come, since every small operation takes as long as a layer's
statistics; many steps at once are summed up here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .courier import Parcel

UNIT_SUMS = (
    "layer",  # row of the layer
    "units",  # with finite values; mean, between and within are theirs
    "count",  # of their values
    "mean",
    "between",  # sum over units of the squared distance of their mean from that of the layer
    "within",  # sum over units of their variances
    "zeros",
    "dead",  # units whose values were all zero
    "nonfinite",  # units with values that are not finite
)


def layout_of(layers: Sequence[int], sizes: Sequence[int], numels: Sequence[int]) -> Tensor:
    """Return where units belong, int64 ``[runs, 3]``.

    ``sizes[i]`` units in a row belong to ``layers[i]``, with ``numels[i]`` values each if that is
    known. A layer may come several times.
    """
    return torch.tensor([layers, sizes, numels], dtype=torch.int64, device="cpu").T


def sums_of_fused(layout: Tensor, saved: Tensor, dead: Tensor) -> Tensor:
    """Return :data:`UNIT_SUMS` ``[steps, layers, 9]``, from what BatchNormReLU measures.

    Args:
        layout: of U units.
        saved: ``[steps, 4, U]``, first the means and last the variances.
        dead: number of values that are not positive, ``[steps, U]``.
    """
    mean, var = saved[:, 0].double(), saved[:, 3].double()
    count = layout[:, 2].repeat_interleave(layout[:, 1]).double().expand_as(mean)
    zeros = dead.double()
    mean, var = (torch.where(count > 0, values, 0.0) for values in (mean, var))
    if len(layout[:, 0].unique()) < len(layout):
        layout, count, mean, var, zeros = _merge_calls(layout, count, mean, var, zeros)
    return _sums(layout, count, mean, var, zeros, ~var.isfinite() & (count > 0))


def _merge_calls(
    layout: Tensor, count: Tensor, mean: Tensor, var: Tensor, zeros: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return all of them with every unit once, of layers that were called several times."""
    layers, places = layout[:, 0].unique(return_inverse=True)
    sizes = layout.new_zeros(len(layers)).index_copy_(0, places, layout[:, 1])
    first = (sizes.cumsum(0) - sizes)[places].tolist()
    runs = zip(first, layout[:, 1].tolist(), strict=True)
    unit = torch.cat([torch.arange(start, start + size, device="cpu") for start, size in runs])

    def added(values: Tensor) -> Tensor:
        return values.new_zeros(len(values), int(sizes.sum())).index_add_(1, unit, values)

    total = added(count)
    middle = added(count * mean) / total
    square = var + (mean - middle[:, unit]).square()
    merged = torch.stack([layers, sizes, torch.zeros_like(sizes)], 1)
    return merged, total, middle, added(count * square) / total, added(zeros)


def sums_of_units(layout: Tensor, statistics: Tensor) -> Tensor:
    """Return :data:`UNIT_SUMS` ``[steps, layers, 9]``, from statistics of every unit.

    Args:
        layout: of U units.
        statistics: count, mean, m2 and the counts of the operator, ``[steps, 8, U]``.
    """
    count, mean, m2, zeros = statistics[:, :4].unbind(1)
    var = torch.where(count > 0, m2 / count, 0.0)
    return _sums(layout, count, mean, var, zeros, statistics[:, 5:].sum(1) > 0)


def _sums(
    layout: Tensor, count: Tensor, mean: Tensor, var: Tensor, zeros: Tensor, nonfinite: Tensor
) -> Tensor:
    layers, places = layout[:, 0].unique(return_inverse=True)
    index = places.repeat_interleave(layout[:, 1])
    dead = (zeros == count) & (count > 0)
    finite = (~nonfinite & (count > 0)).double()
    mean, var = torch.where(nonfinite, 0.0, mean), torch.where(nonfinite, 0.0, var)
    each = [finite, count * finite, mean, zeros, dead.double(), nonfinite.double(), var]
    added = mean.new_zeros(len(mean), len(layers), len(each))
    added.index_add_(1, index, torch.stack(each, -1))
    units, values, total, num_zeros, num_dead, num_nonfinite, within = added.unbind(-1)
    middle = total / units
    distance = (mean - middle[:, index]).square() * finite
    between = torch.zeros_like(middle).index_add_(1, index, distance)
    totals = [units, values, middle, between, within, num_zeros, num_dead, num_nonfinite]
    return torch.stack([layers.double().expand_as(units), *totals], -1)


def condense(parcels: Sequence[Parcel]) -> list[Parcel]:
    """Return what parcels hold, with :data:`UNIT_SUMS` in place of the numbers of units."""
    condensed: list[Parcel] = []
    alike: dict[tuple[str, str, int], list[int]] = {}  # parcels whose units have one layout
    for i, parcel in enumerate(parcels):
        condensed.append({})
        for (what, where), value in parcel.items():
            kind, _, detail = what.partition(" ")
            if kind not in ("fused", "units"):
                condensed[i][what, where] = value
            elif detail == "layout":
                alike.setdefault((kind, where, id(value)), []).append(i)
    for (kind, where, _), members in alike.items():

        def steps(
            detail: str, kind: str = kind, where: str = where, members: list[int] = members
        ) -> Tensor:
            return torch.stack([parcels[i][f"{kind} {detail}", where] for i in members])

        layout = parcels[members[0]][f"{kind} layout", where]
        if kind == "fused":
            sums = sums_of_fused(layout, steps("saved"), steps("dead"))
        else:
            sums = sums_of_units(layout, steps("each"))
        for i, row in zip(members, sums, strict=True):
            condensed[i][kind, where] = row.clone()
    return condensed
