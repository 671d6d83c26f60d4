"""The layers of a report: modules, with what is known of their parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from .report import COLUMNS, Report


def title(name: str) -> str:
    """Return a layer's name as it is shown: on one line, and never empty."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    return shown or "(model)"


class Layers:
    """Modules in model order; what is known of a layer's parameters is taken together.

    A parameter belongs to the module that its name starts with. Modules that have parameters but
    no activations follow the one whose parameters come before.
    """

    def __init__(self, report: Report) -> None:
        """Find the layers of all parts."""
        self.names: list[str] = []
        self._parts = report.parts
        self._num_steps = len(report.steps)
        owners: dict[str, list[str]] = {}
        for part in COLUMNS:
            rows = report.parts[part].names if part in report.parts else []
            is_module = part == "activations"
            owners[part] = [name if is_module else name.rpartition(".")[0] for name in rows]
            place = 0
            for name in owners[part]:
                if name not in self.names:
                    self.names.insert(place, name)
                place = self.names.index(name) + 1
        places = {name: place for place, name in enumerate(self.names)}
        self._layer_of_row = {
            part: torch.tensor([places[name] for name in names], dtype=torch.int64, device="cpu")
            for part, names in owners.items()
        }

    def rows_of(self, *parts: str) -> list[int]:
        """Return which layers have rows in any of the parts."""
        return sorted({place for part in parts for place in self._layer_of_row[part].tolist()})

    def overall(self, part: str, column: str, reduce: str = "sum") -> Tensor:
        """Return a column over all steps ``[layers]``, NaN where it is unknown."""
        known = part in self._parts
        values = (
            self._parts[part].overall[column]
            if known
            else torch.empty(0, dtype=torch.float64, device="cpu")
        )
        return self.reduce(part, values, reduce)

    def by_step(self, part: str, column: str) -> Tensor:
        """Return a column of every row ``[steps, rows]``."""
        if part in self._parts:
            return self._parts[part].by_step[column]
        return torch.empty(self._num_steps, 0, dtype=torch.float64, device="cpu")

    def reduce(self, part: str, values: Tensor, reduce: str = "sum") -> Tensor:
        """Reduce what is known of the rows ``[*, rows]`` of each layer: ``[*, layers]``."""
        neutral = 0.0 if reduce == "sum" else float("-inf")
        known = ~values.isnan()
        index = self._layer_of_row[part].expand(values.shape)
        zero = values.new_zeros(*values.shape[:-1], len(self.names))
        num_known = zero.scatter_add(-1, index, known.double())
        filled = torch.where(known, values, neutral)
        result = (zero + neutral).scatter_reduce(-1, index, filled, reduce)
        return torch.where(num_known > 0, result, torch.nan)

    def norm(self, part: str, norms: Tensor) -> Tensor:
        """Return the norm of all that rows ``[*, rows]`` of a layer have the norm of."""
        return self.reduce(part, norms.square()).sqrt()

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradients of a layer ``[steps, layers]``."""
        ours = self.norm("updates", self.by_step("updates", "grad_norm"))
        read = self.norm("gradients", self.by_step("gradients", "l2"))
        return torch.where(read.isnan(), ours, read)

    def weight_norm(self) -> Tensor:
        """Return the norm of the parameters of a layer ``[steps, layers]``."""
        ours = self.norm("updates", self.by_step("updates", "weight_norm"))
        read = self.norm("weights", self.by_step("weights", "l2"))
        return torch.where(read.isnan(), ours, read)

    def update_ratio(self) -> Tensor:
        """Return the norm of an update over that of the parameters ``[steps, layers]``."""
        update = self.by_step("updates", "update_norm")
        weight = self.by_step("updates", "weight_norm")
        weight = torch.where(update.isnan(), torch.nan, weight)
        return self.norm("updates", update) / self.norm("updates", weight)

    def non_finite(self) -> Tensor:
        """Return how many values of any kind were NaN or infinite ``[layers]``."""
        numbers = [
            self.overall(part, name)
            for part in ("activations", "gradients", "weights")
            for name in ("nan", "inf")
        ]
        total = torch.stack(numbers)
        return torch.where(total.isnan().all(0), torch.nan, total.nansum(0))
