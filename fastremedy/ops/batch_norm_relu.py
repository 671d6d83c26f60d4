"""Operators ``batch_norm_relu_forward`` and ``_backward``: the definition in pure torch.

Both take what kernels take: tensors to read and, allocated, tensors to write (``csrc/core/
arguments.h`` says what is in them). :func:`composite` is the same with torch's own operators, and
:func:`gradients` are the derivatives as differentiable functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# The place of a name is its number in csrc/core/batch_norm_relu.h.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "silu")

# Their slope is one of two: a bit is kept instead of a residual.
SIGN_IS_ENOUGH = ("relu", "leaky_relu")

REDUCE, FINISH, BOTH = 0, 1, 2  # phases: ranks of a group sum up between the first two


def check_activation(activation: str) -> None:
    """Fail if there is no activation of that name."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def activate(z: Tensor, activation: str, negative_slope: float) -> Tensor:
    """Return ``activation(z)``."""
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "identity": lambda z: z,
        "relu": F.relu,
        "leaky_relu": lambda z: F.leaky_relu(z, negative_slope),
        "elu": F.elu,
        "silu": F.silu,
    }
    return functions[activation](z)


def activation_grad(
    grad: Tensor, z: Tensor, kept: Tensor, activation: str, negative_slope: float
) -> Tensor:
    """Return the gradient of ``z``; ``kept`` is :func:`keeps_grad`.

    Differentiable in ``z`` too, which is not used where the sign is enough.
    """
    if activation == "identity":
        return grad
    if activation == "relu":
        return torch.where(kept, grad, 0.0)
    if activation == "leaky_relu":
        return torch.where(kept, grad, grad * negative_slope)
    if activation == "elu":
        return torch.where(z > 0, grad, grad * z.clamp(max=0).exp())
    sigmoid = z.sigmoid()
    return grad * (sigmoid * (1 + z * (1 - sigmoid)))


def composite(
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
) -> Tensor:
    """Return the result by torch's own operators: three of them, for tensors of every kind."""
    counter = num_batches_tracked if training else None
    if momentum is None:
        momentum = 1.0 / (1.0 + float(counter)) if counter is not None else 0.0
    z = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if counter is not None:
        counter.add_(1)
    return activate(z if residual is None else z + residual, activation, negative_slope)


def gradients(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    grad_of: Callable[[Tensor, Tensor], Tensor],
    training: bool,
    means: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of input, weight, bias and residual.

    Args:
        grad_output: gradient of the output ``[N, C, *]``.
        input: ``[N, C, *]``, in the dtype to compute in.
        weight: ``[C]`` or None.
        bias: ``[C]`` or None.
        mean: of the channels ``[C]``; a function of ``input`` for second derivatives.
        invstd: 1 / sqrt(variance + eps) ``[C]``; the same.
        grad_of: gradient through the activation, of ``grad_output`` and z without the residual.
        training: whether mean and invstd are those of the batch.
        means: of g and of g * (x - mean) * invstd over all ranks ``[2, C]``, if there are others.
    """
    normal = (input - per_channel(mean, input)) * per_channel(invstd, input)
    z, scale = normal, invstd
    if weight is not None:
        z, scale = z * per_channel(weight.to(z.dtype), z), scale * weight.to(z.dtype)
    if bias is not None:
        z = z + per_channel(bias.to(z.dtype), z)
    g = grad_of(grad_output.to(z.dtype), z)
    grad_weight, grad_bias = (g * normal).sum(other_dims(g)), g.sum(other_dims(g))
    centered = g
    if training:
        if means is None:
            means = torch.stack([grad_bias, grad_weight]) / (g.numel() // g.shape[1])
        centered = g - per_channel(means[0], g) - normal * per_channel(means[1], g)
    return centered * per_channel(scale, g), grad_weight, grad_bias, g


def other_dims(input: Tensor) -> list[int]:
    """Return all dimensions but that of the channels."""
    return [dim for dim in range(input.dim()) if dim != 1]


def per_channel(values: Tensor, input: Tensor) -> Tensor:
    """Return ``values`` ``[C]`` in the shape that broadcasts over ``input`` ``[N, C, *]``."""
    return values.reshape(1, -1, *[1] * (input.dim() - 2))


def forward(
    input: Tensor,
    channels_last: bool,
    residual: Tensor | None,
    output: Tensor,
    mask: Tensor | None,
    dead: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    sums: Tensor | None,
    phase: int,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: int,
    negative_slope: float,
) -> None:
    """Write ``output``, ``saved`` and what else is not None: ``BatchNormForwardArgs`` in torch."""
    x, dims = input.double(), other_dims(input)
    count = x.new_tensor([x.numel() // x.shape[1]])
    if phase == REDUCE:
        assert sums is not None
        torch.cat([x.sum(dims), x.square().sum(dims), count], out=sums)
        return
    if not training:
        assert running_mean is not None
        assert running_var is not None
        mean, variance = running_mean.double(), running_var.double()
    elif phase == FINISH:
        assert sums is not None
        count = sums[-1]
        mean, mean_square = sums[:-1].view(2, -1) / count
        variance = (mean_square - mean.square()).clamp(min=0)
    else:
        variance, mean = torch.var_mean(x, dims, correction=0)
    if training:
        if num_batches_tracked is not None:
            num_batches_tracked += 1
        factor: float | Tensor = 0.0 if momentum is None else momentum
        if momentum is None and num_batches_tracked is not None:
            factor = 1.0 / num_batches_tracked.double()
        unbiased = variance * (count / (count - 1))
        for running, value in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                average = (1 - factor) * running.double() + factor * value
                running.copy_(torch.where(count > 0, average, running))
    invstd = (variance + eps).rsqrt()
    saved.copy_(torch.stack([mean, mean - mean.to(saved.dtype), invstd, variance]))
    z = (x - per_channel(mean, x)) * per_channel(invstd, x)
    if weight is not None:
        z = z * per_channel(weight.double(), x)
    if bias is not None:
        z = z + per_channel(bias.double(), x)
    if residual is not None:
        z = z + residual.double()
    positive = is_positive(z, input.dtype)
    name = ACTIVATIONS[activation]
    if name == "relu":
        output.copy_(torch.where(positive, z, 0.0))
    elif name == "leaky_relu":
        output.copy_(torch.where(positive, z, z * negative_slope))
    else:
        output.copy_(activate(z, name, negative_slope))
    if mask is not None:
        mask.copy_(pack_rows(keeps_grad(z, input.dtype, name), channels_last))
    if dead is not None:
        dead.copy_((~positive).sum(dims))


def backward(
    grad_output: Tensor,
    input: Tensor,
    channels_last: bool,
    residual: Tensor | None,
    mask: Tensor | None,
    saved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_input: Tensor | None,
    grad_residual: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    sums: Tensor | None,
    phase: int,
    training: bool,
    activation: int,
    negative_slope: float,
) -> None:
    """Write the gradients that are not None: ``BatchNormBackwardArgs`` in torch."""
    mean, mean_low, invstd = saved.double()[:3]
    x = input.double() - per_channel(mean, input)  # exact, and the mean of x is small

    def grad_of(grad: Tensor, z: Tensor) -> Tensor:
        if residual is not None:
            z = z + residual.double()
        name = ACTIVATIONS[activation]
        if mask is not None:
            kept = unpack_rows(mask, input.shape, channels_last)
        else:
            kept = keeps_grad(z, input.dtype, name)
        return activation_grad(grad, z, kept, name, negative_slope)

    means = None
    if phase == FINISH:
        assert sums is not None
        means = sums[:-1].view(2, -1) / sums[-1]
        means = torch.stack([means[0], means[1] * invstd])
    of_input, of_weight, of_bias, of_residual = gradients(
        grad_output, x, weight, bias, mean_low, invstd, grad_of, training, means
    )
    if phase == REDUCE:
        assert sums is not None
        count = x.new_tensor([x.numel() // x.shape[1]])
        torch.cat([of_bias, of_weight / invstd, count], out=sums)
    written = []
    if phase != FINISH:
        written += [(grad_weight, of_weight), (grad_bias, of_bias)]
    if phase != REDUCE:
        written += [(grad_input, of_input), (grad_residual, of_residual)]
    for target, value in written:
        if target is not None:
            target.copy_(value)


def is_positive(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether z is above zero, or NaN, when rounded to ``dtype``."""
    return ~(z.to(dtype) <= 0)


def keeps_grad(z: Tensor, dtype: torch.dtype, activation: str) -> Tensor:
    """Whether the gradient stays as it is; at NaN leaky ReLU scales it, as torch does."""
    return z.to(dtype) > 0 if activation == "leaky_relu" else is_positive(z, dtype)


def pack_rows(flags: Tensor, channels_last: bool) -> Tensor:
    """Return flags ``[N, C, *]`` as bits of rows: 8 neighbours to a byte, low bit first."""
    rows = flags.movedim(1, -1) if channels_last else flags.flatten(2)
    size = rows.shape[-1]
    bits = F.pad(rows.reshape(-1, size).to(torch.uint8), (0, -size % 8)).view(
        -1, (size + 7) // 8, 8
    )
    return (bits << torch.arange(8, device=flags.device, dtype=torch.uint8)).sum(2).to(torch.uint8)


def unpack_rows(mask: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """Return the flags of :func:`pack_rows`."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, device=mask.device, dtype=torch.uint8)
    rows = (bits & 1).bool().flatten(1)
    if channels_last:
        return rows[:, : shape[1]].reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    return rows[:, : math.prod(shape[2:])].reshape(shape)
