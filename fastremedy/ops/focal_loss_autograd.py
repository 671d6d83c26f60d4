"""Focal loss as a differentiable function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import focal_loss_dispatch as dispatch
from .dispatch import is_plain
from .focal_loss import REDUCTIONS, ClassVectors, Options, composite, compute_dtype
from .layouts import like
from .memory import empty_like


class FocalLoss(torch.autograd.Function):
    """Forward and backward by kernels; backward twice by differentiable torch operators.

    The CPU's kernels compute the gradient of a sum or mean together with it, while the logits are
    in the cache. It is handed out once; whoever asks again has it computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        alpha: Tensor | None,
        weight: Tensor | None,
        pos_weight: Tensor | None,
        options: Options,
        loss_dtype: torch.dtype,
        wants_stats: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the loss and, if wanted, statistics."""
        classes = ClassVectors(alpha, weight, pos_weight)
        is_fused = backend == "cpu" and REDUCTIONS[options.reduction] != "none"
        ctx.grad_input = empty_like(input) if is_fused else None
        loss, saved, normalizer, stats = run_forward(
            input, target, classes, options, loss_dtype, wants_stats, backend, ctx.grad_input
        )
        ctx.save_for_backward(input, target, *classes, saved, normalizer)
        ctx.call = (options, loss_dtype, backend, is_fused)
        if stats is not None:
            ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input."""
        grad: Tensor | None = None
        if grad_output is not None:
            # Compilers trace this with gradients off, and may not be asked what a tensor is.
            is_first = torch.compiler.is_compiling() or (
                is_plain(grad_output) and not torch.is_grad_enabled()
            )
            grad = (_backward if is_first else _differentiable_backward)(ctx, grad_output)
        return grad, None, None, None, None, None, None, None, None


def run_forward(
    input: Tensor,
    target: Tensor,
    classes: ClassVectors,
    options: Options,
    loss_dtype: torch.dtype,
    wants_stats: bool,
    backend: str | None,
    grad_input: Tensor | None = None,
) -> dispatch.Forward:
    """Compute the loss without a derivative; no backend goes through torch.ops, for tracers."""
    if backend is not None:
        return dispatch.forward(
            input, target, classes, options, loss_dtype, wants_stats, grad_input, backend
        )
    loss, saved, normalizer, stats = torch.ops.fastremedy.focal_loss_forward(
        input, target, *classes, *options, loss_dtype, wants_stats
    )
    return dispatch.Forward(loss, saved, normalizer, stats if wants_stats else None)


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    input, target, alpha, weight, pos_weight, saved, normalizer = ctx.saved_tensors
    options, loss_dtype, backend, is_fused = ctx.call
    classes = ClassVectors(alpha, weight, pos_weight)
    if is_fused:
        grad: Tensor | None = ctx.grad_input
        ctx.grad_input = None
        if grad is None:
            grad = empty_like(input)
            run_forward(input, target, classes, options, loss_dtype, False, backend, grad)
        factor = float(grad_output)
        return grad if factor == 1.0 else grad.mul_(factor)
    if REDUCTIONS[options.reduction] == "none":
        grad_output = grad_output.resolve_neg()
        grad_output = grad_output.contiguous() if options.softmax else like(grad_output, input)
    if backend is not None:
        return dispatch.backward(
            grad_output, input, target, classes, options, saved, normalizer, backend
        )
    result: Tensor = torch.ops.fastremedy.focal_loss_backward(
        grad_output, input, target, *classes, *options, saved, normalizer
    )
    return result


def _differentiable_backward(ctx: Any, grad_output: Tensor) -> Tensor:
    input, target, alpha, weight, pos_weight, *_ = ctx.saved_tensors
    options, loss_dtype, *_ = ctx.call
    with torch.enable_grad():
        x = input.to(compute_dtype(input))
        loss = composite(x, target, ClassVectors(alpha, weight, pos_weight), options)
        grads: tuple[Tensor, ...] = torch.autograd.grad(
            loss.to(loss_dtype), input, grad_output, create_graph=True
        )
    return grads[0]
