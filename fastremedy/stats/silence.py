"""Layers that are called where no hook runs: in code compiled before a monitor was attached."""

from __future__ import annotations

import warnings
from collections import Counter

import torch
from torch import nn

from .courier import Parcel
from .history import Rows


class Listener:
    """Warns once after :meth:`begin` if there are layers that do not call their hooks."""

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        """Listen to nothing yet."""
        self._model = model
        self._rows = rows
        self._listens = False

    def begin(self) -> None:
        """Wait for the first step with gradients."""
        self._listens = True

    def hear(self, arrived: list[tuple[int, Parcel]]) -> None:
        """Look at what steps have left; called by the monitor's ``step``."""
        if not self._listens or not self._model.training:
            return
        for _, parcel in arrived:
            seen, trained = _layers_in(parcel, self._rows)
            if not trained:
                continue
            self._listens = False
            silent = [name for name in trained if name not in seen]
            if silent and torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0:
                warnings.warn(
                    f"{', '.join(silent)} got gradients, but the monitor saw no outputs of theirs: "
                    "code that was compiled before the monitor was attached tells it nothing. Call "
                    "torch.compiler.reset(), or attach the monitor first",
                    UserWarning,
                    stacklevel=3,
                )
            return


def _layers_in(parcel: Parcel, rows: Rows) -> tuple[set[str], list[str]]:
    """Return layers with outputs, and those whose parameters have gradients.

    Parameters that modules share say nothing of either, as those of the last projection of
    attention, which calls no module for it.
    """
    seen: set[str] = set()
    trained: set[str] = set()
    for (what, _), value in parcel.items():
        if what in ("moments", "counts"):
            found = value[:, 0] if what == "moments" else value.sum(1)
            places = found.nonzero()[:, 0].tolist()
            seen.update(rows.layers[place].name for place in places if place < rows.first_gradient)
            params = [place - rows.first_gradient for place in places if place < rows.first_weight]
            trained.update(rows.params[row].name.rpartition(".")[0] for row in params if row >= 0)
        elif what == "fused layout":
            seen.update(rows.layers[row].name for row in value[:, 0].tolist())
    layers = [layer for layer in rows.layers if layer.name in trained]
    owners = Counter(id(param) for layer in rows.layers for param in layer.module.parameters())
    return seen, [
        layer.name
        for layer in layers
        if all(owners[id(param)] == 1 for param in layer.module.parameters())
    ]
