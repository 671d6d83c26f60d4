"""Focal loss as modules, and weights of classes from their counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.loss import _WeightedLoss

from ..functional.focal_loss import (
    Alpha,
    FocalLossStats,
    RawStats,
    check_alpha,
    check_numbers,
    focal_loss_with_stats,
)
from ..ops.dispatch import is_traced
from ..ops.focal_loss import class_factors


class _FocalLoss(_WeightedLoss):
    """What the modules share."""

    _softmax: bool
    alpha: Alpha
    pos_weight: Tensor | None
    background_class: int | None = None
    collect_stats = False
    _last: RawStats | None = None

    def __init__(
        self,
        gamma: float,
        alpha: Alpha,
        reduction: str,
        weight: Tensor | None,
        label_smoothing: float,
        ignore_index: int,
        pos_weight: Tensor | None = None,
    ) -> None:
        check_numbers(gamma, reduction, label_smoothing, ignore_index)
        super().__init__(weight, reduction=reduction)
        self.register_buffer("pos_weight", pos_weight)
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        if isinstance(alpha, float | int) or alpha is None:
            self.alpha = alpha
            values = [] if alpha is None else [float(alpha)]
        else:
            vector = alpha if isinstance(alpha, Tensor) else class_factors(alpha)
            self.register_buffer("alpha", vector)
            values = [] if vector.is_meta or is_traced(vector) else vector.flatten().tolist()
        if not self._softmax:
            for value in values:
                check_alpha(value)

    @property
    def last_stats(self) -> FocalLossStats | None:
        """Statistics of the last forward pass; None unless ``collect_stats`` is set."""
        return None if self._last is None else self._last.resolve()

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss."""
        loss, self._last = focal_loss_with_stats(
            input,
            target,
            self._softmax,
            self.alpha,
            self.gamma,
            self.reduction,
            self.weight,
            self.pos_weight,
            self.label_smoothing,
            self.ignore_index,
            self.background_class,
            self.collect_stats,
        )
        return loss

    def extra_repr(self) -> str:
        """Show what differs from cross entropy."""
        alpha = "[C]" if isinstance(self.alpha, Tensor) else self.alpha
        return f"gamma={self.gamma}, alpha={alpha}, reduction={self.reduction!r}"


class FocalLoss(_FocalLoss):
    """Focal loss of a choice among classes, as a module.

    Equivalent to: ``torch.nn.CrossEntropyLoss(weight, ignore_index=ignore_index,
    reduction=reduction, label_smoothing=label_smoothing)`` with ``gamma=0``, state dict included.

    Differs in: what :func:`fastremedy.functional.focal_loss` says, which does the work.

    Args:
        gamma: any number >= 0; the larger, the less do easy examples count.
        alpha: factor of the loss: a number, or one for each class ``[C]``, which becomes a buffer.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: factor of each class ``[C]``, which the mean is divided by as well.
        label_smoothing: targets move by this share towards 1/C.
        ignore_index: rows with this label do not count.

    Attributes:
        collect_stats: set it to have :attr:`last_stats` after every call, at no extra read.
        last_stats: :class:`fastremedy.functional.FocalLossStats` of the last call.

    Example:
        >>> import torch, fastremedy
        >>> loss_function = fastremedy.nn.FocalLoss(gamma=2.0)
        >>> loss_function.collect_stats = True
        >>> loss = loss_function(torch.zeros(4, 3), torch.tensor([0, 0, 0, 2]))
        >>> loss_function.last_stats.class_counts
        tensor([3, 0, 1])
    """

    _softmax = True

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: Alpha = None,
        reduction: str = "mean",
        *,
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
    ) -> None:
        """Keep the options; tensors become buffers."""
        super().__init__(gamma, alpha, reduction, weight, label_smoothing, ignore_index)


class SigmoidFocalLoss(_FocalLoss):
    """Focal loss of independent yes-or-no questions, as a module.

    Equivalent to: ``torchvision.ops.sigmoid_focal_loss`` with these options, which has no module.

    Differs in: what :func:`fastremedy.functional.sigmoid_focal_loss` says, which does the work.

    Args:
        alpha: weight of positives, 1 - alpha is that of negatives: a number, or one for each class
            ``[C]``, which becomes a buffer. None or below zero: none.
        gamma: any number >= 0; 0 is binary cross entropy.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``.
        weight: factor of each class ``[C]``.
        pos_weight: factor of the positives of each class ``[C]``.
        label_smoothing: targets move by this share towards 1/2.
        ignore_index: rows with this label, or elements with this probability, do not count.
        background_class: label of rows in which no class is positive.

    Attributes:
        collect_stats: set it to have :attr:`last_stats` after every call, at no extra read.
        last_stats: :class:`fastremedy.functional.FocalLossStats` of the last call.

    Example:
        >>> import torch, fastremedy
        >>> loss_function = fastremedy.nn.SigmoidFocalLoss(reduction="sum", background_class=3)
        >>> loss_function(torch.zeros(4, 3), torch.tensor([0, 3, 3, 2]))
        tensor(1.3863)
    """

    _softmax = False

    def __init__(
        self,
        alpha: Alpha = 0.25,
        gamma: float = 2.0,
        reduction: str = "none",
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        background_class: int | None = None,
    ) -> None:
        """Keep the options; tensors become buffers."""
        super().__init__(gamma, alpha, reduction, weight, label_smoothing, ignore_index, pos_weight)
        self.background_class = background_class


def class_balanced_alpha(counts: Tensor | Sequence[int], beta: float) -> Tensor:
    """Return weights of classes by their effective numbers of samples (Cui et al., 2019).

    A class with n samples has ``(1 - beta**n) / (1 - beta)`` effective ones: n for beta near 1, and
    1 for beta 0. Weights are inverse to it and add up to the number of classes that have samples.

    Equivalent to: ``w = (1 - beta) / (1 - beta**counts); w / w.sum() * len(w)`` in the paper's
    code.

    Differs in: a class without samples gets 0, not infinity; ``beta**n`` near 1 loses no digits.

    Args:
        counts: samples of each class ``[C]``.
        beta: in [0, 1); the paper uses 0.9, 0.99, 0.999 and 0.9999.

    Returns:
        float32 ``[C]``: ``alpha`` of :class:`FocalLoss`, or ``weight`` of either loss.

    Raises:
        ValueError: ``beta`` is not in [0, 1), a count is negative, or counts are no vector.

    Example:
        >>> import fastremedy
        >>> fastremedy.nn.class_balanced_alpha([1000, 10], beta=0.99)
        tensor([0.1746, 1.8254])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be in [0, 1), got {beta}")
    n = torch.as_tensor(counts).double()
    if n.dim() != 1:
        raise ValueError(f"counts must have one value for each class, got shape {list(n.shape)}")
    if not (n.is_meta or is_traced(n)) and bool((n < 0).any()):
        raise ValueError(f"counts must not be negative, got {n.min().item():g}")
    log_beta = math.log(beta) if beta > 0 else -math.inf
    effective = torch.where(n > 0, -torch.expm1(n * log_beta), torch.inf)
    weights = effective.reciprocal()
    total = weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)  # 0 without any sample
    return (weights / total * (n > 0).sum()).float()
