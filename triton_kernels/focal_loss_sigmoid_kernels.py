# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of the sigmoid focal loss; :mod:`.focal_loss` launches them.

Every element is a problem of its own: programs take blocks of them, wherever rows begin. Only the
last block of all needs a mask, so that the others are read 16 bytes at a time for every number of
classes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .batch_norm_relu_blocks import narrow, wide_pointer
from .exponential import exp_of
from .focal_loss_blocks import (
    SIZES,
    focal_of_target,
    load_scale,
    load_sigmoid_weights,
    probability_units,
    scalar,
    split_gamma,
    store_partials,
)
from .rounding import widen


@triton.jit
def _divide(index, divisor):
    """Return the quotient: below 2^31 by a multiplication (T. Granlund and P. Montgomery)."""
    value, magic, shift = divisor
    if index.dtype.is_int64():
        return index // value
    else:
        n = index.to(tl.uint32)
        high = tl.umulhi(n, magic.to(tl.uint32).broadcast_to(n.shape))
        return ((high + n) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _classes_and_rows(index, sizes, INNER: tl.constexpr):
    """Return class and row of each element."""
    classes, inner = sizes
    if INNER:
        plane = _divide(index, inner)
        outer = _divide(plane, classes)
        return plane - outer * classes[0], outer * inner[0] + (index - plane * inner[0])
    else:
        row = _divide(index, classes)
        return index - row * classes[0], row


@triton.jit
def _load_block(
    input_ptr,
    target_ptr,
    index,
    inside,
    sizes,
    labels,
    LABELS: tl.constexpr,
    INNER: tl.constexpr,
    OPMATH: tl.constexpr,
):
    """Return logits, targets, and of each element which class it has and whether it counts.

    Targets are bool for labels. ``is_known`` is false where a label is no class.
    """
    ignore_index, background = labels
    x = widen(tl.load(input_ptr + index, mask=inside), OPMATH)
    classes, rows = _classes_and_rows(index, sizes, INNER)
    if LABELS:
        label = tl.load(target_ptr + rows, mask=inside)
        is_ignored = label == ignore_index
        is_background = label == background
        is_class = (label >= 0) & (label < sizes[0][0])
        is_known = is_class | is_background | is_ignored
        target = (label == classes) & (is_background == 0)
    else:
        target = widen(tl.load(target_ptr + index, mask=inside), OPMATH)
        is_ignored = target == ignore_index.to(OPMATH)
        is_known = is_ignored | True
    counts = is_known & (is_ignored == 0)
    if inside is not None:
        counts &= inside
        is_ignored &= inside
        is_known |= inside == 0
    return x, target, classes, counts, is_ignored, is_known


@triton.jit
def _count_positives(stats_ptr, x, target, classes, counts, num_classes, LABELS: tl.constexpr):
    """Count the positives of each class, and their p_t."""
    p = 1.0 / (1.0 + exp_of(-x))
    if LABELS:
        is_positive = target & counts
    else:
        is_positive = (target > 0.5) & counts
        p = target * p + (1.0 - target) * (1.0 - p)
    one = tl.full(x.shape, 1, tl.int64)
    tl.atomic_add(stats_ptr + classes, one, mask=is_positive, sem="relaxed")
    sums_ptr = stats_ptr + num_classes
    tl.atomic_add(sums_ptr + classes, probability_units(p), mask=is_positive, sem="relaxed")


@triton.jit
def _forward_block(
    pointers,
    start,
    numel,
    sizes,
    labels,
    parameters,
    sums,
    REDUCTION: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    INNER: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the losses of a block, or add them to the sums of lanes; return the sums."""
    input_ptr, target_ptr, alphas_ptr, weight_ptr, pos_weight_ptr, loss_ptr, stats_ptr = pointers
    alpha, smoothing, gamma = parameters
    total, num_counted, num_ignored, all_known = sums
    index = start + tl.arange(0, BLOCK)
    inside = index < numel if MASKED else None
    x, target, classes, counts, is_ignored, is_known = _load_block(
        input_ptr, target_ptr, index, inside, sizes, labels, LABELS, INNER, OPMATH
    )
    weights = load_sigmoid_weights(classes, alpha, alphas_ptr, weight_ptr, pos_weight_ptr, OPMATH)
    loss, _ = focal_of_target(x, target, weights, smoothing, gamma, LABELS, SMOOTH, GAMMA)
    loss = tl.where(counts, loss, 0.0)
    if REDUCTION == "none":
        tl.store(loss_ptr + index, narrow(loss, loss_ptr.dtype.element_ty), mask=inside)
    else:
        total += loss
        num_counted += counts.to(tl.int32)
    if stats_ptr is not None:
        _count_positives(stats_ptr, x, target, classes, counts, sizes[0][0], LABELS)
        if LABELS:
            is_ignored &= classes == 0  # once a row
        num_ignored += tl.sum(is_ignored.to(tl.int32), 0)
    return total, num_counted, num_ignored, all_known & is_known


@triton.jit(do_not_specialize=SIZES)
def sigmoid_forward_kernel(
    input_ptr,
    target_ptr,
    alphas_ptr,
    weight_ptr,
    pos_weight_ptr,
    loss_ptr,  # of the elements; None where they are summed up
    partials_ptr,
    stats_ptr,
    numel: tl.int64,
    classes: tl.int64,
    classes_magic: tl.int64,
    classes_shift: tl.int64,
    inner: tl.int64,
    inner_magic: tl.int64,
    inner_shift: tl.int64,
    tiles_per_program: tl.int64,
    gamma: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    ignore_index: tl.int64,
    background: tl.int64,
    REDUCTION: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    INNER: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    OPMATH: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the losses, or their sum and the number of elements that count."""
    target_ptr = target_ptr if LABELS else wide_pointer(target_ptr, VEC)
    pointers = (
        wide_pointer(input_ptr, VEC),
        target_ptr,
        alphas_ptr,
        weight_ptr,
        pos_weight_ptr,
        None if loss_ptr is None else wide_pointer(loss_ptr, VEC),
        stats_ptr,
    )
    class_divisor = (classes.to(INDEX), classes_magic, classes_shift)
    sizes = (class_divisor, (inner.to(INDEX), inner_magic, inner_shift))
    labels = (ignore_index, background)
    parameters = (alpha, scalar(smoothing, OPMATH), split_gamma(gamma, OPMATH))
    sums = (
        tl.zeros((BLOCK,), OPMATH),
        tl.zeros((BLOCK,), tl.int32),
        tl.full((), 0, tl.int32),
        tl.full((BLOCK,), True, tl.int1),
    )
    numel = numel.to(INDEX)
    num_full = numel // BLOCK
    first = tl.program_id(0).to(INDEX) * tiles_per_program.to(INDEX)
    end = first + tiles_per_program.to(INDEX)
    for tile in range(first, tl.minimum(end, num_full)):
        sums = _forward_block(
            pointers,
            tile * BLOCK,
            numel,
            sizes,
            labels,
            parameters,
            sums,
            REDUCTION,
            LABELS,
            SMOOTH,
            GAMMA,
            INNER,
            OPMATH,
            BLOCK,
            False,
        )
    if (end > num_full) & (num_full * BLOCK < numel):
        sums = _forward_block(
            pointers,
            num_full * BLOCK,
            numel,
            sizes,
            labels,
            parameters,
            sums,
            REDUCTION,
            LABELS,
            SMOOTH,
            GAMMA,
            INNER,
            OPMATH,
            BLOCK,
            True,
        )
    total, num_counted, num_ignored, all_known = sums
    if REDUCTION != "none":
        counted = tl.sum(num_counted, 0).to(tl.float64)
        store_partials(partials_ptr, tl.sum(total.to(tl.float64), 0), counted)
    if stats_ptr is not None:
        tl.atomic_add(stats_ptr + 2 * classes, num_ignored.to(tl.int64), sem="relaxed")
    if LABELS:
        assert tl.min(all_known.to(tl.int32), 0) == 1, "a label of the focal loss is no class"


@triton.jit
def _backward_block(
    pointers,
    start,
    numel,
    sizes,
    labels,
    parameters,
    scale,
    REDUCTION: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    INNER: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the gradients of a block."""
    grad_output_ptr, input_ptr, target_ptr, alphas_ptr, weight_ptr, pos_weight_ptr, grad_ptr = (
        pointers
    )
    alpha, smoothing, gamma = parameters
    index = start + tl.arange(0, BLOCK)
    inside = index < numel if MASKED else None
    x, target, classes, counts, _, _ = _load_block(
        input_ptr, target_ptr, index, inside, sizes, labels, LABELS, INNER, OPMATH
    )
    weights = load_sigmoid_weights(classes, alpha, alphas_ptr, weight_ptr, pos_weight_ptr, OPMATH)
    _, slope = focal_of_target(x, target, weights, smoothing, gamma, LABELS, SMOOTH, GAMMA)
    if REDUCTION == "none":
        scale = widen(tl.load(grad_output_ptr + index, mask=inside), OPMATH)
    grad = tl.where(counts, slope * scale, 0.0)
    tl.store(grad_ptr + index, narrow(grad, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sigmoid_backward_kernel(
    grad_output_ptr,
    input_ptr,
    target_ptr,
    alphas_ptr,
    weight_ptr,
    pos_weight_ptr,
    normalizer_ptr,
    grad_input_ptr,
    numel: tl.int64,
    classes: tl.int64,
    classes_magic: tl.int64,
    classes_shift: tl.int64,
    inner: tl.int64,
    inner_magic: tl.int64,
    inner_shift: tl.int64,
    tiles_per_program: tl.int64,
    gamma: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    ignore_index: tl.int64,
    background: tl.int64,
    REDUCTION: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    INNER: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    OPMATH: tl.constexpr,
    VEC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of the input."""
    scale = load_scale(grad_output_ptr, normalizer_ptr, REDUCTION, OPMATH)
    if REDUCTION == "none":
        grad_output_ptr = wide_pointer(grad_output_ptr, VEC)
    target_ptr = target_ptr if LABELS else wide_pointer(target_ptr, VEC)
    pointers = (
        grad_output_ptr,
        wide_pointer(input_ptr, VEC),
        target_ptr,
        alphas_ptr,
        weight_ptr,
        pos_weight_ptr,
        wide_pointer(grad_input_ptr, VEC),
    )
    class_divisor = (classes.to(INDEX), classes_magic, classes_shift)
    sizes = (class_divisor, (inner.to(INDEX), inner_magic, inner_shift))
    labels = (ignore_index, background)
    parameters = (alpha, scalar(smoothing, OPMATH), split_gamma(gamma, OPMATH))
    numel = numel.to(INDEX)
    num_full = numel // BLOCK
    first = tl.program_id(0).to(INDEX) * tiles_per_program.to(INDEX)
    end = first + tiles_per_program.to(INDEX)
    for tile in range(first, tl.minimum(end, num_full)):
        _backward_block(
            pointers,
            tile * BLOCK,
            numel,
            sizes,
            labels,
            parameters,
            scale,
            REDUCTION,
            LABELS,
            SMOOTH,
            GAMMA,
            INNER,
            OPMATH,
            BLOCK,
            False,
        )
    if (end > num_full) & (num_full * BLOCK < numel):
        _backward_block(
            pointers,
            num_full * BLOCK,
            numel,
            sizes,
            labels,
            parameters,
            scale,
            REDUCTION,
            LABELS,
            SMOOTH,
            GAMMA,
            INNER,
            OPMATH,
            BLOCK,
            True,
        )
