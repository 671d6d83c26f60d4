"""From tensors to the kernels of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import _native, backends
from . import activation_stats as definition
from .activation_stats import Sizes
from .dispatch import KERNEL_DTYPES, is_dense, triton_kernels, workspace
from .layouts import with_kernel_layout

STEM = "activation_stats"


def kernel_of(backend: str) -> Callable[..., Any]:
    """Return the entry of a backend; it takes the arguments of the definition.

    A native one also takes None for the sizes: tensors count as a whole. It returns False, and has
    done nothing, if there is one that it cannot read as it lies.
    """
    if backend == "torch":
        return definition.update
    if backend == "triton":
        entry: Callable[..., Any] = triton_kernels(STEM).update
        return entry
    native = _native.module_for(backend)
    entry = native.activation_stats_update
    return entry if backend == "cpu" else _with_scratch(native, entry)


def rows_on_cpu(model: nn.Module, *buffers: Tensor | None) -> Any:
    """Return rows for the CPU kernels to which many calls add.

    They take tensors as a whole: ``add_output`` of the model if that is in training, ``add`` and
    ``add_grads``. The methods return False, and have done nothing, if kernels cannot read a tensor
    as it lies.
    """
    return _native.module_for("cpu").ActivationStatsRows(model, *buffers)


def _with_scratch(native: Any, entry: Callable[..., Any]) -> Callable[..., Any]:
    def run(tensors: list[Tensor], sizes: list[Sizes] | None, rows: list[int], *rest: Any) -> bool:
        device = tensors[0].device
        needed = native.activation_stats_scratch_size(tensors, sizes, rows)
        if needed is None:
            return False
        num_counters, num_bytes = needed
        counters = workspace(device, 4 * num_counters, STEM)
        partials = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        address = 0 if counters is None else counters.data_ptr()
        done: bool = entry(tensors, sizes, rows, *rest, address, partials.data_ptr())
        return done

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


def update_plain(
    tensors: list[Tensor],
    rows: list[int],
    armed: Tensor | None,
    moments: Tensor,
    counts: Tensor,
    histogram: Tensor | None,
    backend: str,
) -> bool:
    """Merge tensors as a whole into their rows if native kernels can read all as they lie.

    Returns False, and has done nothing, if they cannot.
    """
    if backend not in ("cpu", "cuda") or not tensors:
        return False
    done: bool = kernel_of(backend)(tensors, None, rows, armed, moments, counts, histogram)
    return done


def update(
    tensors: list[Tensor],
    first_rows: list[int],
    per_channel: bool,
    armed: Tensor | None,
    moments: Tensor,
    counts: Tensor,
    histogram: Tensor | None,
    backend: str | None = None,
) -> None:
    """Merge what tensors of one device hold into their rows."""
    if backend is None:
        backend = backends.active(STEM, moments.device)
    buffers = (armed, moments, counts, histogram)
    if not per_channel and update_plain(tensors, first_rows, *buffers, backend):
        return
    chosen = [
        (*readable(tensor, per_channel), row)
        for tensor, row in zip(tensors, first_rows, strict=True)
        if tensor.numel() > 0
    ]
    if not chosen:
        return
    read, sizes, rows = map(list, zip(*chosen, strict=True))
    kernel_of(backend)(read, sizes, rows, *buffers)
