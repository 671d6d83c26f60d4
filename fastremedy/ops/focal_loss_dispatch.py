"""From tensors to the kernels of a backend: layouts, and memory for what kernels write."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, backends
from . import focal_loss as definition
from .dispatch import triton_kernels, workspace
from .focal_loss import REDUCTIONS, ClassVectors, Options
from .memory import empty_like

STEM = "focal_loss"


class Kernels(NamedTuple):
    """The two entries of a backend."""

    forward: Callable[..., None]
    backward: Callable[..., None]


def kernels_of(backend: str) -> Kernels:
    """Return the entries of a backend; they take the arguments of the definition in its order."""
    if backend == "cpu":
        return _cpu_kernels()
    if backend == "torch":
        return Kernels(definition.forward, definition.backward)
    if backend == "triton":
        module = triton_kernels(STEM)
        return Kernels(module.forward, module.backward)
    native = _native.module_for(backend)
    return Kernels(_with_scratch(native, native.focal_loss_forward), native.focal_loss_backward)


@functools.cache
def _cpu_kernels() -> Kernels:
    native = _native.module_for("cpu")
    return Kernels(native.focal_loss_forward, native.focal_loss_backward)


def _with_scratch(native: Any, entry: Callable[..., None]) -> Callable[..., None]:
    def run(*args: Any) -> None:
        input, outer, classes, inner, _, softmax, reduction = args[:7]
        counter = partials = 0
        if REDUCTIONS[reduction] != "none":
            num_partials = native.focal_loss_num_partials(input, outer, classes, inner, softmax)
            memory = torch.empty(num_partials, dtype=torch.float64, device=input.device)
            shared = workspace(input.device, 4, STEM)
            assert shared is not None
            counter, partials = shared.data_ptr(), memory.data_ptr()
        entry(*args, counter, partials)

    return run


def sizes(input: Tensor) -> tuple[int, int, int]:
    """Return ``(outer, classes, inner)``: input ``[N, C, *]`` as it lies in memory."""
    num_classes = input.shape[1]
    if input.is_contiguous():
        return input.shape[0], num_classes, math.prod(input.shape[2:])
    return input.numel() // num_classes, num_classes, 1  # channels last


class Forward(NamedTuple):
    """What a forward pass gives."""

    loss: Tensor
    saved: Tensor | None  # [3, rows], for the backward pass of some kernels
    normalizer: Tensor | None  # float64 scalar, what the mean was divided by
    stats: Tensor | None  # int64 [2 * C + 1]


def new_results(
    input: Tensor, options: Options, loss_dtype: torch.dtype, wants_stats: bool, backend: str
) -> Forward:
    """Allocate what a forward pass writes."""
    reduction = REDUCTIONS[options.reduction]
    num_classes = input.shape[1]
    rows = input.numel() // num_classes
    if reduction != "none":
        loss = input.new_empty((), dtype=loss_dtype)
    elif options.softmax:
        loss = input.new_empty((input.shape[0], *input.shape[2:]), dtype=loss_dtype)
    elif loss_dtype == input.dtype:
        loss = empty_like(input)
    else:
        loss = torch.empty_like(input, dtype=loss_dtype)
    needs_saved = options.softmax and backend in ("cuda", "triton")
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    return Forward(
        loss,
        input.new_empty((3, rows), dtype=dtype) if needs_saved else None,
        input.new_empty((), dtype=torch.float64) if reduction == "mean" else None,
        input.new_zeros(2 * num_classes + 1, dtype=torch.int64) if wants_stats else None,
    )


def forward(
    input: Tensor,
    target: Tensor,
    classes: ClassVectors,
    options: Options,
    loss_dtype: torch.dtype,
    wants_stats: bool = False,
    grad_input: Tensor | None = None,
    backend: str | None = None,
) -> Forward:
    """Compute the loss of an input that has a kernel layout, and a target in the same order.

    ``grad_input`` also receives the gradient of the loss: only the CPU's kernels can do so.
    """
    if backend is None:
        backend = backends.active(STEM, input.device)
    result = new_results(input, options, loss_dtype, wants_stats, backend)
    kernels_of(backend).forward(
        input,
        *sizes(input),
        target,
        *options[:4],
        *classes,
        *options[4:],
        *result,
        grad_input,
    )
    return result


def backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    classes: ClassVectors,
    options: Options,
    saved: Tensor | None,
    normalizer: Tensor | None,
    backend: str | None = None,
) -> Tensor:
    """Return the gradient of the input; ``grad_output`` is in the order of the loss."""
    if backend is None:
        backend = backends.active(STEM, input.device)
    grad_input = empty_like(input)
    kernels_of(backend).backward(
        grad_output,
        input,
        *sizes(input),
        target,
        *options[:4],
        *classes,
        *options[4:],
        saved,
        normalizer,
        grad_input,
    )
    return grad_input
