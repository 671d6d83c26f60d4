"""Numbers of all ranks together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.activation_stats import MOMENTS, merge

Numbers = dict[str, Tensor]


def over_ranks(steps: list[int], numbers: Numbers, is_split: Numbers, group: Any) -> Numbers:
    """Return the numbers of all ranks of a group together, the same on all of them.

    Args:
        steps: that the numbers are of, the same on all ranks.
        numbers: ``moments`` ``[S, R, 8]``, ``counts`` ``[S, R, 5]``, ``dead`` and ``diversity``
            ``[S, L]``, ``updates`` ``[S, P, 5]``, ``saturated`` ``[S, L, 2]``, ``histogram``
            ``[R, B]``; NaN where a rank knows nothing.
        is_split: which ``rows`` ``[R]`` and ``params`` ``[P]`` every rank has a part of; of others
            every rank has a copy, and its own numbers are those of all.
        group: the ranks.

    Raises:
        RuntimeError: ranks have monitored other steps.
    """
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (steps, numbers), group=group)
    for rank, (their_steps, _) in enumerate(gathered):
        if their_steps != steps:
            raise RuntimeError(
                f"ranks must have monitored the same steps, got {len(steps)} up to {steps[-1:]} "
                f"here and {len(their_steps)} up to {their_steps[-1:]} on rank {rank}"
            )
    every = {name: torch.stack([theirs[name] for _, theirs in gathered]) for name in numbers}
    moments = every["moments"][0].reshape(-1, len(MOMENTS))
    for other in every["moments"][1:]:
        moments = merge(moments, other.reshape(-1, len(MOMENTS)))
    rows, params = is_split["rows"][:, None], is_split["params"][:, None]
    return {
        "moments": torch.where(rows, moments.view_as(numbers["moments"]), numbers["moments"]),
        "counts": torch.where(rows, _sum(every["counts"]), numbers["counts"]),
        "dead": least_known(every["dead"]),  # a unit that is dead everywhere is dead on any rank
        "diversity": every["diversity"].nanmean(0),
        "updates": torch.where(params, _sum(every["updates"]), numbers["updates"]),
        "saturated": _sum(every["saturated"]),
        "histogram": torch.where(rows, every["histogram"].sum(0), numbers["histogram"]),
    }


def _sum(values: Tensor) -> Tensor:
    """Return sums over the first dimension of what is known; NaN if nothing is."""
    return torch.where(values.isnan().all(0), torch.nan, values.nansum(0))


def least_known(values: Tensor) -> Tensor:
    """Return the least of what is known in the first dimension; NaN if nothing is."""
    known = torch.where(values.isnan(), torch.inf, values)
    least = torch.cat([known, known.new_full((1, *known.shape[1:]), torch.inf)]).amin(0)
    return torch.where(least.isinf(), torch.nan, least)
