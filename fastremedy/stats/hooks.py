"""Hooks that tell a monitor what happens: on modules, and around the steps of optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from ..functional.batch_norm_relu import RawStats
from ..nn.batch_norm_relu import _BatchNormReLU
from ..optim import Adam, AdamW
from .recorder import Recorder
from .selection import Layer, uncalled

StepHook = Callable[[Optimizer, Any, Any], None]

_OURS = ("_last", "_watch")


class Hook:
    """Shows a monitor what it is called with. A copy, as of a copied or loaded module, does not."""

    is_passive = True  # for fastremedy.nn.fuse_: the fused output will do

    def __init__(
        self,
        recorder: Recorder | None = None,
        see: Callable[[int, Any], None] | None = None,
        row: int = 0,
    ) -> None:
        """Show it as that of a row: to the recorder, and what that does not take to ``see``."""
        self._recorder = recorder
        self._see = see
        self._row = row

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Be the hook."""
        see = self._see
        if see is None:
            return
        # Between layers Python is in no cache, so that every call of it takes a microsecond.
        if is_dynamo_compiling() or not self._recorder.add_output(output, self._row):  # type: ignore[union-attr]
            see(self._row, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        """Return a hook that does nothing."""
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """Become a hook that does nothing."""
        return Hook, ()


class Watch(list[tuple[Callable[[int, RawStats], None], int]]):
    """Who sees what a module of ours measures, as which row. A copy, as of the module, is empty.

    It also keeps what the module was like before.
    """

    def __init__(self, before: dict[str, Any] | None = None) -> None:
        """Be nobody yet."""
        super().__init__()
        self.before = before or {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """Return one that nobody watches."""
        return Watch()

    def __reduce__(self) -> tuple[type[Watch], tuple[()]]:
        """Become one that nobody watches."""
        return Watch, ()


class Hooks:
    """All hooks of a monitor; they are there while it is armed, and not otherwise."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[Layer],
        recorder: Recorder,
        see_output: Callable[[int, Any], None],
        around_step: tuple[StepHook, StepHook],
    ) -> None:
        """Install nothing yet."""
        self._model = model
        self._layers = layers
        self._recorder = recorder
        self._see_output = see_output
        self._around_step = around_step
        self._on_steps: list[RemovableHandle] = []
        self._on_outputs: dict[int, RemovableHandle] = {}
        self._fused: dict[int, tuple[_BatchNormReLU, Watch]] = {}
        # Norms, and their classes, which fuse_ and unfuse_ change.
        self._norms: list[nn.Module] = []
        self._classes: list[type[nn.Module]] = []

    @property
    def are_installed(self) -> bool:
        """Whether there are all hooks."""
        return bool(self._on_steps)

    def install(self, sees_fused: bool) -> None:
        """Install the hooks; modules of ours start to measure by themselves.

        Their outputs are seen, too, with ``sees_fused``.
        """
        if self.are_outdated:
            self._warn()
        before_step, after_step = self._around_step
        self._on_steps = [
            register_optimizer_step_pre_hook(before_step),
            register_optimizer_step_post_hook(after_step),
        ]
        modules = [layer.module for layer in self._layers]
        self._norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._classes = list(map(type, self._norms))
        for row, module in enumerate(modules):
            if isinstance(module, _BatchNormReLU) and module.training:
                watch = module._watch
                if not isinstance(watch, Watch) or not watch:  # by another monitor
                    state = vars(module)
                    watch = Watch({name: state[name] for name in _OURS if name in state})
                    module._watch = watch
                watch.append((self._recorder.see_fused, row))
                self._fused[row] = module, watch
                self._recorder.known[row] = module._last
            else:
                self._hook(row)
        self.see_fused_outputs(sees_fused)

    def _hook(self, row: int) -> None:
        if row not in self._on_outputs:
            hook = Hook(self._recorder, self._see_output, row)
            self._on_outputs[row] = self._layers[row].module.register_forward_hook(hook)

    def see_fused_outputs(self, sees: bool) -> None:
        """See outputs of modules that measure by themselves, or no longer."""
        for row, (module, _) in self._fused.items():
            if sees or not module.training:  # in evaluation they measure nothing
                self._hook(row)
            elif row in self._on_outputs:
                self._on_outputs.pop(row).remove()

    @property
    def are_outdated(self) -> bool:
        """Whether norms have another class than when they got their hooks."""
        return list(map(type, self._norms)) != self._classes

    def _warn(self) -> None:
        pairs = zip(self._norms, self._classes, strict=True)
        changed = {id(norm) for norm, known in pairs if type(norm) is not known}
        names = [layer.name for layer in self._layers if id(layer.module) in changed]
        silent = uncalled(self._model, self._layers)
        rest = f"; {', '.join(silent)} are called no more and have nothing to report"
        warnings.warn(
            "fuse_ or unfuse_ was called after the monitor was attached. From the next step on "
            f"{', '.join(names)} report as what they are now{rest if silent else ''}",
            UserWarning,
            stacklevel=4,
        )

    def remove(self, keeps_outputs: bool = False) -> None:
        """Leave modules as they were, but for hooks on outputs that are to be kept."""
        for handle in self._on_steps:
            handle.remove()
        if not keeps_outputs:
            for handle in self._on_outputs.values():
                handle.remove()
            self._on_outputs = {}
        for row, (module, watch) in self._fused.items():
            watch.remove((self._recorder.see_fused, row))
            if not watch:
                _restore(module, watch)
        self._on_steps, self._fused = [], {}

    def show_unseen(self) -> None:
        """Show the recorder what modules have measured in compiled code, where no hook runs."""
        recorder = self._recorder
        seen = {row for row, _ in recorder.fused}
        if len(seen) == len(self._fused):
            return
        for row, (module, _) in self._fused.items():
            last = getattr(module, "_last", None)  # a plain BatchNorm after unfuse_
            if row not in seen and last is not None and last is not recorder.known[row]:
                recorder.known[row] = last
                if id(last) != recorder.fused_before.get(row):
                    recorder.fused.append((row, last))


def _restore(module: _BatchNormReLU, watch: Watch) -> None:
    """Make a module what it was; what its owner collects is of the last forward pass."""
    state = vars(module)
    if not isinstance(module, _BatchNormReLU):  # after unfuse_, which has done the rest
        del state["_watch"]
        return
    if module.collect_stats and module._last is not None:
        watch.before["_last"] = module._last
    for name in _OURS:
        state.pop(name, None)
    state.update(watch.before)


def leaves_grads(optimizer: Optimizer) -> bool:
    """Whether gradients are the same after an optimizer's step, and near.

    To read them then takes half as long. Subclasses and hooks of others, which may come before a
    monitor's, can free them.
    """
    return (
        type(optimizer) in (Adam, AdamW)
        and getattr(optimizer, "grad_scale", None) is None
        and not optimizer._optimizer_step_post_hooks
        and len(_global_optimizer_post_hooks) == 1
    )
