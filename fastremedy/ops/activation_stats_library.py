"""Operator ``torch.ops.fastremedy.activation_stats_``: schema, fake and implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import activation_stats_dispatch as dispatch

_library = torch.library.Library("fastremedy", "FRAGMENT")
_library.define(
    "activation_stats_(Tensor[] tensors, int[] first_rows, bool per_channel, Tensor? armed, "
    "Tensor(a!) moments, Tensor(b!) counts, Tensor(c!)? histogram) -> ()"
)


def _update(
    tensors: list[Tensor],
    first_rows: list[int],
    per_channel: bool,
    armed: Tensor | None,
    moments: Tensor,
    counts: Tensor,
    histogram: Tensor | None,
) -> None:
    dispatch.update(tensors, first_rows, per_channel, armed, moments, counts, histogram)


def _fake_update(*_: object) -> None:
    pass


_library.impl("activation_stats_", _update, "CompositeExplicitAutograd")
torch.library.register_fake("fastremedy::activation_stats_", _fake_update, lib=_library)
