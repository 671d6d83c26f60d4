"""Layers that are called where no hook runs: in code compiled before a monitor was attached."""

from __future__ import annotations

import sys
import warnings
from collections import Counter

from torch import nn

from .courier import Parcel
from .history import Rows


class Listener:
    """Warns once, in the second step after :meth:`begin`, of layers that call no hooks."""

    def __init__(self, model: nn.Module, rows: Rows) -> None:
        """Listen to nothing yet."""
        self._model = model
        self._rows = rows
        self._listens = False
        self._before: dict[str, float] = {}

    def begin(self) -> None:
        """Wait for two steps with gradients."""
        self._listens = True
        self._before = {}

    def hear(self, arrived: list[tuple[int, Parcel]]) -> None:
        """Look at what steps have left; called by the monitor's ``step``."""
        if not self._listens or not self._model.training:
            return
        for _, parcel in arrived:
            seen, trained = _layers_in(parcel, self._rows)
            if not trained:
                continue
            before, self._before = self._before, trained
            if not before:
                continue
            self._listens = False
            # Gradients that stay the same are old: there was no forward pass.
            silent = [
                name
                for name in trained
                if name not in seen and before.get(name) not in (None, trained[name])
            ]
            if silent and _has_compiled():
                warnings.warn(
                    f"{', '.join(silent)} got gradients, but the monitor saw no outputs of theirs: "
                    "code that was compiled before the monitor was attached tells it nothing. Call "
                    "torch.compiler.reset(), or attach the monitor first",
                    UserWarning,
                    stacklevel=3,
                )
            return


def _has_compiled() -> bool:
    dynamo = sys.modules.get("torch._dynamo.utils")  # importing it takes a second
    return dynamo is not None and dynamo.counters["stats"]["unique_graphs"] > 0


def _layers_in(parcel: Parcel, rows: Rows) -> tuple[set[str], dict[str, float]]:
    """Return layers with outputs, and for those with gradients the sum of their magnitudes.

    Parameters that modules share say nothing of either, as those of the last projection of
    attention, which calls no module for it.
    """
    seen: set[str] = set()
    magnitudes: dict[str, float] = {}
    for (what, _), value in parcel.items():
        if what in ("moments", "counts"):
            outputs = value[: rows.first_gradient]
            found = outputs[:, 0] if what == "moments" else outputs.sum(1)
            seen.update(rows.layers[row].name for row in found.nonzero()[:, 0].tolist())
        if what == "moments":
            grads = value[rows.first_gradient : rows.first_weight]
            for param, (count, *_, l1, _, _) in zip(rows.params, grads.tolist(), strict=False):
                if count > 0:
                    name = param.name.rpartition(".")[0]
                    magnitudes[name] = magnitudes.get(name, 0.0) + l1
        elif what == "fused layout":
            seen.update(rows.layers[row].name for row in value[:, 0].tolist())
    owners = Counter(id(param) for layer in rows.layers for param in layer.module.parameters())
    return seen, {
        layer.name: magnitudes[layer.name]
        for layer in rows.layers
        if layer.name in magnitudes
        and all(owners[id(param)] == 1 for param in layer.module.parameters())
    }
