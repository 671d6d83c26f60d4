"""Operators ``torch.ops.fastremedy.batch_norm_relu_*``: schema, fake and implementation.

They are what ``torch.compile`` sees. Gradients do not flow through them; the derivative is
:mod:`.batch_norm_relu_autograd`. An empty tensor stands for a result that was not asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import batch_norm_relu_dispatch as dispatch
from .batch_norm_relu import BOTH, FINISH, REDUCE
from .layouts import is_channels_last, like, with_kernel_layout

_library = torch.library.Library("fastremedy", "FRAGMENT")
_library.define("batch_norm_relu_sums(Tensor input) -> Tensor")
_library.define(
    "batch_norm_relu_forward(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, "
    "Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "bool training, float? momentum, float eps, str activation, float negative_slope, "
    "bool wants_mask=False, bool wants_dead=False, Tensor? sums=None) "
    "-> (Tensor output, Tensor saved, Tensor mask, Tensor dead)"
)
_library.define(
    "batch_norm_relu_backward_sums(Tensor grad_output, Tensor input, Tensor? residual, "
    "Tensor? mask, Tensor saved, Tensor? weight, Tensor? bias, str activation, "
    "float negative_slope, bool[] wants) -> (Tensor sums, Tensor grad_weight, Tensor grad_bias)"
)
_library.define(
    "batch_norm_relu_backward(Tensor grad_output, Tensor input, Tensor? residual, Tensor? mask, "
    "Tensor saved, Tensor? weight, Tensor? bias, bool training, str activation, "
    "float negative_slope, bool[] wants, Tensor? sums=None) "
    "-> (Tensor grad_input, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


def _sums(input: Tensor) -> Tensor:
    return dispatch.sums_of(with_kernel_layout(input))


def _fake_sums(input: Tensor) -> Tensor:
    return input.new_empty(2 * input.shape[1] + 1, dtype=torch.float64)


def _forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    wants_mask: bool = False,
    wants_dead: bool = False,
    sums: Tensor | None = None,
) -> tuple[Tensor, ...]:
    input = with_kernel_layout(input)
    result = dispatch.forward(
        input,
        None if residual is None else like(residual, input),
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        dispatch.Options(
            training, momentum, eps, activation, negative_slope, wants_mask, wants_dead
        ),
        sums,
        BOTH if sums is None else FINISH,
    )
    mask, dead = (_or_empty(tensor, input) for tensor in (result.mask, result.dead))
    return result.output, result.saved, mask, dead


def _fake_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
    negative_slope: float,
    wants_mask: bool = False,
    wants_dead: bool = False,
    sums: Tensor | None = None,
) -> tuple[Tensor, ...]:
    input = with_kernel_layout(input)
    saved, mask, dead = dispatch.new_results(input, is_channels_last(input), wants_mask, wants_dead)
    mask, dead = (_or_empty(tensor, input) for tensor in (mask, dead))
    return torch.empty_like(input), saved, mask, dead


def _backward_sums(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    sums = _fake_sums(input)
    grads = dispatch.backward(
        grad_output,
        input,
        residual,
        mask,
        saved,
        weight,
        bias,
        True,
        activation,
        negative_slope,
        wants,
        sums,
        REDUCE,
    )
    return sums, _or_empty(grads.weight, input), _or_empty(grads.bias, input)


def _fake_backward_sums(
    grad_output: Tensor,
    input: Tensor,
    residual: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    grads = dispatch.new_grads(input, weight, bias, wants)
    return _fake_sums(input), _or_empty(grads.weight, input), _or_empty(grads.bias, input)


def _backward(
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
    wants: list[bool],
    sums: Tensor | None = None,
) -> tuple[Tensor, ...]:
    grads = dispatch.backward(
        grad_output,
        input,
        residual,
        mask,
        saved,
        weight,
        bias,
        training,
        activation,
        negative_slope,
        wants,
        sums,
        BOTH if sums is None else FINISH,
    )
    return tuple(_or_empty(grad, input) for grad in grads)


def _fake_backward(
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
    wants: list[bool],
    sums: Tensor | None = None,
) -> tuple[Tensor, ...]:
    return tuple(_or_empty(grad, input) for grad in dispatch.new_grads(input, weight, bias, wants))


for _name, _implementation, _fake in (
    ("batch_norm_relu_sums", _sums, _fake_sums),
    ("batch_norm_relu_forward", _forward, _fake_forward),
    ("batch_norm_relu_backward_sums", _backward_sums, _fake_backward_sums),
    ("batch_norm_relu_backward", _backward, _fake_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastremedy::{_name}", _fake, lib=_library)
