"""Operators ``torch.ops.fastremedy.focal_loss_*``: schema, fake and implementation.

They are what ``torch.compile`` sees. Gradients do not flow through them; the derivative is
:mod:`.focal_loss_autograd`. An empty tensor stands for a result that was not asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from . import focal_loss_dispatch as dispatch
from .focal_loss import ClassVectors, Options

_CALL = (
    "Tensor input, Tensor target, Tensor? alpha, Tensor? weight, Tensor? pos_weight, bool softmax, "
    "int reduction, float gamma, float alpha_value, float label_smoothing, int ignore_index, "
    "int background, "
)
_library = torch.library.Library("fastremedy", "FRAGMENT")
_library.define(
    f"focal_loss_forward({_CALL} ScalarType loss_dtype, bool wants_stats=False) "
    "-> (Tensor loss, Tensor saved, Tensor normalizer, Tensor stats)"
)
_library.define(
    f"focal_loss_backward(Tensor grad_output, {_CALL} Tensor? saved, Tensor? normalizer) -> Tensor"
)


def _or_empty(result: dispatch.Forward) -> tuple[Tensor, ...]:
    return tuple(result.loss.new_empty(0) if t is None else t for t in result)


def _forward(input: Tensor, target: Tensor, *call: Any) -> tuple[Tensor, ...]:
    classes, options = ClassVectors(*call[:3]), Options(*call[3:10])
    return _or_empty(dispatch.forward(input, target, classes, options, *call[10:]))


def _fake_forward(
    input: Tensor, target: Tensor, *call: Any, wants_stats: bool = False
) -> tuple[Tensor, ...]:
    options, loss_dtype = Options(*call[3:10]), call[10]
    wants_stats = call[11] if len(call) > 11 else wants_stats
    backend = backends.active(dispatch.STEM, input.device)
    return _or_empty(dispatch.new_results(input, options, loss_dtype, wants_stats, backend))


def _backward(grad_output: Tensor, input: Tensor, target: Tensor, *call: Any) -> Tensor:
    classes, options = ClassVectors(*call[:3]), Options(*call[3:10])
    return dispatch.backward(grad_output, input, target, classes, options, *call[10:])


def _fake_backward(grad_output: Tensor, input: Tensor, *call: Any) -> Tensor:
    return torch.empty_like(input)


for _name, _implementation, _fake in (
    ("focal_loss_forward", _forward, _fake_forward),
    ("focal_loss_backward", _backward, _fake_backward),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastremedy::{_name}", _fake, lib=_library)
