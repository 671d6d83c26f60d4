"""Batch normalisation with residual and activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..ops import batch_norm_relu_dispatch as dispatch
from ..ops.batch_norm_relu import (
    ACTIVATIONS,
    SIGN_IS_ENOUGH,
    activate,
    check_activation,
    composite,
    other_dims,
)
from ..ops.batch_norm_relu_autograd import TracedBatchNormReLU, apply, run_forward
from ..ops.dispatch import KERNEL_DTYPES, has_kernels, is_plain, is_traced
from ..ops.layouts import is_channels_last, like, with_kernel_layout

_TENSORS = (  # of dispatch.ForwardTensors
    "input",
    "residual",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
)


class BatchNormStats(NamedTuple):
    """What the forward pass saw of every channel, each ``[C]``; over all ranks if synchronised.

    ``dead`` is of this rank alone.
    """

    mean: Tensor  # of the input
    var: Tensor  # of the input, biased
    dead: Tensor  # share of outputs that are not positive, float32
    nonfinite: Tensor  # bool: NaN, infinity or values whose squares overflow


def batch_norm_relu(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """Normalise each channel over the batch, add ``residual`` and apply an activation.

    Equivalent to: ``relu(F.batch_norm(input, running_mean, running_var, weight, bias, training,
    momentum, eps) + residual)``, in one operator that reads the input twice and writes once. For
    the backward pass it keeps the input and vectors of the channels; with a residual one bit of
    every element.

    Differs in:
        - The variance is exact to 1e-6 also where the mean is 1e4 standard deviations.
        - Results of half precision are rounded once, after the activation.
        - ``num_batches_tracked`` is counted in the same pass; with ``momentum=None`` it weights the
          average, without waiting for the device.

    Args:
        input: ``[N, C]`` or ``[N, C, *]``, of any strides; contiguous and channels-last memory is
            taken as it lies. float32, float64, float16 or bfloat16.
        running_mean: ``[C]``, updated in training; in evaluation the mean to use.
        running_var: ``[C]``, the same for the (unbiased) variance.
        weight: ``[C]`` of any floating dtype; None is 1.
        bias: ``[C]`` of any floating dtype; None is 0.
        training: use statistics of the batch instead of the running ones.
        momentum: weight of the batch in the running statistics. None: their plain average over
            ``num_batches_tracked`` batches.
        eps: added to the variance.
        residual: added before the activation, usually of the shape of ``input``.
        activation: ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``"leaky_relu"``.
        num_batches_tracked: int64 scalar, incremented in training.

    Returns:
        A tensor of the shape, dtype and memory format of ``input``.

    Raises:
        ValueError: unknown activation; one value per channel in training; an ``eps`` that is not
            positive.
        RuntimeError: shapes do not match, or ``num_batches_tracked`` has not one element.
        TypeError: an argument is of another type.

    Example:
        >>> import torch, fastremedy
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> fastremedy.functional.batch_norm_relu(x, None, None, training=True)
        tensor([[0.0000],
                [0.0000],
                [1.2247]])
    """
    check_activation(activation)
    output, _ = batch_norm_relu_with_stats(
        input,
        residual,
        weight,
        bias,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        activation,
        negative_slope,
    )
    return output


class RawStats(NamedTuple):
    """What kernels leave of the statistics; :meth:`resolve` launches what makes them readable."""

    saved: Tensor
    dead: Tensor
    numel: int  # of a channel

    def resolve(self) -> BatchNormStats:
        """Return the statistics."""
        mean, _, _, variance = self.saved
        dead = self.dead / max(1, self.numel)
        return BatchNormStats(mean, variance, dead.float(), ~variance.isfinite())


def batch_norm_relu_with_stats(
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
    wants_stats: bool = False,
    group: Any = None,
) -> tuple[Tensor, RawStats | None]:
    """Return the output and, if wanted, statistics; ``group`` shares those over its ranks."""
    if momentum is None and num_batches_tracked is None:
        momentum = 0.0  # an average over no batches, as in torch's modules
    tensors = (input, residual, weight, bias, running_mean, running_var, num_batches_tracked)
    options = dispatch.Options(
        training, momentum, eps, activation, negative_slope, False, wants_stats
    )
    native = None if group is not None else dispatch.usual(tensors)
    if native is not None:
        try:
            needs_grad = _needs_grad(tensors)
            result = native.run_forward(
                *tensors,
                training,
                momentum,
                eps,
                ACTIVATIONS.index(activation),
                negative_slope,
                needs_grad and residual is not None and activation in SIGN_IS_ENOUGH,
                wants_stats,
                native.scratch,
            )
        except (AttributeError, TypeError):  # which know no names
            _check_types(tensors, options)
            raise
        if result is not None:
            output, saved, _, dead, numel = result
            if needs_grad:
                output = _record(tensors, options, result, None, native.backend)
            return output, None if dead is None else RawStats(saved, dead, numel)
    return _prepare_and_run(tensors, options, group)


def _prepare_and_run(
    tensors: dispatch.ForwardTensors, options: dispatch.Options, group: Any
) -> tuple[Tensor, RawStats | None]:
    """Run what can take the tensors, whatever they are; kernels get them in a layout of theirs."""
    input, residual, weight, bias, running_mean, running_var, num_batches_tracked = tensors
    vectors = (weight, bias, running_mean, running_var)
    training, momentum, eps, activation, negative_slope, _, wants_stats = options
    if not torch.compiler.is_compiling():
        _check_types(tensors, options)
    if residual is not None:
        _check_residual(residual, input)
    if num_batches_tracked is not None and num_batches_tracked.numel() != 1:
        raise RuntimeError(
            "num_batches_tracked must have one element, got shape "
            f"{list(num_batches_tracked.shape)}"
        )
    backend: str | None
    if not _kernels_take(input, vectors, num_batches_tracked):
        backend = "torch"
        if group is not None:
            raise RuntimeError(
                "synchronized batch normalization takes plain tensors [N, C, *] of a "
                f"floating-point dtype and vectors [C] on their device, got {_describe(input)} and "
                f"{', '.join(_describe(v) for v in vectors if v is not None)}"
            )
    elif is_traced(input):
        # Tracers, whose tensors are of other types, are to see an operator; what is exported has to
        # run without this package; is_exporting() holds in every trace of torch 2.11.
        sees_kernels = (
            has_kernels(dispatch.STEM, input.device.type) and not torch.compiler._is_exporting_flag
        )
        # Traced by torch 2.11, the backward pass of torch's own code loses the sums of a group.
        backend = None if sees_kernels or group is not None else "torch"
        if residual is input:  # Dynamo's functions take no tensor twice
            residual = input.view_as(input)
    else:
        backend = backends.active(dispatch.STEM, input.device)
        if group is None and not _is_valid(input, vectors, training, eps):
            backend = "torch"
        if backend != "torch":  # torch's lazy minus sign, which kernels do not see
            input = input.resolve_neg()
            residual = None if residual is None else residual.resolve_neg()
    if backend == "torch" and group is None:
        output = composite(
            input,
            residual,
            *vectors,
            num_batches_tracked,
            training,
            momentum,
            eps,
            activation,
            negative_slope,
        )
        return output, _measure(input, output) if wants_stats else None
    if residual is not None and not _is_like(residual, input):  # their sum has another dtype
        output, _ = batch_norm_relu_with_stats(
            input,
            None,
            *vectors,
            num_batches_tracked,
            training,
            momentum,
            eps,
            "identity",
            0.0,
            False,
            group,
        )
        output = activate(output + residual, activation, negative_slope)
        return output, _measure(input, output) if wants_stats else None
    input = with_kernel_layout(input)
    if residual is not None:
        residual = like(residual, input)
    tensors = (input, residual, *vectors, num_batches_tracked)
    return _run_kernels(tensors, options, group, backend)


def _needs_grad(tensors: dispatch.ForwardTensors) -> bool:
    if not torch.is_grad_enabled():
        return False
    return tensors[0].requires_grad or any([t.requires_grad for t in tensors if t is not None])


def _run_kernels(
    tensors: dispatch.ForwardTensors, options: dispatch.Options, group: Any, backend: str | None
) -> tuple[Tensor, RawStats | None]:
    """Run kernels on tensors that have one layout; tracers see operators instead."""
    input = tensors[0]
    if not _needs_grad(tensors):
        output, saved, _, dead = run_forward(tensors, options, group, backend)
        return output, None if dead is None else _raw_stats(input, saved, dead)
    if tensors[1] is not None and options.activation in SIGN_IS_ENOUGH:
        options = options._replace(wants_mask=True)
    if backend is None:
        results: Any = TracedBatchNormReLU.apply(*tensors, options, group)  # type: ignore[no-untyped-call]
        if not options.wants_dead:
            return results, None
        output, saved, dead = results
        return output, _raw_stats(input, saved, dead)
    with torch.no_grad():  # the definition's kernels are operators of torch
        result = run_forward(tensors, options, group, backend)
    output = _record(tensors, options, result, group, backend)
    return output, None if result.dead is None else _raw_stats(input, result.saved, result.dead)


def _record(
    tensors: dispatch.ForwardTensors,
    options: dispatch.Options,
    result: tuple[Any, ...],
    group: Any,
    backend: str,
) -> Tensor:
    """Make what kernels have done differentiable; ``result`` begins as a ``Forward``."""
    input, residual, weight, bias = tensors[:4]
    order = result[2] is not None and is_channels_last(input)
    return apply(input, residual, weight, bias, result, (options, group, backend, order))


def _raw_stats(input: Tensor, saved: Tensor, dead: Tensor) -> RawStats:
    return RawStats(saved, dead, input.numel() // input.size(1))


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _measure(input: Tensor, output: Tensor) -> RawStats:
    with torch.no_grad():
        x, dims = input.double(), other_dims(input)
        variance, mean = torch.var_mean(x, dims, correction=0)
        saved = torch.stack([mean, mean, mean, variance])
        dead = (output <= 0).sum(other_dims(output))
        return RawStats(saved.float(), dead, output.numel() // output.shape[1])


def _check_types(tensors: dispatch.ForwardTensors, options: dispatch.Options) -> None:
    """Fail with the name of an argument that has a type that it cannot have."""
    for name, tensor in zip(_TENSORS, tensors, strict=True):
        if not isinstance(tensor, Tensor) and (tensor is not None or name == "input"):
            expected = "a Tensor" if name == "input" else "a Tensor or None"
            raise TypeError(f"{name} must be {expected}, got {type(tensor).__name__}") from None
    if not hasattr(options.training, "__bool__"):
        raise TypeError(f"training must be a bool, got {options.training!r}") from None
    for name in ("momentum", "eps", "negative_slope"):
        value = getattr(options, name)
        if not hasattr(value, "__float__") and (value is not None or name != "momentum"):
            expected = "a number or None" if name == "momentum" else "a number"
            raise TypeError(f"{name} must be {expected}, got {value!r}") from None


def _check_residual(residual: Tensor, input: Tensor) -> None:
    """Fail before anything is changed."""
    sizes = zip(reversed(residual.shape), reversed(input.shape), strict=False)
    if residual.shape != input.shape and any(a not in (b, 1) and b != 1 for a, b in sizes):
        raise RuntimeError(
            f"residual must have a shape that broadcasts with the input's, got "
            f"{list(residual.shape)} and {list(input.shape)}"
        )


def _is_like(residual: Tensor, input: Tensor) -> bool:
    return (
        residual.shape == input.shape
        and residual.dtype == input.dtype
        and residual.device == input.device
        and residual.layout == torch.strided
    )


def _kernels_take(
    input: Tensor, vectors: tuple[Tensor | None, ...], num_batches_tracked: Tensor | None
) -> bool:
    """Whether there are kernels for these tensors; torch takes others, or tells what is wrong."""
    if not is_plain(input, vectors) or input.dtype not in KERNEL_DTYPES or input.dim() < 2:
        return False
    channels, device = input.size(1), input.device
    for vector in vectors:
        if vector is not None and (
            vector.dim() != 1
            or vector.size(0) != channels
            or vector.device != device
            or vector.dtype not in KERNEL_DTYPES
            or not vector.is_contiguous()
        ):
            return False
    return channels > 0 and (
        num_batches_tracked is None or num_batches_tracked.dtype == torch.int64
    )


def _is_valid(
    input: Tensor, vectors: tuple[Tensor | None, ...], training: bool, eps: float
) -> bool:
    """Whether kernels can do what torch would do; empty inputs are left to it, too."""
    has_mean, has_var = vectors[2] is not None, vectors[3] is not None
    if any([v is not None and v.is_neg() for v in vectors]):  # kernels do not see the minus sign
        return False
    if training:
        return eps > 0.0 and input.numel() > input.size(1) and has_mean == has_var
    return eps >= 0.0 and has_mean and has_var and input.numel() > 0
