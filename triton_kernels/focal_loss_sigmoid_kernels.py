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
from .exponential import exp_of, log1p_of, log_of
from .focal_loss_blocks import (
    SIZES,
    load_class_values,
    load_scale,
    power,
    probability_units,
    scalar,
    split_gamma,
    store_partials,
)
from .rounding import widen

# --- the formula of one element ---


@triton.jit
def _hard_focal(x, is_positive, weights, gamma, GAMMA: tl.constexpr):
    """Return loss and slope of a target that is 0 or 1."""
    positive, negative, pos_weight = weights
    u = tl.where(is_positive, -x, x)  # a logit that should be low
    e = exp_of(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    log1p_e = log1p_of(e)
    small = e * r
    is_wrong = u > 0
    q = tl.where(is_wrong, r, small)
    p = tl.where(is_wrong, small, r)
    ce = tl.where(is_wrong, u, 0.0) + log1p_e
    factor = power(q, tl.where(is_wrong, 0.0, -u), log1p_e, gamma, GAMMA)
    factor *= tl.where(is_positive, positive * pos_weight, negative)
    slope = factor * (gamma[0] * p * ce + q)
    return factor * ce, tl.where(is_positive, -slope, slope)


@triton.jit
def _soft_focal(x, target, weights, gamma, GAMMA: tl.constexpr):
    """Return loss and slope of any target in [0, 1]: ``p_t = t p + (1 - t) (1 - p)``."""
    positive, negative, pos_weight = weights
    magnitude = tl.abs(x)
    e = exp_of(-magnitude)
    r = 1.0 / (1.0 + e)
    log1p_e = log1p_of(e)
    small = e * r
    is_high = x > 0
    p = tl.where(is_high, r, small)
    not_p = tl.where(is_high, small, r)
    not_target = 1.0 - target
    # 1 - p_t = r w, with w from the share of the target on the side of the logit and the rest.
    with_logit = tl.where(is_high, target, not_target)
    against = tl.where(is_high, not_target, target)
    is_right = against == 0
    w = tl.where(is_right, e, against + with_logit * e)
    q = r * w
    whole = tl.where(is_right, magnitude, -log_of(w))
    ce = pos_weight * target * (log1p_e + tl.where(is_high, 0.0, -x))
    ce += not_target * (log1p_e + tl.where(is_high, x, 0.0))
    ce_slope = not_target * p - pos_weight * target * not_p
    log_q_slope = (not_target - target) * r * tl.where(is_right, 1.0, e / w)
    factor = power(q, whole, log1p_e, gamma, GAMMA)
    factor *= positive * target + negative * not_target
    return factor * ce, factor * (gamma[0] * log_q_slope * ce + ce_slope)


# --- blocks of elements ---


@triton.jit
def _divide(index, divisor, magic, shift):
    """Return ``index // divisor``: below 2^31 by a multiplication (T. Granlund, P. Montgomery)."""
    if index.dtype.is_int64():
        return index // divisor
    else:
        n = index.to(tl.uint32)
        quotient = (tl.umulhi(n, magic.to(tl.uint32).broadcast_to(n.shape)) + n) >> shift.to(
            tl.uint32
        )
        return quotient.to(tl.int32)


@triton.jit
def _classes_and_rows(index, sizes, INNER: tl.constexpr):
    """Return class and row of each element."""
    classes, classes_magic, classes_shift, inner, inner_magic, inner_shift = sizes
    if INNER:
        plane = _divide(index, inner, inner_magic, inner_shift)
        outer = _divide(plane, classes, classes_magic, classes_shift)
        return plane - outer * classes, outer * inner + (index - plane * inner)
    else:
        row = _divide(index, classes, classes_magic, classes_shift)
        return index - row * classes, row


@triton.jit
def _class_weights(
    classes, alpha, alphas_ptr, weight_ptr, pos_weight_ptr, OPMATH: tl.constexpr
):
    """Return what positives, negatives and the cross entropy of positives are multiplied by."""
    if alphas_ptr is None:
        share = scalar(alpha, tl.float64)
    else:
        share = load_class_values(alphas_ptr, classes, None, OPMATH)
    positive = tl.where(share < 0, 1.0, share).to(OPMATH)
    negative = tl.where(share < 0, 1.0, 1.0 - share).to(OPMATH)
    if weight_ptr is not None:
        weight = load_class_values(weight_ptr, classes, None, OPMATH).to(OPMATH)
        positive *= weight
        negative *= weight
    if pos_weight_ptr is None:
        return positive, negative, scalar(1.0, OPMATH)
    else:
        pos_weight = load_class_values(pos_weight_ptr, classes, None, OPMATH).to(OPMATH)
        return positive, negative, pos_weight


@triton.jit
def _load_block(
    input_ptr,
    target_ptr,
    start,
    numel,
    sizes,
    labels,
    LABELS: tl.constexpr,
    INNER: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return logits, targets, and of each element which class it has and whether it counts.

    Targets are bool for labels. ``is_known`` is false where a label is no class.
    """
    ignore_index, background = labels
    index = start + tl.arange(0, BLOCK)
    inside = index < numel if MASKED else None
    x = widen(tl.load(input_ptr + index, mask=inside), OPMATH)
    classes, rows = _classes_and_rows(index, sizes, INNER)
    if LABELS:
        label = tl.load(target_ptr + rows, mask=inside)
        is_ignored = label == ignore_index
        is_background = label == background
        is_class = (label >= 0) & (label < sizes[0])
        is_known = is_class | is_background | is_ignored
        target = (label == classes) & (is_background == 0)
    else:
        target = widen(tl.load(target_ptr + index, mask=inside), OPMATH)
        is_ignored = target == ignore_index.to(OPMATH)
        is_known = is_ignored | True
    counts = is_known & (is_ignored == 0)
    if MASKED:
        counts &= inside
        is_ignored &= inside
        is_known |= inside == 0
    return index, inside, x, target, classes, counts, is_ignored, is_known


@triton.jit
def _focal(x, target, weights, smoothing, gamma, LABELS: tl.constexpr, SMOOTH: tl.constexpr, GAMMA):
    if LABELS and not SMOOTH:
        return _hard_focal(x, target, weights, gamma, GAMMA)
    else:
        if SMOOTH:
            # Of two classes, the element's own and not that.
            target = target.to(x.dtype) * (1.0 - smoothing) + 0.5 * smoothing
        return _soft_focal(x, target, weights, gamma, GAMMA)


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
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Write the losses of a block, or add them to the sums of lanes; return the sums."""
    input_ptr, target_ptr, alphas_ptr, weight_ptr, pos_weight_ptr, loss_ptr, stats_ptr = pointers
    alpha, smoothing, gamma = parameters
    total, num_counted, num_ignored, all_known = sums
    index, inside, x, target, classes, counts, is_ignored, is_known = _load_block(
        input_ptr, target_ptr, start, numel, sizes, labels, LABELS, INNER, OPMATH, BLOCK, MASKED
    )
    weights = _class_weights(classes, alpha, alphas_ptr, weight_ptr, pos_weight_ptr, OPMATH)
    loss, _ = _focal(x, target, weights, smoothing, gamma, LABELS, SMOOTH, GAMMA)
    loss = tl.where(counts, loss, 0.0)
    if REDUCTION == "none":
        tl.store(loss_ptr + index, narrow(loss, loss_ptr.dtype.element_ty), mask=inside)
    else:
        total += loss
        num_counted += counts.to(tl.int32)
    if stats_ptr is not None:
        _count_positives(stats_ptr, x, target, classes, counts, sizes[0], LABELS)
        if LABELS:
            is_ignored &= classes == 0  # once a row
        num_ignored += is_ignored.to(tl.int32)
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
        wide_pointer(loss_ptr, VEC),
        stats_ptr,
    )
    sizes = (
        classes.to(INDEX),
        classes_magic,
        classes_shift,
        inner.to(INDEX),
        inner_magic,
        inner_shift,
    )
    labels = (ignore_index, background)
    parameters = (alpha, scalar(smoothing, OPMATH), split_gamma(gamma, OPMATH))
    sums = (
        tl.zeros((BLOCK,), OPMATH),
        tl.zeros((BLOCK,), tl.int32),
        tl.zeros((BLOCK,), tl.int32),
        tl.full((BLOCK,), True, tl.int1),
    )
    numel = numel.to(INDEX)
    num_full = numel // BLOCK
    first = tl.program_id(0).to(INDEX) * tiles_per_program.to(INDEX)
    end = first + tiles_per_program.to(INDEX)
    for tile in range(first, tl.minimum(end, num_full)):
        sums = _forward_block(
            pointers, tile * BLOCK, numel, sizes, labels, parameters, sums,
            REDUCTION, LABELS, SMOOTH, GAMMA, INNER, DTYPE, OPMATH, BLOCK, False,
        )
    if (end > num_full) & (num_full * BLOCK < numel):
        sums = _forward_block(
            pointers, num_full * BLOCK, numel, sizes, labels, parameters, sums,
            REDUCTION, LABELS, SMOOTH, GAMMA, INNER, DTYPE, OPMATH, BLOCK, True,
        )
    total, num_counted, num_ignored, all_known = sums
    if REDUCTION != "none":
        counted = tl.sum(num_counted, 0).to(tl.float64)
        store_partials(partials_ptr, tl.sum(total.to(tl.float64), 0), counted)
    if stats_ptr is not None:
        ignored = tl.sum(num_ignored, 0).to(tl.int64)
        tl.atomic_add(stats_ptr + 2 * classes, ignored, sem="relaxed")
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
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    grad_output_ptr, input_ptr, target_ptr, alphas_ptr, weight_ptr, pos_weight_ptr, grad_ptr = (
        pointers
    )
    alpha, smoothing, gamma = parameters
    index, inside, x, target, classes, counts, _, _ = _load_block(
        input_ptr, target_ptr, start, numel, sizes, labels, LABELS, INNER, OPMATH, BLOCK, MASKED
    )
    weights = _class_weights(classes, alpha, alphas_ptr, weight_ptr, pos_weight_ptr, OPMATH)
    _, slope = _focal(x, target, weights, smoothing, gamma, LABELS, SMOOTH, GAMMA)
    if REDUCTION == "none":
        scale = widen(tl.load(grad_output_ptr + index, mask=inside), OPMATH)
    grad = tl.where(counts, slope * scale, 0.0)
    tl.store(grad_ptr + index, narrow(grad, DTYPE), mask=inside)


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
    sizes = (
        classes.to(INDEX),
        classes_magic,
        classes_shift,
        inner.to(INDEX),
        inner_magic,
        inner_shift,
    )
    labels = (ignore_index, background)
    parameters = (alpha, scalar(smoothing, OPMATH), split_gamma(gamma, OPMATH))
    numel = numel.to(INDEX)
    num_full = numel // BLOCK
    first = tl.program_id(0).to(INDEX) * tiles_per_program.to(INDEX)
    end = first + tiles_per_program.to(INDEX)
    for tile in range(first, tl.minimum(end, num_full)):
        _backward_block(
            pointers, tile * BLOCK, numel, sizes, labels, parameters, scale,
            REDUCTION, LABELS, SMOOTH, GAMMA, INNER, DTYPE, OPMATH, BLOCK, False,
        )
    if (end > num_full) & (num_full * BLOCK < numel):
        _backward_block(
            pointers, num_full * BLOCK, numel, sizes, labels, parameters, scale,
            REDUCTION, LABELS, SMOOTH, GAMMA, INNER, DTYPE, OPMATH, BLOCK, True,
        )
