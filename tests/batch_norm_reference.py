"""Batch normalisation, residual and activation by torch's operators, in float64 and as they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastremedy

from .reference import assert_close_to_reference

ACTIVATIONS = ("relu", "leaky_relu", "elu", "silu", "identity")
NEGATIVE_SLOPE = 0.1

# Arrangements of the elements of [N, C, *]; the values stay.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "last": lambda t: channels_last(t),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(
        *reversed(range(t.dim()))
    ),
    "sliced": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "sliced_channels": lambda t: torch.cat([t, t + 1], 1)[:, : t.shape[1]],
    "sliced_batch": lambda t: torch.cat([t + 1, t])[t.shape[0] :],
    "column": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
    "misaligned_last": lambda t: torch.cat(
        [t.new_zeros(1), t.movedim(1, -1).reshape(-1)]
    )[1:].view(t.movedim(1, -1).shape).movedim(-1, 1),
}  # fmt: skip


def channels_last(tensor: Tensor) -> Tensor:
    """Return a copy ``[N, C, *]`` that lies in memory as ``[N, *, C]``."""
    return tensor.movedim(1, -1).clone(memory_format=torch.contiguous_format).movedim(-1, 1)


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "identity":
        return z
    if activation == "leaky_relu":
        return F.leaky_relu(z, NEGATIVE_SLOPE)
    function: Callable[[Tensor], Tensor] = getattr(F, activation)
    return function(z)


class Tensors(NamedTuple):
    """What a call reads and updates."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> Tensors:
        return Tensors(*(None if t is None else function(t) for t in self))  # type: ignore[arg-type]

    def with_vectors(self, dtype: torch.dtype) -> Tensors:
        """Return the same with everything per channel in another dtype."""
        vectors = Tensors(*self).map(lambda t: t.detach().to(dtype))
        return vectors._replace(input=self.input, residual=self.residual)


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what torch wants weight, bias and running statistics of an input to be."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def make_tensors(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    residual: bool = False,
    layout: str = "contiguous",
) -> Tensors:
    channels, vectors = shape[1], vector_dtype(dtype)
    input = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype))
    other = LAYOUTS[layout](torch.randn(shape, device=device).to(dtype)) if residual else None
    weight, bias, mean = (torch.randn(channels, device=device, dtype=vectors) for _ in range(3))
    variance = torch.rand(channels, device=device, dtype=vectors) + 0.5
    return Tensors(input, other, weight, bias, mean, variance)


def eager(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
) -> Tensor:
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return activate(z if residual is None else z + residual, activation)


def run(
    function: Callable[..., Tensor],
    tensors: Tensors,
    grad: Tensor,
    training: bool = True,
    activation: str = "relu",
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Tensor]:
    """Return output, gradients and running statistics; ``tensors`` stay as they are."""
    leaves = tensors.map(lambda t: t.detach().requires_grad_())
    mean, var = leaves.running_mean, leaves.running_var
    leaves = leaves._replace(
        running_mean=None if mean is None else mean.detach().clone(),
        running_var=None if var is None else var.detach().clone(),
    )
    output = function(
        leaves.input,
        leaves.running_mean,
        leaves.running_var,
        leaves.weight,
        leaves.bias,
        training,
        momentum,
        eps,
        residual=leaves.residual,
        activation=activation,
        negative_slope=NEGATIVE_SLOPE,
    )
    output.backward(grad)
    results: dict[str, Tensor | None] = {"output": output.detach()}
    for name in ("input", "residual", "weight", "bias"):
        leaf = getattr(leaves, name)
        results[f"{name}.grad"] = None if leaf is None else leaf.grad
        assert leaf is None or leaf.grad.dtype == leaf.dtype
    results |= {"running_mean": leaves.running_mean, "running_var": leaves.running_var}
    return {name: value for name, value in results.items() if value is not None}


def assert_matches_torch(
    tensors: Tensors, grad: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """Hold forward, all gradients and the running statistics to twice torch's own error."""
    input = tensors.input
    grad = torch.randn_like(input) if grad is None else grad
    wide = tensors.map(lambda t: t.detach().cpu().double())
    reference = run(eager, wide, grad.cpu().double(), **options)
    by_torch = run(eager, tensors.with_vectors(vector_dtype(input.dtype)), grad, **options)
    ours = run(fastremedy.functional.batch_norm_relu, tensors, grad, **options)
    assert ours.keys() == reference.keys()
    scales = magnitudes(wide, grad.cpu().double(), **options)
    for name, expected in reference.items():
        actual = ours[name]
        if actual.dtype == torch.float64:  # no more exact than what it was computed in
            actual = actual.to(by_torch[name].dtype)
        assert_close_to_reference(
            actual, expected, by_torch[name].to(actual.dtype), scale=scales.get(name)
        )
    return ours


def magnitudes(
    wide: Tensors,
    grad: Tensor,
    training: bool = True,
    eps: float = 1e-5,
    **_: Any,
) -> dict[str, float]:
    """Return the largest number that takes part in a result where parts of it may cancel."""
    x, residual, weight, bias, mean, var = wide
    dims = [dim for dim in range(x.dim()) if dim != 1]
    if x.numel() == 0 or not x.isfinite().all():
        return {}
    if training or mean is None or var is None:
        var, mean = torch.var_mean(x, dims, correction=0)
    column = (1, -1, *[1] * (x.dim() - 2))
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.abs()
    normal = (x - mean.view(column)).abs()
    z = normal * scale.view(column)
    for part in (None if bias is None else bias.view(column), residual):
        z = z if part is None else z + part.abs()
    return {
        "output": z.max().item(),
        "input.grad": ((grad.abs() + grad.abs().mean()) * scale.view(column)).max().item(),
        "weight.grad": (grad.abs() * normal * invstd.view(column)).sum(dims).max().item(),
        "bias.grad": grad.abs().sum(dims).max().item(),
        "running_mean": x.abs().max().item(),
    }


def is_slow(backend: str) -> bool:
    """Whether kernels are emulated or interpreted."""
    return backend in ("cuda", "triton") and not torch.cuda.is_available()


def spare(backend: str, case: bool) -> None:
    """Skip a case for emulated and interpreted kernels, which take their time."""
    if case and is_slow(backend):
        pytest.skip("without a GPU other cases run the same lines of the kernels")


def count(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a channel."""
    return shape[0] * math.prod(shape[2:])
