"""The device side of a monitor: what a step leaves behind is summed up here until it is sent."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..functional.batch_norm_relu import RawStats
from ..ops import activation_stats_dispatch as dispatch
from ..ops.activation_stats import NUM_BUCKETS, empty_moments
from ..ops.table import Rows
from ..optim.update_stats import RawUpdateStats
from .courier import Parcel
from .selection import readable
from .statistics import Statistics
from .units import layout_of

Buffers = tuple[Tensor | None, Tensor, Tensor, Tensor | None]


class _Buffer(NamedTuple):
    """Rows of one device."""

    statistics: Statistics
    armed: Tensor  # int32: captured and compiled code obeys it
    nothing: Tensor  # moments of no value

    @property
    def num_bytes(self) -> int:
        """Memory of the rows."""
        return self.statistics.num_bytes + self.nothing.numel() * 8


class Recorder:
    """Statistics of named rows, on every device where tensors turn up.

    Hooks may come from several threads, as the replicas of DataParallel do.
    """

    def __init__(self, num_rows: int, rows_of_params: dict[int, int]) -> None:
        """Nothing is allocated yet; ``rows_of_params`` is keyed by the id of parameters."""
        self._num_rows = num_rows
        self._rows_of_params = rows_of_params
        self._lock = threading.Lock()
        self._buffers: dict[torch.device, _Buffer] = {}
        self._layouts: dict[tuple[tuple[int, int, int], ...], Tensor] = {}
        self._channels: dict[tuple[int, int, torch.device], Statistics] = {}
        self._places: dict[int, tuple[Rows, Tensor]] = {}
        # What this step has left; what was captured in a graph is there again at every replay.
        self._fused: list[tuple[int, RawStats]] = []
        self._updates: list[RawUpdateStats] = []
        self._norms: list[tuple[list[int], Tensor]] = []
        self._captured_fused: list[tuple[int, RawStats]] = []
        self._captured_updates: list[RawUpdateStats] = []

    def buffer(self, device: torch.device) -> _Buffer:
        """Return the rows of a device."""
        known = self._buffers.get(device)
        if known is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"the monitor has no memory on {device} yet, which a CUDA graph cannot "
                    "allocate: run one step before the capture"
                )
            armed = torch.ones((), dtype=torch.int32, device=device)
            statistics = Statistics(self._num_rows, device=device)
            known = _Buffer(statistics, armed, empty_moments(self._num_rows, device))
            self._buffers[device] = known
        return known

    @property
    def num_bytes(self) -> int:
        """Memory on all devices."""
        channels = sum(statistics.num_bytes for statistics in self._channels.values())
        return channels + sum(buffer.num_bytes for buffer in self._buffers.values())

    # --- what hooks hand over ---

    def add(self, tensors: list[Tensor], rows: list[int], with_histogram: bool) -> None:
        """Add tensors to their rows, one launch for each device."""
        device = tensors[0].device
        buffers = self._buffers_of(device, with_histogram)
        backend = backends.active(dispatch.STEM, device)
        with self._lock:
            # Nearly always kernels can read everything as it is, which they see faster than Python.
            if dispatch.update_plain(tensors, rows, *buffers, backend):
                return
        by_device: dict[torch.device, tuple[list[Tensor], list[int]]] = {}
        for tensor, row in zip(tensors, rows, strict=True):
            memory = readable(tensor)
            if memory is not None:
                there = by_device.setdefault(memory.device, ([], []))
                there[0].append(memory)
                there[1].append(row)
        for device, (memories, their_rows) in by_device.items():
            buffers = self._buffers_of(device, with_histogram)
            with self._lock:
                dispatch.update(memories, their_rows, False, *buffers)

    def _buffers_of(self, device: torch.device, with_histogram: bool) -> Buffers:
        """Return armed, moments, counts and histogram for a launch."""
        buffer = self.buffer(device)
        statistics = buffer.statistics
        armed, histogram = None, statistics.histogram if with_histogram else None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            armed, histogram = buffer.armed, statistics.histogram
        return armed, statistics.moments, statistics.counts, histogram

    def add_units(self, layer: int, tensor: Tensor) -> None:
        """Add a tensor ``[N, C, *]`` to statistics of the units of a layer."""
        key = layer, tensor.shape[1], tensor.device
        with self._lock:
            if key not in self._channels:
                self._channels[key] = Statistics(key[1], False, key[2])
            self._channels[key].update(tensor, per_channel=True)

    def add_fused(self, layer: int, raw: RawStats) -> None:
        """Take what a BatchNormReLU has measured in its own pass."""
        with self._lock:
            self._fused.append((layer, raw))
            if _is_captured(raw.saved):
                self._captured_fused.append((layer, raw))

    @property
    def fused_rows(self) -> set[int]:
        """Layers that have shown what they measured in this step."""
        return {row for row, _ in self._fused}

    def add_updates(self, raws: Sequence[RawUpdateStats]) -> None:
        """Take what a step of our optimizers has measured."""
        self._updates += raws
        self._captured_updates += [raw for raw in raws if _is_captured(raw.sums)]

    def add_norms(self, params: list[Tensor], norms: Tensor) -> None:
        """Take what ``clip_`` has measured of the parameters that have a gradient."""
        rows = [self._rows_of_params.get(id(p), -1) for p in params if p.grad is not None]
        self._norms.append((rows, norms))

    # --- once a step ---

    def arm(self, armed: bool) -> None:
        """Tell captured and compiled code whether to measure."""
        for buffer in self._buffers.values():
            buffer.armed.fill_(int(armed))

    def take(self, rows_with_histogram: Sequence[int]) -> Parcel:
        """Return what the step has left, on the devices, and start the next one from nothing."""
        parcel: Parcel = {}
        for device, buffer in self._buffers.items():
            statistics = buffer.statistics
            parcel[f"moments {device}"] = statistics.moments.clone()
            parcel[f"counts {device}"] = statistics.counts.clone()
            statistics.moments.copy_(buffer.nothing)
            statistics.counts.zero_()
            if rows_with_histogram and statistics.histogram is not None:
                rows = [statistics.histogram[row] for row in rows_with_histogram]
                parcel[f"histogram {device}"] = torch.stack(rows)
        self._take_units(parcel)
        self._take_updates(parcel)
        return parcel

    def histogram(self) -> Tensor:
        """Return the histograms of all devices together; this waits for them."""
        total = torch.zeros(self._num_rows, NUM_BUCKETS, dtype=torch.int64)
        for buffer in self._buffers.values():
            if buffer.statistics.histogram is not None:
                total += buffer.statistics.histogram.cpu()
        return total

    def _take_units(self, parcel: Parcel) -> None:
        fused = self._fused or self._captured_fused
        for device in {raw.saved.device for _, raw in fused}:
            here = [(row, raw) for row, raw in fused if raw.saved.device == device]
            layout = tuple((row, raw.saved.shape[1], raw.numel) for row, raw in here)
            parcel[f"fused layout {device}"] = self._layout_of(layout)
            parcel[f"fused saved {device}"] = torch.cat([raw.saved for _, raw in here], 1)
            parcel[f"fused dead {device}"] = torch.cat([raw.dead for _, raw in here])
        self._fused = []
        for device in {device for _, _, device in self._channels}:
            channels = {key: s for key, s in self._channels.items() if key[2] == device}
            layout = tuple((row, size, 0) for row, size, _ in channels)
            moments = torch.cat([s.moments for s in channels.values()])
            counts = torch.cat([s.counts for s in channels.values()])
            parcel[f"units layout {device}"] = self._layout_of(layout)
            parcel[f"units each {device}"] = torch.cat([moments[:, :3], counts.double()], 1)
            for statistics in channels.values():
                statistics.reset()

    def _layout_of(self, runs: tuple[tuple[int, int, int], ...]) -> Tensor:
        """Return where units belong; the same tensor every time."""
        known = self._layouts.get(runs)
        if known is None:
            known = self._layouts[runs] = layout_of(*zip(*runs, strict=True))
        return known

    def _take_updates(self, parcel: Parcel) -> None:
        for i, raw in enumerate(self._updates or self._captured_updates):
            parcel[f"update rows {i}"] = self._rows_of(raw.rows)
            parcel[f"updates {i}"] = raw.sums
        for i, (rows, norms) in enumerate(self._norms):
            parcel[f"norm rows {i}"] = torch.tensor(rows, dtype=torch.int64)
            parcel[f"norms {i}"] = norms
        self._updates, self._norms = [], []

    def _rows_of(self, rows: Rows) -> Tensor:
        """Return where the parameters of an optimizer are ours, -1 for others; on the host."""
        known = self._places.get(id(rows))
        if known is None or known[0] is not rows:
            places = [self._rows_of_params.get(id(owner), -1) for owner in rows.owners]
            known = self._places[id(rows)] = rows, torch.tensor(places, dtype=torch.int64)
        return known[1]


def _is_captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
