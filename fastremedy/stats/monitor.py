"""A monitor: what every layer of a model in training does, all the time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim import Optimizer

from .. import clip
from ..optim import Adam
from . import jsonlines, plot, table, tensorboard
from .courier import Courier
from .history import History, Rows
from .hooks import Hooks, leaves_grads
from .recorder import Recorder, is_watched
from .report import COLUMNS, Report
from .selection import Pattern, as_patterns, layers_of, parameters_of, tensors_in
from .silence import Listener

# Optimizers in a step for which any monitor wants statistics, and whether their owner does.
_collecting: WeakKeyDictionary[Adam, bool] = WeakKeyDictionary()


class Monitor:
    """Watches activations, gradients, weights and updates of a model while it trains.

    ::

        with fastremedy.stats.Monitor(model, every=10) as monitor:
            for images, labels in loader:
                loss = criterion(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.step()
        print(monitor.summary())

    Every output is read once, where it arises. Nothing waits for the device: numbers travel to the
    host on a side stream while training goes on. In steps that are not monitored there are no
    hooks.

    What our own parts know is taken from them instead of reading tensors again. Outputs of
    ``BatchNormReLU`` and of BatchNorms after :func:`fastremedy.nn.fuse_`, which are those of the
    activation, are read in full steps alone. In between these modules tell count, zeros, dead units
    and units with non-finite values from their own pass; ``diversity`` is that of their input.
    Activations that are fused away have nothing to report; to fuse or unfuse later warns. Our
    :class:`fastremedy.optim.AdamW` tells norms of updates and which elements moved, which others do
    not; :func:`fastremedy.clip_` tells the norm of each gradient.

    Gradients are those of parameters, before clipping by :func:`fastremedy.clip_` or by our
    optimizers, without the loss scale. Repeated indices of sparse ones are added up first, for
    which torch waits for a GPU.

    Outputs count while the model is in training mode. Recomputations of checkpointing do not. In
    ``torch.compile`` and in CUDA graphs the monitor has to be attached before compilation or
    capture, in a step that is monitored, as the first is, or its second warns of compiled code;
    ``step`` stays outside. Where code is compiled hooks stay until ``detach``, and a flag on the
    device disarms them: nothing is compiled again for ``every``. After ``detach`` it is, and that
    code sees no hook later: call ``torch.compiler.reset()`` before another ``attach``. Compiled
    code tells nothing of units. Modules of ``torch.jit.script`` take no hooks and are left out, one
    of ``torch.jit.trace`` is a single layer.

    Equivalent to: forward hooks that take statistics of outputs, and loops over the parameters
    before and after the optimizer's step.

    Args:
        model: its modules get hooks in the steps that are monitored, and nothing else.
        every: monitor the first of every so many steps.
        activations: statistics of what modules return.
        gradients: statistics of the gradients of parameters.
        weights: statistics of parameters, in full steps: they change slowly.
        updates: norms of gradients, parameters and updates, and which elements moved.
        include: names or patterns (``"layer1.*"``) or classes of modules; None for all modules that
            compute something: those without children. A name or a class includes others, too.
        exclude: the same, for what to leave out.
        per_channel: also keep statistics of every unit (channel), for ``dead`` and ``diversity`` of
            all layers: one more read of every output.
        full_every: the first of every so many monitored steps is a full one, with weights, outputs
            of fused modules and histograms, from which quantiles and saturated outputs follow.
        history: number of monitored steps that are kept.
        process_group: ranks whose numbers are taken together when they are read: ``report`` and all
            that is made from it have to be called on every rank. Batches may have any sizes.
            Parameters that are no shards (DTensor) are those of this rank.

    Raises:
        TypeError: ``model`` is no module, or a pattern is neither string nor class.
        ValueError: a number is not positive; nothing of the model is included.

    Example:
        >>> import torch, fastremedy
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU())
        >>> optimizer = fastremedy.optim.AdamW(model.parameters())
        >>> with fastremedy.stats.Monitor(model) as monitor:
        ...     for _ in range(3):
        ...         model(torch.ones(2, 4)).sum().backward()
        ...         optimizer.step()
        ...         monitor.step()
        >>> monitor.to_dict()["activations"]["1"]["count"]
        48
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 1,
        activations: bool = True,
        gradients: bool = True,
        weights: bool = True,
        updates: bool = True,
        include: Pattern | Iterable[Pattern] | None = None,
        exclude: Pattern | Iterable[Pattern] | None = None,
        per_channel: bool = False,
        *,
        full_every: int = 8,
        history: int = 256,
        process_group: Any | None = None,
    ) -> None:
        """Choose what to watch; the model is left alone until :meth:`attach`."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        numbers = {"every": every, "full_every": full_every, "history": history}
        for name, number in numbers.items():
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a positive integer, got {number!r}")
        patterns = as_patterns("include", include), as_patterns("exclude", exclude)
        layers = layers_of(model, *patterns) if activations else []
        params = parameters_of(model, *patterns) if gradients or weights or updates else []
        if not layers and not params:
            raise ValueError(f"nothing of the model is included: {include=}, {exclude=}")
        wanted = zip(COLUMNS, (activations, gradients, weights, updates), strict=True)
        self._model = model
        self._every = every
        self._full_every = full_every
        self._per_channel = per_channel
        self._process_group = process_group
        self._parts = [name for name, is_wanted in wanted if is_wanted]
        self._rows = rows = Rows(layers, params, gradients, weights)
        rows_of_params = {id(param.tensor): row for row, param in enumerate(params)}
        self._params = [param.tensor for param in params]
        self._places = list(range(rows.first_gradient, rows.first_gradient + len(params)))
        self._recorder = Recorder(model, max(1, rows.count), rows_of_params, per_channel)
        self._courier = Courier()
        self._history = History(rows, history)
        self._listener = Listener(model, rows)
        around_step = self._before_step, self._after_step
        self._hooks = Hooks(model, layers, self._recorder, self._see_output, around_step)
        self._is_attached = False
        self._num_steps = 0
        self._num_monitored = 0
        self._is_full = True
        self._is_compiled = False
        self._rows_of_params = rows_of_params if gradients or weights else {}
        self._unread: dict[int, int] = {}  # parameters that this step has to read: rows by id
        # Sizes of an optimizer's groups, and its parameters that are watched.
        self._ours = WeakKeyDictionary[Optimizer, tuple[list[int], list[Tensor]]]()
        self._last_line: dict[Path, int] = {}
        self._last_histograms: dict[str, Tensor] = {}

    # --- life cycle ---

    def attach(self) -> Monitor:
        """Start to watch.

        Raises:
            RuntimeError: the monitor is attached already, or a module takes no hooks.
        """
        if self._is_attached:
            raise RuntimeError("the monitor is attached already")
        if self._is_compiled:
            text = "code that was compiled while the monitor was detached tells it nothing, unless"
            warnings.warn(f"{text} torch.compiler.reset() was called", UserWarning, stacklevel=2)
        self._is_attached = True
        self._listener.begin()
        self._begin_step()
        for device in {param.device for param in self._model.parameters()}:
            if device.type != "meta":
                self._recorder.buffer(device)
        try:
            self._arm(self._num_steps % self._every == 0)
        except Exception:
            self._hooks.remove()
            self._is_attached = False
            raise
        return self

    def detach(self) -> None:
        """Stop to watch, and leave the model as it was; what is known stays."""
        if self._is_attached:
            self._arm(False)
            self._hooks.remove()
            self._is_attached = False
            self._recorder.take(self._rows.count, ())  # of a step that nobody has ended

    def __enter__(self) -> Monitor:
        """Attach."""
        return self.attach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    def step(self) -> None:
        """Tell that a training step is over; call it once a step, after the optimizer's.

        Raises:
            RuntimeError: the monitor is not attached.
        """
        if not self._is_attached:
            raise RuntimeError("the monitor is not attached: call attach() or use `with`")
        if self._hooks.are_installed:
            self._read_params(self._params)
            self._hooks.show_unseen()
            num_rows, rows_with_histogram = self._rows.first_weight, []
            if self._is_full:
                num_rows, rows_with_histogram = self._rows.count, self._rows.saturating
            parcel = self._recorder.take(num_rows, rows_with_histogram)
            self._courier.send(self._num_steps, parcel)
            self._num_monitored += 1
            is_full = self._num_monitored % self._full_every == 0
            if is_full or self._is_full:
                self._is_full = is_full
                self._recorder.begin_step(is_full)
                if not self._is_compiled:
                    self._hooks.see_fused_outputs(is_full)
            if self._hooks.are_outdated:
                self._hooks.remove(keeps_outputs=self._is_compiled)
                self._hooks.install(self._is_full or self._is_compiled)
            self._begin_step()
        self._history.add(arrived := self._courier.arrived())
        self._listener.hear(arrived)
        self._num_steps += 1
        is_armed = self._num_steps % self._every == 0
        if is_armed != self._hooks.are_installed:
            self._arm(is_armed)

    def _begin_step(self) -> None:
        reads = self._rows.gradients or self._is_full
        self._unread = dict(self._rows_of_params) if reads else {}

    def _arm(self, is_armed: bool) -> None:
        self._recorder.arm(is_armed)
        if is_armed:
            self._hooks.install(self._is_full or self._is_compiled)
            clip.observers.append(self)
        elif self._hooks.are_installed:
            self._hooks.remove(keeps_outputs=self._is_compiled)
            clip.observers.remove(self)
            for optimizer, before in _collecting.items():  # of steps that failed
                optimizer.collect_stats = before
            _collecting.clear()

    # --- what hooks show ---

    def _see_output(self, row: int, output: Any) -> None:
        if is_compiling():
            self._see_traced_output(row, output)
            return
        if not is_watched(self._model):
            return
        for tensor in tensors_in(output):
            self._recorder.add([tensor], [row])
            if self._per_channel:
                self._recorder.add_units(row, tensor, self._rows.layers[row].unit_dim)

    def _see_traced_output(self, row: int, output: Any) -> None:
        """Become part of the compiled code, which measures if the device's flag says so."""
        if not self._model.training or torch.compiler._is_exporting_flag:
            return
        self._is_compiled = True  # code without hooks would not see that they are back
        for tensor in tensors_in(output):
            self._recorder.add_traced(tensor, row)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """See an optimizer about to step; with a closure there are no gradients yet."""
        params = self._params_in(optimizer)
        if not params:
            return
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None and (self._is_full or not leaves_grads(optimizer)):  # weights change
            self._read_params(params, getattr(optimizer, "grad_scale", None))
        if isinstance(optimizer, Adam) and "updates" in self._parts:
            _collecting.setdefault(optimizer, optimizer.collect_stats)
            optimizer.collect_stats = True

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        params = self._params_in(optimizer)
        if not params:
            return
        self._read_params(params)
        if isinstance(optimizer, Adam) and "updates" in self._parts:
            optimizer.collect_stats = _collecting.pop(optimizer, optimizer.collect_stats)
            if optimizer._raw_stats is not None:
                self._recorder.add_updates(optimizer._raw_stats)

    def _params_in(self, optimizer: Optimizer) -> list[Tensor]:
        """Return what is watched of an optimizer's parameters, all that are in a list known."""
        groups = [group["params"] for group in optimizer.param_groups]
        sizes = list(map(len, groups))
        known = self._ours.get(optimizer)
        if known is None or known[0] != sizes:
            ids = {id(param) for group in groups for param in group}
            params = [param for param in self._params if id(param) in ids]
            params = self._params if len(params) == len(self._params) else params
            known = self._ours[optimizer] = sizes, params
        return known[1]

    def before_clipping(self, tensors: list[Tensor]) -> None:
        """Be an observer of ``clip_``."""
        self._read_params(tensors)

    def after_clipping(self, tensors: list[Tensor], norms: Tensor) -> None:
        """Be an observer of ``clip_``."""
        if "updates" in self._parts:
            self._recorder.add_norms(tensors, norms)

    def _read_params(self, params: Iterable[Tensor], grad_scale: Tensor | None = None) -> None:
        """Read those parameters and their gradients that this step has not read yet."""
        if not self._unread:
            return
        places = self._places
        if params is self._params and len(self._unread) == len(self._params):
            unread, rows, self._unread = self._params, list(self._unread.values()), {}
        else:
            pairs = [(p, self._unread.pop(id(p))) for p in params if id(p) in self._unread]
            unread, rows = [param for param, _ in pairs], [row for _, row in pairs]
            places = [places[row] for row in rows]
        found: list[tuple[Tensor, int]] = []
        if self._rows.gradients:
            if grad_scale is not None or not self._recorder.add_grads(unread, places):
                found = [
                    (param.grad, place)
                    for param, place in zip(unread, places, strict=True)
                    if param.grad is not None
                ]
            if grad_scale is not None:
                with torch.no_grad():  # around all of it, it would take 20 us a step
                    found = [(grad / grad_scale.to(grad.device), place) for grad, place in found]
        if self._rows.weights and self._is_full:
            first = self._rows.first_weight
            found += [(param, first + row) for param, row in zip(unread, rows, strict=True)]
        if found:
            tensors, places = map(list, zip(*found, strict=True))
            self._recorder.add(tensors, places)

    # --- what is known ---

    @property
    def num_bytes(self) -> int:
        """Memory that the monitor holds, on host and devices, its history filled."""
        return self._recorder.num_bytes + self._history.num_bytes

    def report(self) -> Report:
        """Return everything that is known; this waits for the device."""
        self._history.add(self._courier.arrived(wait=True))
        histogram = self._recorder.histogram()
        return self._history.report(self._parts, histogram, self.num_bytes, self._process_group)

    def summary(self) -> str:
        """Return a table of all layers over the steps kept."""
        return table.render(self.report())

    def to_dict(self) -> dict[str, Any]:
        """Return numbers over the steps kept, by part, layer or parameter, and column."""
        return jsonlines.as_dict(self.report())

    def to_jsonl(self, path: str | Path) -> None:
        """Append a line of JSON for every step that this has not written to the file before."""
        path = Path(path)
        report = self.report()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            for line in jsonlines.lines(report, self._last_line.get(path, -1)):
                file.write(line + "\n")
        self._last_line[path] = max([*report.steps, self._last_line.get(path, -1)])

    def to_tensorboard(self, writer: Any, step: int | None = None) -> None:
        """Write the last numbers, and histograms of what full steps have seen since the last call.

        Args:
            writer: a ``torch.utils.tensorboard.SummaryWriter``.
            step: where to draw them; the last step monitored if None.
        """
        report = self.report()
        if report.steps:
            step = report.steps[-1] if step is None else step
            self._last_histograms = tensorboard.write(report, writer, step, self._last_histograms)

    def plot(self, path: str | Path) -> None:
        """Draw the layers against the steps kept."""
        plot.draw(self.report(), Path(path))
