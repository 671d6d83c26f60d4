"""Focal loss for sigmoid and softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..ops import focal_loss_dispatch as dispatch
from ..ops.dispatch import KERNEL_DTYPES, has_kernels, is_plain, is_traced
from ..ops.focal_loss import (
    PROBABILITY_UNIT,
    REDUCTIONS,
    ClassVectors,
    Options,
    check_labels,
    class_factors,
    composite,
    compute_dtype,
    is_labels,
    measure,
)
from ..ops.focal_loss_autograd import FocalLoss, run_forward
from ..ops.layouts import like, with_kernel_layout

Alpha = float | Sequence[float] | Tensor | None


class FocalLossStats(NamedTuple):
    """What the loss saw of every class."""

    class_counts: Tensor  # int64 [C], samples of the class
    mean_p_t: Tensor  # float32 [C], mean probability that they were given; NaN without samples
    ignored: Tensor  # float32 scalar, share of the labels that were ignored


class RawStats(NamedTuple):
    """What kernels leave of the statistics; :meth:`resolve` launches what makes them readable."""

    sums: Tensor  # int64 [2 * C + 1]
    num_labels: int

    def resolve(self) -> FocalLossStats:
        """Return the statistics."""
        counts, units = self.sums[:-1].view(2, -1)
        mean_p_t = units.double() * PROBABILITY_UNIT / counts
        ignored = self.sums[-1] / max(1, self.num_labels)
        return FocalLossStats(counts, mean_p_t.float(), ignored.float())


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    background_class: int | None = None,
    return_stats: bool = False,
) -> Any:  # a Tensor, unless return_stats asks for more
    """Return the focal loss of independent yes-or-no questions (Lin et al., 2017).

    Equivalent to: ``torchvision.ops.sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction)``,
    in one operator that reads logits and targets once in either direction.

    Differs in:
        - Integer ``targets`` are class labels, without a one-hot tensor.
        - Gradients are finite for every ``gamma >= 0`` and every logit; values are exact to 1e-6,
          where half precision is rounded once and 1 - p is not a difference.
        - ``ignore_index``, weights of the classes and label smoothing.
        - Under autocast the loss is float32, also that of half-precision logits.

    Args:
        inputs: logits of any shape; with labels, or values of the classes, ``[N, C, *]`` or
            ``[C]``. float32, float64, float16 or bfloat16.
        targets: probabilities in the shape of ``inputs``, 0 or 1 or between; or labels ``[N, *]``
            of an integer dtype.
        alpha: weight of positives, 1 - alpha is that of negatives: a number, or one for each class
            ``[C]``. None or below zero: none.
        gamma: any number >= 0; 0 is binary cross entropy.
        reduction: ``"none"``, ``"mean"`` over what is not ignored, or ``"sum"``.
        weight: factor of each class ``[C]``.
        pos_weight: factor of the positives of each class ``[C]``.
        label_smoothing: targets move by this share towards 1/2.
        ignore_index: rows with this label, or elements with this probability, do not count: no
            loss, no gradient.
        background_class: a label, in ``[0, C)`` or not, of rows in which no class is positive.
        return_stats: also return counts and mean probabilities of the classes, from the same pass.

    Returns:
        A tensor of the dtype of ``inputs``: a scalar, or with ``"none"`` in the shape of
        ``inputs``. With ``return_stats`` a pair of it and :class:`FocalLossStats`.

    Raises:
        ValueError: shapes do not match; a number is out of range.
        TypeError: an argument is of another type than said.
        IndexError: a label is no class, on the CPU; on a GPU an assertion of the device fails.

    Example:
        >>> import torch, fastremedy
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]])
        >>> fastremedy.functional.sigmoid_focal_loss(logits, torch.tensor([0]), reduction="sum")
        tensor(0.3005)
    """
    loss, stats = focal_loss_with_stats(
        inputs,
        targets,
        False,
        alpha,
        gamma,
        reduction,
        weight,
        pos_weight,
        label_smoothing,
        ignore_index,
        background_class,
        return_stats,
    )
    return loss if stats is None else (loss, stats.resolve())


def focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: Alpha = None,
    reduction: str = "mean",
    *,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    return_stats: bool = False,
) -> Any:  # a Tensor, unless return_stats asks for more
    """Return the focal loss of a choice among classes: ``-(1 - p_t)**gamma * log(p_t)``.

    Equivalent to: with ``gamma=0``, ``F.cross_entropy(input, target, weight,
    ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)``, in value and
    gradient; otherwise every class's term of it is multiplied by ``(1 - p)**gamma``.

    Differs in:
        - 1 - p is the sum of the other probabilities: exact also where p rounds to 1.
        - Integer labels of every dtype; classes without probability may have a logit of -inf.
        - Under autocast the loss is float32, also that of half-precision logits.

    Args:
        input: logits ``[N, C]``, ``[N, C, *]`` or ``[C]``. float32, float64, float16 or bfloat16.
        target: labels ``[N]``, ``[N, *]`` or ``[]`` of an integer dtype, or probabilities in the
            shape of ``input``.
        gamma: any number >= 0; 0 is cross entropy.
        alpha: factor of the loss: a number, or one for each class ``[C]``. Unlike ``weight`` it is
            not divided by in the mean.
        reduction: ``"none"``, ``"mean"`` or ``"sum"``; the mean is that of ``F.cross_entropy``:
            with labels divided by the sum of their ``weight``.
        weight: factor of each class ``[C]``.
        label_smoothing: targets move by this share towards 1/C.
        ignore_index: rows with this label do not count: no loss, no gradient. With probabilities
            it must be negative, as in torch.
        return_stats: also return counts and mean probabilities of the classes, from the same pass.

    Returns:
        A tensor of the dtype of ``input``: a scalar, or with ``"none"`` in the shape of labels.
        With ``return_stats`` a pair of it and :class:`FocalLossStats`.

    Raises:
        ValueError: shapes do not match; a number is out of range.
        TypeError: an argument is of another type than said.
        IndexError: a label is no class, on the CPU; on a GPU an assertion of the device fails.

    Example:
        >>> import torch, fastremedy
        >>> logits = torch.tensor([[2.0, -1.0, 0.5]])
        >>> fastremedy.functional.focal_loss(logits, torch.tensor([0]))
        tensor(0.0111)
    """
    loss, stats = focal_loss_with_stats(
        input,
        target,
        True,
        alpha,
        gamma,
        reduction,
        weight,
        None,
        label_smoothing,
        ignore_index,
        None,
        return_stats,
    )
    return loss if stats is None else (loss, stats.resolve())


def focal_loss_with_stats(
    input: Tensor,
    target: Tensor,
    softmax: bool,
    alpha: Alpha,
    gamma: float,
    reduction: str,
    weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    ignore_index: int,
    background_class: int | None,
    wants_stats: bool,
) -> tuple[Tensor, RawStats | None]:
    """Return the loss and, if wanted, its statistics."""
    names = ("input", "target") if softmax else ("inputs", "targets")
    check_numbers(gamma, reduction, label_smoothing, ignore_index, background_class)
    input, target, is_single = _with_batch(input, target, softmax, names)
    if softmax and ignore_index >= 0 and not is_labels(target):
        raise RuntimeError("ignore_index is not supported for floating point target")  # as torch
    shape = input.shape
    if not softmax and input.dim() < 2:  # samples of one class
        input, target = input.reshape(-1, 1), target.reshape(-1, 1)
    alpha_value = 1.0 if softmax else -1.0
    if isinstance(alpha, float | int):
        alpha_value, alpha = float(alpha), None
    elif alpha is not None and not isinstance(alpha, Tensor):
        alpha = class_factors(alpha, input.device)
    if not softmax:
        check_alpha(alpha_value)
    classes = ClassVectors(alpha, weight, pos_weight)
    _check_classes(classes, input)
    options = Options(
        softmax,
        REDUCTIONS.index(reduction),
        float(gamma),
        alpha_value,
        float(label_smoothing),
        ignore_index,
        ignore_index if background_class is None else background_class,
    )
    loss, sums = _run(input, target, classes, options, wants_stats)
    if reduction == "none" and is_single:
        loss = loss.squeeze(0)
    elif reduction == "none" and not softmax:
        loss = loss.view(shape)
    if sums is None:
        return loss, None
    return loss, RawStats(sums, target.numel())


def _run(
    input: Tensor, target: Tensor, classes: ClassVectors, options: Options, wants_stats: bool
) -> tuple[Tensor, Tensor | None]:
    loss_dtype = _loss_dtype(input)
    backend: str | None = "torch"
    if not _kernels_take(input, target, classes):
        pass
    elif is_traced(input):
        # What is exported has to run without this package; is_exporting() holds in every trace of
        # torch 2.11.
        if has_kernels(dispatch.STEM, input.device.type) and not torch.compiler._is_exporting_flag:
            backend = None
    else:
        backend = backends.active(dispatch.STEM, input.device)
    if backend == "torch":
        x = input.to(compute_dtype(input)) if input.dtype in KERNEL_DTYPES else input
        if not (is_traced(input) or torch._C._are_functorch_transforms_active()):
            check_labels(target, input.shape[1], options)
        loss = composite(x, target, classes, options).to(loss_dtype)
        sums = measure(x.detach(), target.detach(), options) if wants_stats else None
        return loss, sums
    input = with_kernel_layout(input.resolve_neg())
    if is_labels(target):
        target = target.contiguous()
    else:
        if torch.float64 in (input.dtype, target.dtype):  # kernels compute in one width
            target = target.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
        target = like(target.resolve_neg(), input)
    tensors = (input, target, *classes)
    if torch.is_grad_enabled() and input.requires_grad:
        apply: Callable[..., tuple[Tensor, Tensor | None]] = FocalLoss.apply
        return apply(*tensors, options, loss_dtype, wants_stats, backend)
    forward = run_forward(input, target, classes, options, loss_dtype, wants_stats, backend)
    return forward.loss, forward.stats


def _loss_dtype(input: Tensor) -> torch.dtype:
    is_half = input.dtype in (torch.float16, torch.bfloat16)
    if is_half and torch.is_autocast_enabled(input.device.type):
        return torch.float32
    return input.dtype


def check_numbers(
    gamma: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    background_class: int | None = None,
) -> None:
    """Fail if an option is none, and say which."""
    if isinstance(gamma, Tensor) or not isinstance(gamma, float | int):
        raise TypeError(
            f"gamma must be a number, got {type(gamma).__name__}: kernels are built for its value, "
            "and no gradient is computed for it"
        )
    if not 0 <= gamma <= torch.finfo(torch.float32).max:
        raise ValueError(f"gamma must be a finite float32 number >= 0, got {gamma}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    if not isinstance(label_smoothing, float | int):
        raise TypeError(f"label_smoothing must be a number, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    labels = {"ignore_index": ignore_index}
    if background_class is not None:
        labels["background_class"] = background_class
    for name, label in labels.items():
        if not isinstance(label, int) and not hasattr(label, "__index__"):
            raise TypeError(f"{name} must be an int, got {type(label).__name__}")
        if not -(2**63) <= label < 2**63:
            raise ValueError(f"{name} must be an int64, got {label}")


def check_alpha(alpha: float) -> None:
    """Fail if a share of the positives is none."""
    if not alpha <= 1:  # NaN included
        raise ValueError(f"alpha must be in [0, 1], or below 0 or None for none, got {alpha}")


def _check_classes(classes: ClassVectors, input: Tensor) -> None:
    num_classes = input.shape[1]
    for name, vector in classes._asdict().items():
        if vector is None:
            continue
        if not isinstance(vector, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(vector).__name__}")
        if vector.shape != (num_classes,):
            raise ValueError(
                f"{name} must have one value for each class, shape [{num_classes}], got "
                f"{list(vector.shape)}"
            )
        if vector.device != input.device:
            raise ValueError(f"{name} must be on {input.device}, got {vector.device}")


def _with_batch(
    input: Tensor, target: Tensor, softmax: bool, names: tuple[str, str]
) -> tuple[Tensor, Tensor, bool]:
    """Return both with a batch, and whether there was none; labels as int64."""
    for name, tensor in zip(names, (input, target), strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
    if not input.is_floating_point():
        raise TypeError(f"{names[0]} must have a floating-point dtype, got {input.dtype}")
    if target.is_complex():
        raise TypeError(f"{names[1]} must be labels or probabilities, got {target.dtype}")
    if target.device != input.device:
        raise ValueError(f"{names[1]} must be on {input.device}, got {target.device}")
    same_shape = target.shape == input.shape
    if not softmax and same_shape and not target.is_floating_point():
        target = target.to(input.dtype)  # 0 and 1
    if not target.is_floating_point() and target.dtype != torch.int64:
        target = target.long()
    is_single = input.dim() == 1 and (softmax or is_labels(target))
    if is_single:
        input, target = input.unsqueeze(0), target.unsqueeze(0)
    if input.dim() < 2 and (softmax or not same_shape):
        raise ValueError(f"{names[0]} must be [C], [N, C] or [N, C, *], got {list(input.shape)}")
    of_labels = (input.shape[0], *input.shape[2:]) if input.dim() > 1 else ()
    if target.shape != (of_labels if is_labels(target) else input.shape):
        raise ValueError(
            f"{names[1]} must be labels {list(of_labels)} of an integer dtype or probabilities "
            f"{list(input.shape)} for {names[0]} {list(input.shape)}, got {target.dtype} "
            f"{list(target.shape)}"
        )
    return input, target, is_single


def _kernels_take(input: Tensor, target: Tensor, classes: ClassVectors) -> bool:
    """Whether there are kernels for these tensors; torch takes others."""
    if (
        not is_plain(input, (target, *classes))
        or input.dtype not in KERNEL_DTYPES
        or input.numel() == 0
        or target.requires_grad
    ):
        return False
    for vector in classes:
        if vector is not None and (
            vector.dtype not in KERNEL_DTYPES
            or vector.requires_grad
            or not vector.is_contiguous()
            or (not torch.compiler.is_compiling() and vector.is_neg())
        ):
            return False
    return True
