"""From tensors to the kernels of a backend: layouts, and memory for what kernels write."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native, backends
from . import batch_norm_relu as definition
from .batch_norm_relu import ACTIVATIONS, BOTH, FINISH, REDUCE
from .dispatch import is_traced, is_transformed, triton_kernels, workspace
from .layouts import is_channels_last, like
from .memory import empty_like

STEM = "batch_norm_relu"

# input, residual, weight, bias, running_mean, running_var, num_batches_tracked
ForwardTensors = tuple[
    Tensor,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
    Tensor | None,
]


class Options(NamedTuple):
    """What a call asks for beside its tensors; the names are those of ``F.batch_norm``."""

    training: bool
    momentum: float | None
    eps: float
    activation: str
    negative_slope: float
    wants_mask: bool = False
    wants_dead: bool = False


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
    return Kernels(
        _with_scratch(native, native.batch_norm_relu_forward, input_position=0),
        _with_scratch(native, native.batch_norm_relu_backward, input_position=1),
    )


@functools.cache
def _cpu_kernels() -> Kernels:
    native = _native.module_for("cpu")
    return Kernels(native.batch_norm_relu_forward, native.batch_norm_relu_backward)


class Native(NamedTuple):
    """Entries of a native backend that take a whole pass, or tell by None that they cannot."""

    backend: str
    run_forward: Callable[..., tuple[Any, ...] | None]
    run_backward: Callable[..., tuple[Any, ...] | None]
    scratch: Callable[[Tensor, bool], tuple[Any, ...]] | None


def native_of(backend: str | None) -> Native | None:
    """Return the entries of a native backend, None if it is another one."""
    if backend not in ("cpu", "cuda"):
        return None
    return _entries(backend, _native.module_for(backend))


@functools.cache
def _entries(backend: str, module: ModuleType) -> Native:
    return Native(
        backend,
        module.batch_norm_relu_run_forward,
        module.batch_norm_relu_run_backward,
        None if backend == "cpu" else functools.partial(_scratch, module),
    )


def usual(tensors: ForwardTensors) -> Native | None:
    """Return whose entries to ask first; None where one has to look closer.

    They find out in one call what takes a dozen questions to torch, each as long as a small kernel:
    of ``is_plain`` only what they do not see is asked here. ``input.device`` alone would take 5 us
    of the 50 of a forward pass.
    """
    input = tensors[0]
    if is_traced(input) or is_transformed(*tensors):
        return None
    return native_of(backends.active(STEM, "cpu" if input.is_cpu else input.device))


def _with_scratch(
    native: Any, entry: Callable[..., None], input_position: int
) -> Callable[..., None]:
    def run(*args: Any) -> None:
        entry(*args, *_scratch(native, *args[input_position : input_position + 2]))

    return run


def _scratch(native: Any, input: Tensor, channels_last: bool) -> tuple[Any, ...]:
    """Return the addresses of counters and partial sums for CUDA kernels, and their owners."""
    num_counters, partial_bytes = native.batch_norm_relu_scratch_size(input, channels_last)
    counters = workspace(input.device, 4 * num_counters, STEM)
    partials = torch.empty(partial_bytes, dtype=torch.uint8, device=input.device)
    address = 0 if counters is None else counters.data_ptr()
    return address, partials.data_ptr(), counters, partials


class Forward(NamedTuple):
    """What a forward pass gives."""

    output: Tensor
    saved: Tensor  # [4, C]: mean, what rounding took from it, 1 / sqrt(variance + eps), variance
    mask: Tensor | None  # uint8 [rows, bytes], the signs of z
    dead: Tensor | None  # int64 [C], number of outputs that are not positive


def forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    options: Options,
    sums: Tensor | None = None,
    phase: int = BOTH,
    backend: str | None = None,
) -> Forward:
    """Normalise an input that has a kernel layout; update running statistics if training."""
    training, momentum, eps, activation, negative_slope, wants_mask, wants_dead = options
    output = empty_like(input)
    channels_last = is_channels_last(input)
    saved, mask, dead = new_results(input, channels_last, wants_mask, wants_dead)
    if input.numel() == 0 and phase == BOTH:
        if training and num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return Forward(output, saved.zero_(), mask, dead)
    kernels_of(backend or backends.active(STEM, input.device)).forward(
        input,
        channels_last,
        residual,
        output,
        mask,
        dead,
        saved,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        sums,
        phase,
        training,
        momentum,
        eps,
        ACTIVATIONS.index(activation),
        negative_slope,
    )
    if training:
        changed = [t for t in (running_mean, running_var, num_batches_tracked) if t is not None]
        if changed:
            torch.autograd.graph.increment_version(changed)
    return Forward(output, saved, mask, dead)


def new_results(
    input: Tensor, channels_last: bool, wants_mask: bool, wants_dead: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return memory for ``saved``, ``mask`` and ``dead`` of :class:`Forward`."""
    channels = input.size(1)
    if input.dtype in (torch.float32, torch.float64):  # takes half as long without a dtype
        saved = input.new_empty(4, channels)
    else:
        saved = input.new_empty(4, channels, dtype=torch.float32)
    mask = dead = None
    if wants_mask:  # rows begin with a new byte
        places = math.prod(input.shape[2:])
        row, rows = (channels, places) if channels_last else (places, channels)
        size = (input.shape[0] * rows, (row + 7) // 8)
        mask = input.new_empty(size, dtype=torch.uint8)
    if wants_dead:
        dead = input.new_zeros(channels, dtype=torch.int64)
    return saved, mask, dead


def sums_of(input: Tensor, backend: str | None = None) -> Tensor:
    """Return sum and sum of squares of every channel and the count of elements ``[2 C + 1]``."""
    channels = input.shape[1]
    sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=input.device)
    if input.numel() > 0:
        nothing = [None] * 10
        kernels = kernels_of(backend or backends.active(STEM, input.device))
        kernels.forward(
            input, is_channels_last(input), *nothing, sums, REDUCE, True, 0.0, 1.0, 0, 0.0
        )
    return sums


class Backward(NamedTuple):
    """Gradients; None where none was asked for."""

    input: Tensor | None
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def new_grads(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, wants: Sequence[bool]
) -> Backward:
    """Return memory for the gradients that are wanted."""
    wants_input, wants_residual, wants_weight, wants_bias = wants
    return Backward(
        empty_like(input) if wants_input else None,
        empty_like(input) if wants_residual else None,
        torch.empty_like(weight) if wants_weight and weight is not None else None,
        torch.empty_like(bias) if wants_bias and bias is not None else None,
    )


def backward(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    activation: str,
    negative_slope: float,
    wants: Sequence[bool],
    sums: Tensor | None = None,
    phase: int = BOTH,
    backend: str | None = None,
) -> Backward:
    """Return the gradients of input, residual, weight and bias that are wanted.

    In phase REDUCE ``sums`` ``[2 C + 1]`` is written, what ranks have to add up before FINISH, and
    the gradients of weight and bias; in FINISH those of input and residual.
    """
    grads = new_grads(input, weight, bias, wants)
    if input.numel() == 0 and phase != FINISH:
        for grad in (*grads, sums):
            if grad is not None:
                grad.zero_()
        return grads
    kernels_of(backend or backends.active(STEM, input.device)).backward(
        like(grad_output.resolve_neg(), input),
        input,
        is_channels_last(input),
        residual,
        mask,
        saved,
        weight,
        bias,
        *grads,
        sums,
        phase,
        training,
        ACTIVATIONS.index(activation),
        negative_slope,
    )
    return grads
