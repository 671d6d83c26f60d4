"""Small tensors on their way to the host, for which nobody waits."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

Parcel = dict[tuple[str, str], Tensor]  # what there is, and of which device or optimizer


class _Sent(NamedTuple):
    step: int
    parcel: Parcel
    events: list[torch.cuda.Event]
    pinned: list[tuple[str, str]]  # of the parcel


class Courier:
    """Brings what steps leave to the host: copies on a side stream into pinned memory."""

    def __init__(self) -> None:
        """Nothing is on the way."""
        self._sent: deque[_Sent] = deque()
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, step: int, parcel: Parcel) -> None:
        """Take tensors that nobody else will write to."""
        events, pinned = [], []
        for device in {tensor.device for tensor in parcel.values() if tensor.is_cuda}:
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for name, tensor in parcel.items():
                    if tensor.device == device:
                        memory = torch.empty(
                            tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
                        )
                        parcel[name] = memory.copy_(tensor, non_blocking=True)
                        tensor.record_stream(stream)
                        pinned.append(name)
                events.append(stream.record_event())
        self._sent.append(_Sent(step, parcel, events, pinned))

    def arrived(self, wait: bool = False) -> list[tuple[int, Parcel]]:
        """Return what has arrived since the last call, in order; with ``wait`` everything sent."""
        arrived = []
        while self._sent:
            sent = self._sent[0]
            if wait:
                for event in sent.events:
                    event.synchronize()
            elif not all(event.query() for event in sent.events):
                break
            for name in sent.pinned:  # it is scarce; layouts are known by their identity
                sent.parcel[name] = sent.parcel[name].clone()
            arrived.append((sent.step, sent.parcel))
            self._sent.popleft()
        return arrived
