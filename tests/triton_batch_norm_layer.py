"""A BatchNorm layer that calls the Triton kernels, and the check of its results in float64."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

pytest.importorskip("triton")

from fastremedy.triton_kernels import batch_norm_relu

from fastremedy.ops.batch_norm_relu import ACTIVATIONS, BOTH

from .reference import UNIT_ROUNDOFF

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
# What rounding to a dtype may add, and the sums of a few hundred products.
PRECISION = {dtype: 20 * roundoff for dtype, roundoff in UNIT_ROUNDOFF.items()}
PRECISION |= {dtype: 1.01 * UNIT_ROUNDOFF[dtype] for dtype in (torch.float16, torch.bfloat16)}


def lay_out(tensor: Tensor, channels_last: bool) -> Tensor:
    """Return a copy [N, C, *] with its elements in one of the two orders."""
    if not channels_last:
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def randn(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> Tensor:
    return lay_out(torch.randn(shape, device=DEVICE).to(dtype), channels_last)


def rows_of(tensor: Tensor, channels_last: bool) -> Tensor:
    """Return the elements as rows, as the mask has them."""
    return (
        tensor.movedim(1, -1).flatten(0, -2) if channels_last else tensor.flatten(2).flatten(0, 1)
    )


def unpack(mask: Tensor, row_size: int) -> Tensor:
    bits = np.unpackbits(mask.cpu().numpy(), axis=1, bitorder="little")
    return torch.from_numpy(bits[:, :row_size]).bool().to(DEVICE)


class Layer:
    """The state of a layer, and calls of the kernels on it."""

    def __init__(
        self,
        channels: int,
        dtype: torch.dtype,
        channels_last: bool,
        activation: str = "relu",
        values: torch.dtype | None = torch.float32,
        **options: Any,
    ) -> None:
        self.channels, self.dtype, self.channels_last = channels, dtype, channels_last
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight = self.bias = None
        if values is not None:
            self.weight, self.bias = torch.randn(2, channels, device=DEVICE).to(values).unbind()
        self.running_mean = torch.randn(channels, device=DEVICE)
        self.running_var = 0.5 + torch.rand(channels, device=DEVICE)
        self.num_batches_tracked = torch.tensor(0, device=DEVICE)
        self.saved = torch.full((4, channels), math.nan, dtype=self.wide, device=DEVICE)
        self.sums: Tensor | None = None
        self.options = {"activation": ACTIVATIONS.index(activation), "negative_slope": 0.1}
        self.momentum, self.eps, self.training = 0.1, 1e-5, True
        for name, value in options.items():
            setattr(self, name, value)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        phase: int = BOTH,
        output: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return output, mask and dead."""
        rows = rows_of(input, self.channels_last)
        output = torch.empty_like(input) if output is None else output
        size = rows.shape[0], (rows.shape[1] + 7) // 8
        mask = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        dead = torch.zeros(self.channels, dtype=torch.int64, device=DEVICE)
        batch_norm_relu.forward(
            input,
            self.channels_last,
            residual,
            output,
            mask,
            dead,
            self.saved,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.num_batches_tracked,
            self.sums,
            phase,
            self.training,
            self.momentum,
            self.eps,
            **self.options,
        )
        return output, mask, dead

    def backward(
        self,
        grad: Tensor,
        input: Tensor,
        residual: Tensor | None = None,
        mask: Tensor | None = None,
        phase: int = BOTH,
        targets: Sequence[Tensor | None] = (),
    ) -> list[Tensor]:
        """Return the gradients of input, residual, weight and bias, written to ``targets``."""
        grads = [*targets]
        if not grads:
            grads = [torch.full_like(t, math.nan) for t in (input, input)]
            grads += [torch.full((self.channels,), math.nan, device=DEVICE) for _ in range(2)]
        batch_norm_relu.backward(
            grad,
            input,
            self.channels_last,
            residual,
            mask,
            self.saved,
            self.weight,
            self.bias,
            *grads,
            self.sums,
            phase,
            self.training,
            **self.options,
        )
        return grads


def activate(z: Tensor, activation: str) -> Tensor:
    functions = torch.nn.functional
    if activation == "identity":
        return z
    if activation == "leaky_relu":
        return functions.leaky_relu(z, 0.1)
    return getattr(functions, activation)(z)


def assert_near(actual: Tensor, expected: Tensor, precision: float) -> None:
    """Compare with the largest magnitude: a sum is as exact as its largest part."""
    torch.testing.assert_close(
        actual.double(), expected, rtol=precision, atol=precision * expected.abs().max().item()
    )


def check(layer: Layer, input: Tensor, residual: Tensor | None, mask_in_backward: bool) -> None:
    """Compare forward and backward with float64."""
    activation = ACTIVATIONS[layer.options["activation"]]
    leaves = [input, residual, layer.weight, layer.bias]
    wide = [t if t is None else t.double().detach().requires_grad_() for t in leaves]
    x, r, weight, bias = wide
    mean, var = (layer.running_mean.double(), layer.running_var.double())
    z = torch.nn.functional.batch_norm(
        x, mean, var, weight, bias, layer.training, layer.momentum, layer.eps
    )
    expected = activate(z if r is None else z + r, activation)
    output, mask, dead = layer.forward(input, residual)
    precision = PRECISION[layer.dtype]
    assert_near(output, expected.detach(), precision)
    assert_near(layer.running_mean, mean, PRECISION[torch.float32])
    assert_near(layer.running_var, var, PRECISION[torch.float32])
    positive = unpack(mask, rows_of(input, layer.channels_last).shape[1])
    if activation == "relu":
        expected_bits = rows_of(output, layer.channels_last) > 0
        assert torch.equal(positive, expected_bits)
        dims = [dim for dim in range(input.dim()) if dim != 1]
        assert torch.equal(dead, (output <= 0).sum(dims))
    grad = torch.randn_like(output)
    expected.backward(grad.double())
    if mask_in_backward:
        grads = layer.backward(grad, input, None, mask)
    else:
        grads = layer.backward(grad, input, residual)
    assert_near(grads[0], x.grad, precision)
    if r is not None:
        assert_near(grads[1], r.grad, precision)
    # Products of a channel cancel: they are compared with their size.
    scale = input.numel() / layer.channels
    for actual, leaf in zip(grads[2:], (weight, bias), strict=True):
        if leaf is not None:
            error = (actual - leaf.grad).abs().max().item()
            assert error <= PRECISION[torch.float32] * math.sqrt(scale) * 10
