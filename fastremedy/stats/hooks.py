"""Hooks that tell a monitor what happens: on modules, and around the steps of optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from ..functional.batch_norm_relu import RawStats
from ..nn.batch_norm_relu import _BatchNormReLU
from .selection import Layer

StepHook = Callable[[Optimizer, Any, Any], None]

_OURS = ("collect_stats", "_last", "_watch")


class Hook:
    """Shows a monitor what it is called with. A copy, as of a copied or loaded module, does not."""

    is_passive = True  # for fastremedy.nn.fuse_: the fused output will do

    def __init__(self, see: Callable[..., None] | None = None, row: int = 0) -> None:
        """Show it as that of a row."""
        self._see = see
        self._row = row

    def __call__(self, *shown: Any) -> None:
        """Be the hook."""
        if self._see is not None:
            self._see(self._row, *shown)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """Return a hook that does nothing."""
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """Become a hook that does nothing."""
        return Hook, ()


class Hooks:
    """All hooks of a monitor; they are there while it is armed, and not otherwise."""

    def __init__(
        self,
        layers: list[Layer],
        see_output: Callable[[int, nn.Module, Any, Any], None],
        see_fused: Callable[[int, RawStats], None],
        around_step: tuple[StepHook, StepHook],
    ) -> None:
        """Install nothing yet."""
        self._layers = layers
        self._see_output = see_output
        self._see_fused = see_fused
        self._around_step = around_step
        self._handles: list[RemovableHandle] = []
        self._fused: dict[int, tuple[_BatchNormReLU, dict[str, Any]]] = {}
        self._known: dict[int, RawStats | None] = {}

    @property
    def are_installed(self) -> bool:
        """Whether there are hooks."""
        return bool(self._handles)

    def install(self) -> None:
        """Install the hooks; modules of ours start to measure by themselves."""
        before_step, after_step = self._around_step
        self._handles = [
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ]
        for row, layer in enumerate(self._layers):
            module = layer.module
            if isinstance(module, _BatchNormReLU) and module.training:
                state = vars(module)
                self._fused[row] = module, {name: state[name] for name in _OURS if name in state}
                module.collect_stats = True
                module._watch = Hook(self._see_fused, row)
                self._known[row] = module._last
            else:
                self._handles.append(module.register_forward_hook(Hook(self._see_output, row)))

    def remove(self) -> None:
        """Leave modules as they were."""
        for handle in self._handles:
            handle.remove()
        for module, before in self._fused.values():
            for name in _OURS:
                vars(module).pop(name, None)
            vars(module).update(before)
        self._handles, self._fused = [], {}

    @property
    def num_fused(self) -> int:
        """Number of modules that measure by themselves."""
        return len(self._fused)

    def unseen(self, rows: list[int], before: dict[int, int]) -> Iterator[tuple[int, RawStats]]:
        """Yield what modules of other rows have measured in compiled code, where no hook runs.

        ``before`` holds the id of what rows had shown in the step before: it is not new.
        """
        for row, (module, _) in self._fused.items():
            last = module._last
            if row not in rows and last is not None and last is not self._known[row]:
                self._known[row] = last
                if id(last) != before.get(row):
                    yield row, last


def is_watched(output_of: nn.Module) -> bool:
    """Whether a call of a module counts: in training, and not for the second time.

    Checkpointing calls modules again in the backward pass, with the same results.
    """
    return output_of.training and torch._C._current_graph_task_id() == -1
