"""Batch normalisation with residual and activation as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import batch_norm_relu_dispatch as dispatch
from .batch_norm_relu import (
    ACTIVATIONS,
    BOTH,
    FINISH,
    REDUCE,
    activation_grad,
    gradients,
    keeps_grad,
    other_dims,
    unpack_rows,
)
from .batch_norm_relu_dispatch import ForwardTensors
from .layouts import in_order, is_channels_last, like, with_kernel_layout

# grad_output, input, residual, mask, saved, weight, bias
_BackwardTensors = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None
]
# What backward has to know beside tensors: options, group, backend (None for tracers), and whether
# the mask is of channels-last elements: hooks of saved tensors may change the order of the input's.
Call = tuple[dispatch.Options, Any, str | None, bool]


class BatchNormReLU(torch.autograd.Function):
    """Makes what :func:`run_forward` has done differentiable.

    Kernels run before autograd sees the call: with all their arguments going through it, it would
    take longer than they do for a small map. Backward runs kernels; backward twice differentiable
    torch operators. For backward are kept: the input, vectors of the channels and, with a residual,
    the signs of z or, where those do not suffice, the residual.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        result: tuple[Any, ...],
        call: Call,
    ) -> Tensor:
        """Return the output; ``result`` has the fields of :class:`.dispatch.Forward`."""
        output: Tensor = result[0]
        saved, mask = result[1:3]
        _remember(ctx, input, residual, weight, bias, saved, mask, call)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, residual, weight and bias."""
        return *_gradients(ctx, grad_output), None, None


# What Function.apply comes to if no tensor is of functorch; to find that out takes it 2 us.
apply: Callable[..., Tensor] = super(torch.autograd.Function, BatchNormReLU).apply


class TracedBatchNormReLU(torch.autograd.Function):
    """The same for tracers, who are to see the operators of both passes."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        options: dispatch.Options,
        group: Any,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the output; with ``wants_dead`` also saved statistics and dead outputs."""
        tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
        output, saved, mask, dead = run_forward(tensors, options, group, None)
        call = (options, group, None, is_channels_last(input))
        _remember(ctx, input, residual, weight, bias, saved, mask, call)
        if dead is None:
            return output
        ctx.mark_non_differentiable(saved, dead)
        ctx.set_materialize_grads(False)
        return output, saved, dead

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, residual, weight and bias."""
        return *_gradients(ctx, grad_output), None, None, None, None, None


def _remember(
    ctx: Any,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    mask: Tensor | None,
    call: Call,
) -> None:
    if mask is not None or call[0].activation == "identity":
        residual = None
    ctx.save_for_backward(input, weight, bias, saved, residual, mask)
    ctx.call = call


def _gradients(ctx: Any, grad_output: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return None, None, None, None
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad_output)
    return _backward(ctx, grad_output)


def run_forward(
    tensors: ForwardTensors, options: dispatch.Options, group: Any, backend: str | None
) -> dispatch.Forward:
    """Normalise, without a derivative.

    Args:
        tensors: input and residual have one kernel layout.
        options: what is asked for.
        group: synchronises the statistics over its ranks; None does not.
        backend: whose kernels run. None goes through torch.ops, for tracers to see.
    """
    sums, phase = None, BOTH
    if group is not None:
        phase = FINISH
        if backend is None:
            sums = torch.ops.fastremedy.batch_norm_relu_sums(tensors[0])
        else:
            sums = dispatch.sums_of(tensors[0], backend)
        torch.distributed.all_reduce(sums, group=group)
    if backend is not None:
        return dispatch.forward(*tensors, options, sums, phase, backend)
    output, saved, mask, dead = torch.ops.fastremedy.batch_norm_relu_forward(
        *tensors, *options, sums
    )
    return dispatch.Forward(
        output, saved, mask if options.wants_mask else None, dead if options.wants_dead else None
    )


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, saved, residual, mask = ctx.saved_tensors
    options, group, backend, mask_is_channels_last = ctx.call
    training, _, _, name, slope, _, _ = options
    wants_input, wants_residual, wants_weight, wants_bias = ctx.needs_input_grad[:4]
    is_passed_on = wants_residual and name == "identity"
    wants = (wants_input, wants_residual and not is_passed_on, wants_weight, wants_bias)
    grads: tuple[Tensor | None, ...] | None = None
    tensors = (grad_output, input, residual, mask, saved, weight, bias)
    native = dispatch.native_of(backend) if group is None else None
    if native is not None:
        number = ACTIVATIONS.index(name)
        grads = native.run_backward(
            *tensors, mask_is_channels_last, training, number, slope, *wants, native.scratch
        )
    if grads is None:
        grads = _general_backward(tensors, ctx.call, wants)
    return (grads[0], grad_output, *grads[2:]) if is_passed_on else grads


def _general_backward(
    tensors: _BackwardTensors, call: Call, wants: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    options, group, backend, mask_is_channels_last = call
    training, _, _, name, slope, _, _ = options
    if backend is not None:
        grad_output, input, residual, mask, saved, weight, bias = tensors
        if mask is None:
            input = with_kernel_layout(input)
        else:
            input = in_order(input, mask_is_channels_last)
        residual = None if residual is None else like(residual, input)
        tensors = (grad_output, input, residual, mask, saved, weight, bias)
    if group is not None:
        return _synchronized_backward(tensors, options, wants, group, backend)
    if backend is not None:
        return dispatch.backward(*tensors, training, name, slope, wants, None, BOTH, backend)
    grads = torch.ops.fastremedy.batch_norm_relu_backward(*tensors, training, name, slope, wants)
    return tuple(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))


def _synchronized_backward(
    tensors: _BackwardTensors,
    options: dispatch.Options,
    wants: tuple[bool, ...],
    group: Any,
    backend: str | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients; those of weight and bias are of this rank alone, as in torch."""
    name, slope = options.activation, options.negative_slope
    of_elements, of_channels = (*wants[:2], False, False), (False, False, *wants[2:])
    grad_weight: Tensor | None
    grad_bias: Tensor | None
    if backend is None:
        sums, grad_weight, grad_bias = torch.ops.fastremedy.batch_norm_relu_backward_sums(
            *tensors, name, slope, of_channels
        )
        torch.distributed.all_reduce(sums, group=group)
        grads = torch.ops.fastremedy.batch_norm_relu_backward(
            *tensors, True, name, slope, of_elements, sums
        )
        grads = (grads[0], grads[1], grad_weight, grad_bias)
        return tuple(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))
    input = tensors[1]
    sums = input.new_empty(2 * input.shape[1] + 1, dtype=torch.float64)
    _, _, grad_weight, grad_bias = dispatch.backward(
        *tensors, True, name, slope, of_channels, sums=sums, phase=REDUCE, backend=backend
    )
    torch.distributed.all_reduce(sums, group=group)
    grads = dispatch.backward(
        *tensors, True, name, slope, of_elements, sums=sums, phase=FINISH, backend=backend
    )
    return grads.input, grads.residual, grad_weight, grad_bias


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, saved, residual, mask = ctx.saved_tensors
    options, group, _, mask_is_channels_last = ctx.call
    if group is not None:
        raise RuntimeError(
            "synchronized batch normalization cannot be differentiated twice: create_graph must be "
            "False, or the group have one rank"
        )
    x = input.to(saved.dtype)
    mean, _, invstd, _ = saved
    if options.training:
        variance, mean = torch.var_mean(x, other_dims(x), correction=0)
        invstd = (variance + options.eps).rsqrt()

    def grad_of(grad: Tensor, z: Tensor) -> Tensor:
        if mask is not None:
            kept = unpack_rows(mask, input.shape, mask_is_channels_last)
        else:
            z = z if residual is None else z + residual.to(z.dtype)
            kept = keeps_grad(z, input.dtype, options.activation)
        return activation_grad(grad, z, kept, options.activation, options.negative_slope)

    of_input, of_weight, of_bias, of_residual = gradients(
        grad_output, x, weight, bias, mean, invstd, grad_of, options.training
    )
    needs = ctx.needs_input_grad[:4]
    grads = (
        of_input.to(input.dtype),
        of_residual.to(input.dtype),
        None if weight is None else of_weight.to(weight.dtype),
        None if bias is None else of_bias.to(bias.dtype),
    )
    return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
