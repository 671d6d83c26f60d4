"""Batch normalisation, residual and activation in one module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..functional.batch_norm_relu import BatchNormStats, RawStats, batch_norm_relu_with_stats
from ..ops.batch_norm_relu import check_activation
from ._patterns import NO_ACTIVATION, is_norm_act, own_activation


class _BatchNormReLU(nn.modules.batchnorm._BatchNorm):
    """What the modules share; in front of torch's class in the order of bases."""

    activation: str
    negative_slope: float
    collect_stats = False
    _last: RawStats | None = None
    _watch: Sequence[tuple[Callable[[int, RawStats], None], int]] = ()  # monitors, their rows
    _is_fused = False  # by fuse_: a plain BatchNorm to everybody but its owner

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "relu",
        negative_slope: float = 0.01,
        *,
        bias: bool = True,
    ) -> None:
        """Create parameters and buffers as torch does."""
        check_activation(activation)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if not bias:  # not every torch has the argument
            self.register_parameter("bias", None)
        self.activation = activation
        self.negative_slope = negative_slope

    @property
    def last_stats(self) -> BatchNormStats | None:
        """Statistics of the last forward pass in training; None unless ``collect_stats`` is set."""
        return None if self._last is None else self._last.resolve()

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(batch_norm(input) + residual)``."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        return self._run(input, residual, None)

    def _run(self, input: Tensor, residual: Tensor | None, group: Any) -> Tensor:
        # As in torch: without running statistics those of the batch are used in evaluation, too;
        # with running statistics that are not tracked any more they are left alone in training.
        training = self.training
        weight, bias, running_mean, running_var, num_batches_tracked = self._tensors()
        tracks = training and self.track_running_stats
        if training and not tracks:
            running_mean = running_var = None
        if not training:
            training = running_mean is None and running_var is None
        output, stats = batch_norm_relu_with_stats(
            input,
            residual,
            weight,
            bias,
            running_mean,
            running_var,
            num_batches_tracked if tracks else None,
            training,
            self.momentum,
            self.eps,
            self.activation,
            self.negative_slope,
            self.training and (self.collect_stats or len(self._watch) > 0),
            group,
        )
        if stats is not None:
            vars(self)["_last"] = stats  # Module.__setattr__ would take a microsecond
            if not is_dynamo_compiling():
                for see, row in self._watch:
                    see(row, stats)
        return output

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Return parameters and buffers: as attributes each would take half a microsecond."""
        parameters, buffers = self._parameters, self._buffers
        try:
            return (
                parameters["weight"],
                parameters["bias"],
                buffers["running_mean"],
                buffers["running_var"],
                buffers["num_batches_tracked"],
            )
        except KeyError:  # a parametrization, say, has made something else of one
            return (
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.num_batches_tracked,
            )

    def extra_repr(self) -> str:
        """Return the arguments, as torch does."""
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        text: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{text}, activation={self.activation}{slope}"


class BatchNormReLU1d(_BatchNormReLU, nn.BatchNorm1d):
    """Batch normalisation over ``[N, C]`` or ``[N, C, L]`` and an activation, in one operator.

    Equivalent to: :class:`torch.nn.BatchNorm1d` followed by the activation; the arguments and the
    state dict are those of torch's module. See :func:`fastremedy.functional.batch_norm_relu` for
    what differs, and :class:`BatchNormReLU2d` for the arguments.

    Example:
        >>> import torch, fastremedy
        >>> norm = fastremedy.nn.BatchNormReLU1d(4)
        >>> norm(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """


class BatchNormReLU2d(_BatchNormReLU, nn.BatchNorm2d):
    """Batch normalisation over ``[N, C, H, W]`` and an activation, in one operator.

    ``module(input, residual)`` adds a residual before the activation:
    ``relu(batch_norm(input) + residual)``.

    Equivalent to: :class:`torch.nn.BatchNorm2d` followed by the activation; the arguments and the
    state dict are those of torch's module. See :func:`fastremedy.functional.batch_norm_relu` for
    what differs.

    With ``module.collect_stats = True`` the forward pass in training also counts what it sees;
    ``module.last_stats`` tells mean, variance, share of dead outputs and non-finite values of
    every channel (:class:`fastremedy.functional.BatchNormStats`), at no extra read.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` would drop the activation: use
    ``fastremedy.nn.SyncBatchNormReLU.convert_sync_batchnorm``.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for their plain average.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics; without them those of the batch
            are used in evaluation as well.
        device: of parameters and buffers.
        dtype: of parameters and buffers; the input may have another.
        activation: ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"silu"`` or ``"identity"``.
        negative_slope: of ``"leaky_relu"``.
        bias: without it only a weight, if affine.

    Raises:
        ValueError: unknown activation; in forward an input that is not 4-D, or one value per
            channel in training.

    Example:
        >>> import torch, fastremedy
        >>> norm = fastremedy.nn.BatchNormReLU2d(4)
        >>> x = torch.randn(2, 4, 3, 3)
        >>> bool((norm(x, residual=x) >= 0).all())
        True
    """


class BatchNormReLU3d(_BatchNormReLU, nn.BatchNorm3d):
    """Batch normalisation over ``[N, C, D, H, W]`` and an activation, in one operator.

    Equivalent to: :class:`torch.nn.BatchNorm3d` followed by the activation; the arguments and the
    state dict are those of torch's module. See :func:`fastremedy.functional.batch_norm_relu` for
    what differs, and :class:`BatchNormReLU2d` for the arguments.

    Example:
        >>> import torch, fastremedy
        >>> norm = fastremedy.nn.BatchNormReLU3d(4, activation="silu")
        >>> norm(torch.randn(2, 4, 3, 3, 3)).shape
        torch.Size([2, 4, 3, 3, 3])
    """


class SyncBatchNormReLU(_BatchNormReLU):
    """Batch normalisation over the batches of all ranks, and an activation.

    In training the ranks of ``process_group`` add up their sums: one all-reduce of 2 C + 1 numbers
    in the forward pass and one in the backward pass. The host never waits. Ranks may have batches
    of different sizes, also empty ones.

    Equivalent to: :class:`torch.nn.SyncBatchNorm` followed by the activation; the state dict is
    that of torch's module.

    Differs in:
        - It runs on the CPU too (gloo), and inside ``torch.compile(fullgraph=True)``.
        - It is no instance of ``torch.nn.SyncBatchNorm``, which DistributedDataParallel refuses on
          the CPU.
        - It cannot be differentiated twice.

    Args:
        num_features: number of channels C.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics; None for their plain average.
        affine: whether there are weight and bias.
        track_running_stats: whether there are running statistics.
        process_group: ranks that belong together; all by default.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        activation: as :class:`BatchNormReLU2d`.
        negative_slope: of ``"leaky_relu"``.
        bias: without it only a weight, if affine.

    Raises:
        ValueError: unknown activation; in forward an input without channels.

    Example:
        >>> import torch, fastremedy
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), fastremedy.nn.BatchNormReLU2d(8))
        >>> fastremedy.nn.SyncBatchNormReLU.convert_sync_batchnorm(model)[1].activation
        'relu'
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "relu",
        negative_slope: float = 0.01,
        *,
        bias: bool = True,
    ) -> None:
        """Create parameters and buffers as torch does."""
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            activation,
            negative_slope,
            bias=bias,
        )
        self.process_group = process_group

    _check_input_dim = nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return ``activation(batch_norm(input) + residual)``."""
        self._check_input_dim(input)  # type: ignore[misc]
        self._check_non_zero_input_channels(input)  # type: ignore[misc]
        return self._run(input, residual, self._group() if self.training else None)

    def _group(self) -> Any:
        """Return the ranks to synchronise with, None if there is no other."""
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(
        cls, module: nn.Module, process_group: Any | None = None
    ) -> nn.Module:
        """Replace every batch normalisation in ``module`` by a synchronised one.

        Parameters and buffers are shared, activations kept; a plain ``torch.nn.BatchNorm*d`` gets
        ``activation="identity"``, and timm's ``BatchNormAct2d`` the activation that it has inside.
        Call :func:`fastremedy.nn.fuse_` afterwards, not before.

        Args:
            module: changed in place, or replaced if it is a batch normalisation itself.
            process_group: ranks that belong together; all by default.

        Returns:
            The module.

        Raises:
            ValueError: a ``BatchNormAct2d`` has an activation that this class has not.
        """
        converted: nn.Module = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            converted = cls._synchronized(module, process_group)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted

    @classmethod
    def _synchronized(
        cls, module: nn.modules.batchnorm._BatchNorm, process_group: Any | None
    ) -> SyncBatchNormReLU:
        activation, negative_slope = "identity", 0.01
        if isinstance(module, _BatchNormReLU) and not module._is_fused:
            activation, negative_slope = module.activation, module.negative_slope
        elif is_norm_act(module):
            found = own_activation(module)
            if isinstance(found, str) and found != NO_ACTIVATION:
                raise ValueError(
                    f"expected an activation of SyncBatchNormReLU, got {type(module).__name__} "
                    f"{found}: convert the model by timm.layers.convert_sync_batchnorm"
                )
            activation, negative_slope = found if isinstance(found, tuple) else ("identity", 0.01)
        converted = cls(
            module.num_features,
            module.eps,
            module.momentum,
            module.affine,
            module.track_running_stats,
            process_group,
            device="meta",  # everything is shared
            activation=activation,
            negative_slope=negative_slope,
        )
        converted.weight, converted.bias = module.weight, module.bias
        converted.running_mean, converted.running_var = module.running_mean, module.running_var
        converted.num_batches_tracked = module.num_batches_tracked
        converted.collect_stats = getattr(module, "collect_stats", False)
        return converted.train(module.training)
