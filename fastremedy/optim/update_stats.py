"""What the last step of an optimizer did to every parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.adamw import UPDATE_STATS
from ..ops.table import Rows


@dataclass(frozen=True)
class UpdateStats:
    """What a step did to every parameter: float64 ``[P]`` each, on the first one's device.

    NaN where a parameter had no gradient, or the step was skipped.
    """

    params: list[Tensor]
    grad_norm: Tensor  # without the loss scale, before max_grad_norm
    weight_norm: Tensor  # before the step
    update_norm: Tensor
    ratio: Tensor  # update_norm / weight_norm
    moved: Tensor  # share of the elements that changed
    stuck: Tensor  # share of the elements that did not, though their gradient is not zero


class RawUpdateStats(NamedTuple):
    """What kernels leave of the parameters of one device."""

    rows: Rows
    sums: Tensor  # float64 [P, len(UPDATE_STATS)]


def room_for_stats(rows: Rows) -> Tensor:
    """Return sums that say that nothing is known."""
    size = (len(rows.owners), len(UPDATE_STATS))
    return torch.full(size, torch.nan, dtype=torch.float64, device=rows.device)


def resolve(raws: list[RawUpdateStats]) -> UpdateStats:
    """Return what the sums of all devices say."""
    device = raws[0].sums.device
    sums = torch.cat([raw.sums.to(device) for raw in raws])
    numels = [param.numel() for raw in raws for param in raw.rows.columns.params]
    numel = torch.tensor(numels, dtype=torch.float64, device=device)
    params = [owner for raw in raws for owner in raw.rows.owners]
    return UpdateStats(params, *columns_of(sums, numel))


def columns_of(sums: Tensor, numel: Tensor) -> tuple[Tensor, ...]:
    """Return the fields of :class:`UpdateStats` from sums ``[*, P, 5]`` and sizes ``[P]``."""
    grad_norm, weight_norm, update_norm = sums[..., :3].sqrt().unbind(-1)
    moved, stuck = (sums[..., 3:] / numel[:, None]).unbind(-1)
    return grad_norm, weight_norm, update_norm, update_norm / weight_norm, moved, stuck
