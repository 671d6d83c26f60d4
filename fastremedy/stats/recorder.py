"""The device side of a monitor: what a step leaves behind is summed up here until it is sent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..functional.batch_norm_relu import RawStats
from ..ops import activation_stats_dispatch as dispatch
from ..ops.activation_stats import COUNTS, MOMENTS, NUM_BUCKETS, empty_moments
from ..ops.table import Rows
from ..optim.update_stats import RawUpdateStats
from .courier import Parcel
from .selection import PLAIN, readable
from .statistics import Statistics
from .units import layout_of

_MAX_LAYOUTS = 64  # that are remembered: batches of many sizes make many

Arguments = tuple[Tensor | None, Tensor, Tensor, Tensor | None]

_graph_task: Callable[[], int] = torch._C._current_graph_task_id


def is_watched(model: nn.Module) -> bool:
    """Whether calls inside a model count: in training, and not for the second time.

    Checkpointing calls modules again in the backward pass, with the same results.
    """
    return model.training and _graph_task() == -1


class _Buffer:
    """Rows of one device."""

    def __init__(self, model: nn.Module, num_rows: int, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the monitor has no memory on {device} yet, which a CUDA graph cannot allocate: "
                "run one step before the capture"
            )
        self._model = model
        self.device = device
        self.statistics = Statistics(num_rows, device=device)
        self.armed = torch.ones((), dtype=torch.int32, device=device)  # also for compiled code
        self.name = str(device)
        self._nothing = empty_moments(num_rows, device)
        self._views: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # of the first rows
        self._is_armed = True
        self.begin_step(True)

    def begin_step(self, is_full: bool) -> None:
        """Follow the choice of backends, and settle whether there will be histograms."""
        self.backend = backends.active(dispatch.STEM, self.device)
        self.kernel = dispatch.kernel_of(self.backend)
        self.is_native = self.backend in ("cpu", "cuda")
        # armed, moments, counts and histogram
        histogram = self.statistics.histogram if is_full else None
        self.arguments = self.with_flag(None if self._is_armed else self.armed, histogram)
        self.rows_on_cpu: Any = None
        if self.backend == "cpu":
            self.rows_on_cpu = dispatch.rows_on_cpu(self._model, *self.arguments)

    def arm(self, is_armed: bool, is_full: bool) -> None:
        """Settle whether anything is measured, also by captured and compiled code."""
        self.armed.fill_(int(is_armed))
        self._is_armed = is_armed
        self.begin_step(is_full)

    def with_flag(self, armed: Tensor | None, histogram: Tensor | None) -> Arguments:
        """Return arguments of the operator: a flag that arms it, where it adds, and a histogram."""
        return armed, self.statistics.moments, self.statistics.counts, histogram

    def arguments_now(self) -> Arguments:
        """Return the arguments for a launch that a CUDA graph may be capturing."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return self.with_flag(self.armed, self.statistics.histogram)
        return self.arguments

    @property
    def num_bytes(self) -> int:
        """Memory of the rows."""
        return self.statistics.num_bytes + self._nothing.numel() * 8

    def take(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return moments and counts of the first rows, which are empty then."""
        if self.rows_on_cpu is not None:
            moments, counts = self.statistics.moments, self.statistics.counts
            taken = (
                moments.new_empty(num_rows, len(MOMENTS)),
                counts.new_empty(num_rows, len(COUNTS)),
            )
            self.rows_on_cpu.take(*taken)
            return taken
        if num_rows not in self._views:
            tensors = (self.statistics.moments, self.statistics.counts, self._nothing)
            moments, counts, nothing = (tensor[:num_rows] for tensor in tensors)
            self._views[num_rows] = moments, counts, nothing
        moments, counts, nothing = self._views[num_rows]
        taken = moments.clone(), counts.clone()
        moments.copy_(nothing)
        counts.zero_()
        return taken


class Recorder:
    """Statistics of named rows, on every device where tensors turn up.

    Hooks may come from several threads, as the replicas of DataParallel do.
    """

    def __init__(
        self,
        model: nn.Module,
        num_rows: int,
        rows_of_params: dict[int, int],
        per_channel: bool,
    ) -> None:
        """Nothing is allocated yet; ``rows_of_params`` is keyed by the id of parameters."""
        self._model = model
        self._num_rows = num_rows
        self._per_channel = per_channel
        self._is_full = self._is_armed = True
        self._rows_of_params = rows_of_params
        self._lock = threading.Lock()
        self._buffers: dict[torch.device, _Buffer] = {}
        self._rows_on_cpu: Any = None
        # Adds an output in the shortest way if its call counts; False if that cannot be, and
        # nothing has happened.
        self.add_output: Callable[[object, int], bool] = _decline
        self._layouts: dict[tuple[int, ...], Tensor] = {}
        self._channels: dict[tuple[int, torch.device], Statistics] = {}
        # Where the parameters of an optimizer's rows are ours, -1 for others; on the host.
        self._places: dict[int, tuple[Rows, Tensor]] = {}
        # What this step has left; what was captured in a graph is there again at every replay.
        self.fused: list[tuple[int, RawStats]] = []  # layers, in the order of calls
        # The ids of what layers had shown in the step before; their modules keep it alive.
        self.fused_before: dict[int, int] = {}
        # What layers have measured that does not count, and need not be looked at again.
        self.known: dict[int, RawStats | None] = {}
        self._updates: list[RawUpdateStats] = []
        self._norms: list[tuple[list[int], Tensor]] = []
        self._captured_fused: list[tuple[int, RawStats]] = []
        self._captured_updates: list[RawUpdateStats] = []
        self._captured_norms: list[tuple[list[int], Tensor]] = []

    def buffer(self, device: torch.device) -> _Buffer:
        """Return the rows of a device."""
        known = self._buffers.get(device)
        if known is None:
            with torch.inference_mode(False):  # other steps may be outside of it
                known = _Buffer(self._model, self._num_rows, device)
            self._buffers[device] = known
            known.arm(self._is_armed, self._is_full)
            self._find_rows_on_cpu()
        return known

    def _find_rows_on_cpu(self) -> None:
        buffer = self._buffers.get(torch.device("cpu"))
        self._rows_on_cpu = None if buffer is None else buffer.rows_on_cpu
        self.add_output = _decline
        if self._rows_on_cpu is not None and not self._per_channel:
            self.add_output = self._rows_on_cpu.add_output

    @property
    def num_bytes(self) -> int:
        """Memory on all devices."""
        channels = sum(statistics.num_bytes for statistics in self._channels.values())
        return channels + sum(buffer.num_bytes for buffer in self._buffers.values())

    # --- what hooks hand over ---

    def add_grads(self, params: list[Tensor], rows: list[int]) -> bool:
        """Add the gradients of parameters that have one; the same."""
        rows_on_cpu = self._rows_on_cpu
        return rows_on_cpu is not None and rows_on_cpu.add_grads(params, rows)

    def add(self, tensors: list[Tensor], rows: list[int]) -> None:
        """Add tensors to their rows, one launch for each device."""
        known = self._buffers.get(tensors[0].device)
        if known is not None and all(type(t) in PLAIN for t in tensors):
            # Nearly always kernels can read everything as it is, which they see faster than Python.
            if known.rows_on_cpu is not None:
                if known.rows_on_cpu.add(tensors, rows):
                    return
            elif known.is_native:
                with self._lock:
                    if known.kernel(tensors, None, rows, *known.arguments_now()):
                        return
        by_device: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
        for tensor, row in zip(tensors, rows, strict=True):
            memory = readable(tensor)
            if memory is not None:
                there = by_device.setdefault(memory.device, ([], []))
                there[0].append(memory)
                there[1].append(row)
        for device, (memories, their_rows) in by_device.items():
            buffer = self.buffer(device)
            if buffer.rows_on_cpu is not None:
                dense = [dispatch.readable(memory, False)[0] for memory in memories]
                buffer.rows_on_cpu.add(dense, their_rows)
                continue
            with self._lock:
                dispatch.update(
                    memories, their_rows, False, *buffer.arguments_now(), buffer.backend
                )

    def add_traced(self, tensor: Tensor, row: int) -> None:
        """Become part of compiled code, which adds a tensor if the device's flag says so."""
        buffer = self.buffer(tensor.device)
        rest = buffer.with_flag(buffer.armed, buffer.statistics.histogram)
        torch.ops.fastremedy.activation_stats_([tensor.detach()], [row], False, *rest)

    def add_units(self, layer: int, tensor: Tensor, dim: int) -> None:
        """Add a tensor to statistics of the units of a layer, which lie along ``dim``.

        A layer has as many units as its first output; outputs of other sizes say nothing of them.
        """
        if not self._is_armed or tensor.layout != torch.strided or tensor.is_nested:
            return  # others cannot be permuted
        memory = readable(tensor.movedim(dim, 1)) if tensor.dim() > 1 else None
        if memory is None or memory.numel() == 0:
            return
        key = layer, memory.device
        with self._lock:
            if key not in self._channels:
                self._channels[key] = Statistics(memory.shape[1], False, memory.device)
            if self._channels[key].num_rows == memory.shape[1]:
                self._channels[key].update(memory, per_channel=True)

    def see_fused(self, layer: int, raw: RawStats) -> None:
        """Take what a BatchNormReLU has measured in its own pass, if its call counts.

        Between layers every call of Python takes half a microsecond: there are none.
        """
        counts = self._model.training and _graph_task() == -1  # is_watched
        if not counts or type(raw.saved) is not Tensor:  # of torch.export, say
            self.known[layer] = raw
        else:
            self.fused.append((layer, raw))
            if raw.saved.is_cuda and torch.cuda.is_current_stream_capturing():
                self._captured_fused.append((layer, raw))

    def add_updates(self, raws: Sequence[RawUpdateStats]) -> None:
        """Take what a step of our optimizers has measured."""
        self._updates += raws
        self._captured_updates += [raw for raw in raws if _is_captured(raw.sums)]

    def add_norms(self, params: list[Tensor], norms: Tensor) -> None:
        """Take what ``clip_`` has measured of the parameters that have a gradient."""
        rows = [self._rows_of_params.get(id(p), -1) for p in params if p.grad is not None]
        if max(rows, default=-1) >= 0:
            self._norms.append((rows, norms))
            if _is_captured(norms):
                self._captured_norms.append((rows, norms))

    # --- once a step ---

    def begin_step(self, is_full: bool) -> None:
        """Settle whether a step takes histograms."""
        self._is_full = is_full
        for buffer in self._buffers.values():
            buffer.begin_step(is_full)
        self._find_rows_on_cpu()

    def arm(self, is_armed: bool) -> None:
        """Settle whether anything is measured, also by captured and compiled code."""
        self._is_armed = is_armed
        for buffer in self._buffers.values():
            buffer.arm(is_armed, self._is_full)
        self._find_rows_on_cpu()

    def take(self, num_rows: int, rows_with_histogram: Sequence[int]) -> Parcel:
        """Return what a step has left in the first rows, and start the next one from nothing."""
        parcel: Parcel = {}
        if len(self._layouts) > _MAX_LAYOUTS:
            self._layouts.clear()
        for buffer in self._buffers.values():
            name, histogram = buffer.name, buffer.statistics.histogram
            parcel["moments", name], parcel["counts", name] = buffer.take(num_rows)
            if rows_with_histogram and histogram is not None:
                rows = [histogram[row] for row in rows_with_histogram]
                parcel["histogram", name] = torch.stack(rows)
        self._take_units(parcel)
        self._take_updates(parcel)
        return parcel

    def histogram(self) -> Tensor:
        """Return the histograms of all devices together; this waits for them."""
        total = torch.zeros(self._num_rows, NUM_BUCKETS, dtype=torch.int64, device="cpu")
        for buffer in self._buffers.values():
            if buffer.statistics.histogram is not None:
                total += buffer.statistics.histogram.cpu()
        return total

    def _take_fused(self, parcel: Parcel, fused: list[tuple[int, RawStats]]) -> None:
        rows, raws = zip(*fused, strict=True)
        saved, dead, numels = zip(*raws, strict=True)
        devices = list(map(Tensor.get_device, saved))
        if devices.count(devices[0]) < len(devices):
            for one in set(devices):
                there = [
                    shown for shown, device in zip(fused, devices, strict=True) if device == one
                ]
                self._take_fused(parcel, there)
            return
        name = str(saved[0].device)
        key = (*rows, *numels)
        if key not in self._layouts:
            self._layouts[key] = layout_of(rows, [s.shape[1] for s in saved], numels)
        parcel["fused layout", name] = self._layouts[key]
        parcel["fused saved", name] = torch.cat(saved, 1)
        parcel["fused dead", name] = torch.cat(dead)

    def _take_units(self, parcel: Parcel) -> None:
        if shown := self.fused or self._captured_fused:
            self._take_fused(parcel, shown)
        rows, raws = zip(*self.fused, strict=True) if self.fused else ((), ())
        self.fused_before = dict(zip(rows, map(id, raws), strict=True))
        self.fused = []
        for device in {device for _, device in self._channels}:
            channels = {row: s for (row, there), s in self._channels.items() if there == device}
            sizes = [statistics.num_rows for statistics in channels.values()]
            key = (-1, *channels, *sizes)  # no row: other layouts begin with one
            if key not in self._layouts:
                self._layouts[key] = layout_of(list(channels), sizes, [0] * len(sizes))
            moments = torch.cat([s.moments for s in channels.values()])
            counts = torch.cat([s.counts for s in channels.values()])
            parcel["units layout", str(device)] = self._layouts[key]
            parcel["units each", str(device)] = torch.cat([moments[:, :3], counts.double()], 1).T
            for statistics in channels.values():
                statistics.reset()

    def _take_updates(self, parcel: Parcel) -> None:
        used = {}
        for i, raw in enumerate(self._updates or self._captured_updates):
            known = self._places.get(id(raw.rows))
            if known is None or known[0] is not raw.rows:
                places = [self._rows_of_params.get(id(owner), -1) for owner in raw.rows.owners]
                known = raw.rows, torch.tensor(places, dtype=torch.int64, device="cpu")
            used[id(raw.rows)] = known
            parcel["update rows", str(i)] = known[1]
            parcel["updates", str(i)] = raw.sums if self._updates else raw.sums.clone()
        for i, (rows, norms) in enumerate(self._norms or self._captured_norms):
            parcel["norm rows", str(i)] = torch.tensor(rows, dtype=torch.int64, device="cpu")
            parcel["norms", str(i)] = norms if self._norms else norms.clone()
        self._places, self._updates, self._norms = used, [], []


def _decline(output: object, row: int) -> bool:
    return False


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
