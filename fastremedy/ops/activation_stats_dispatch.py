"""From tensors to the kernels of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native, backends
from . import activation_stats as definition
from .activation_stats import Sizes
from .dispatch import KERNEL_DTYPES, is_dense, triton_kernels, workspace
from .layouts import with_kernel_layout

STEM = "activation_stats"


def kernel_of(backend: str) -> Callable[..., None]:
    """Return the entry of a backend; it takes the arguments of the definition."""
    if backend == "torch":
        return definition.update
    if backend == "triton":
        entry: Callable[..., None] = triton_kernels(STEM).update
        return entry
    native = _native.module_for(backend)
    entry = native.activation_stats_update
    return entry if backend == "cpu" else _with_scratch(native, entry)


def _with_scratch(native: Any, entry: Callable[..., None]) -> Callable[..., None]:
    def run(
        tensors: Sequence[Tensor], sizes: Sequence[Sizes], rows: Sequence[int], *rest: Any
    ) -> None:
        device = tensors[0].device
        num_counters, num_bytes = native.activation_stats_scratch_size(tensors, sizes, rows)
        counters = workspace(device, 4 * num_counters, STEM)
        partials = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        address = 0 if counters is None else counters.data_ptr()
        entry(tensors, sizes, rows, *rest, address, partials.data_ptr())

    return run


def readable(tensor: Tensor, per_channel: bool) -> tuple[Tensor, Sizes]:
    """Return a tensor that kernels can read, and the sizes of its memory."""
    tensor = tensor.detach()
    if tensor.dtype not in KERNEL_DTYPES:
        tensor = tensor.float()
    tensor = tensor.resolve_neg()
    if not per_channel:
        tensor = tensor if is_dense(tensor) else tensor.contiguous()
        return tensor, (1, 1, tensor.numel())
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(0)
    tensor = with_kernel_layout(tensor)
    channels = tensor.shape[1]
    if tensor.is_contiguous():
        return tensor, (tensor.shape[0], channels, math.prod(tensor.shape[2:]))
    return tensor, (tensor.numel() // channels, channels, 1)


def update(
    tensors: Sequence[Tensor],
    first_rows: Sequence[int],
    per_channel: bool,
    armed: Tensor | None,
    moments: Tensor,
    counts: Tensor,
    histogram: Tensor | None,
    backend: str | None = None,
) -> None:
    """Merge what tensors of one device hold into their rows."""
    chosen = [
        (*readable(tensor, per_channel), row)
        for tensor, row in zip(tensors, first_rows, strict=True)
        if tensor.numel() > 0
    ]
    if not chosen:
        return
    if backend is None:
        backend = backends.active(STEM, moments.device)
    read, sizes, rows = map(list, zip(*chosen, strict=True))
    kernel_of(backend)(read, sizes, rows, armed, moments, counts, histogram)
