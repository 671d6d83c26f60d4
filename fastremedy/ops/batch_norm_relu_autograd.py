"""Batch normalisation with residual and activation as a differentiable function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import batch_norm_relu_dispatch as dispatch
from .batch_norm_relu import (
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
from .layouts import is_channels_last

# grad_output, input, residual, mask, saved, weight, bias
_BackwardTensors = tuple[
    Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None, Tensor | None
]


class BatchNormReLU(torch.autograd.Function):
    """Forward and backward by kernels; backward twice by differentiable torch operators.

    For backward are kept: the input, vectors of the channels and, with a residual, the signs of
    z or, where those do not suffice, the residual.
    """

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
        backend: str | None,
        stats: list[Tensor] | None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the output.

        With ``wants_dead`` also saved statistics and dead outputs, or else ``stats`` gets them:
        outputs that take part in no derivative are faster without autograd.
        """
        tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
        output, saved, mask, dead = run_forward(tensors, options, group, backend)
        if mask is not None or options.activation == "identity":
            residual = None
        ctx.save_for_backward(input, weight, bias, saved, residual, mask)
        ctx.call = (options, group, backend)
        if dead is None:
            return output
        if stats is not None:
            stats += (saved, dead)
            return output
        ctx.mark_non_differentiable(saved, dead)
        ctx.set_materialize_grads(False)
        return output, saved, dead

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, residual, weight and bias."""
        grads: tuple[Tensor | None, ...] = (None, None, None, None)
        if grad_output is not None:
            differentiable = torch.is_grad_enabled()
            grads = (_differentiable_backward if differentiable else _backward)(ctx, grad_output)
        return *grads, None, None, None, None, None, None, None


# What Function.apply comes to if no tensor is of functorch; to find that out takes it 2 us.
apply_eagerly: Callable[..., Any] = super(torch.autograd.Function, BatchNormReLU).apply


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
        return dispatch.forward(*tensors, options, sums=sums, phase=phase, backend=backend)
    output, saved, mask, dead = torch.ops.fastremedy.batch_norm_relu_forward(
        *tensors, *options, sums
    )
    return dispatch.Forward(
        output, saved, mask if options.wants_mask else None, dead if options.wants_dead else None
    )


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight, bias, saved, residual, mask = ctx.saved_tensors
    options, group, backend = ctx.call
    needs = ctx.needs_input_grad
    is_identity = options.activation == "identity"
    wants = [needs[0], needs[1] and not is_identity, needs[2], needs[3]]
    tensors = (grad_output, input, residual, mask, saved, weight, bias)
    name, slope = options.activation, options.negative_slope
    if group is not None:
        grads = _synchronized_backward(tensors, options, wants, group, backend)
    elif backend is not None:
        grads = dispatch.backward(*tensors, options.training, name, slope, wants, backend=backend)
    else:
        grads = torch.ops.fastremedy.batch_norm_relu_backward(
            *tensors, options.training, name, slope, wants
        )
        grads = tuple(grad if wanted else None for grad, wanted in zip(grads, wants, strict=True))
    if is_identity and needs[1]:
        return grads[0], grad_output, grads[2], grads[3]
    return grads


def _synchronized_backward(
    tensors: _BackwardTensors,
    options: dispatch.Options,
    wants: list[bool],
    group: Any,
    backend: str | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients; those of weight and bias are of this rank alone, as in torch."""
    name, slope = options.activation, options.negative_slope
    of_elements, of_channels = [*wants[:2], False, False], [False, False, *wants[2:]]
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
    options, group, _ = ctx.call
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
            kept = unpack_rows(mask, input.shape, is_channels_last(input))
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
