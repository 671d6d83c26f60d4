# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of the softmax focal loss; :mod:`.focal_loss` launches them.

A program takes tiles of ``ROWS`` rows, of each ``WIDTH`` classes at a time. Where the classes of a
row are next to each other (inner 1) they lie along the last axis of a tile, otherwise the rows do:
the last axis is the one that is contiguous in memory.

A row is its largest logit and the sum of the exponentials of the others: near p = 1 the rest is
what 1 - p is made of. Rows are finished in the precision of the elements, since float64 is slow on
most GPUs and a row of a tile occupies every warp; what is added over rows is float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .batch_norm_relu_blocks import narrow, wide_pointer
from .exponential import exp_of
from .focal_loss_blocks import (
    SIZES,
    focal_of_class,
    load_scale,
    load_softmax_weights,
    log1p_rest_of,
    probability_units,
    scalar,
    split_gamma,
    store_partials,
)
from .rounding import widen

# --- rows and classes of a tile ---


@triton.jit
def _promise_vectors(
    rows, classes, inner, VEC: tl.constexpr, INDEX: tl.constexpr, CLASS_AXIS: tl.constexpr
):
    """Return the sizes, with the promise to the compiler that the last axis holds whole vectors."""
    if CLASS_AXIS == 1:
        return rows.to(INDEX), classes.to(INDEX) // VEC * VEC, tl.full((), 1, INDEX)
    else:
        return rows.to(INDEX) // VEC * VEC, classes.to(INDEX), inner.to(INDEX) // VEC * VEC


@triton.jit
def _rows_of(tile, rows, classes, inner, ROWS: tl.constexpr):
    """Return a tile's rows, their first elements, and which of them there are."""
    row = tile * ROWS + tl.arange(0, ROWS)
    outer = row // inner
    return row, outer * (classes * inner) + (row - outer * inner), row < rows


@triton.jit
def _classes_of(start, place, WIDTH: tl.constexpr, CLASS_AXIS: tl.constexpr):
    """Return classes, which of them there are, offsets and mask of a block of classes."""
    first, inside, classes, inner = place
    c = tl.expand_dims(start + tl.arange(0, WIDTH), 1 - CLASS_AXIS)
    is_class = c < classes
    offsets = tl.expand_dims(first, CLASS_AXIS) + c * inner
    return c, is_class, offsets, tl.expand_dims(inside, CLASS_AXIS) & is_class


@triton.jit
def _load_labels(target_ptr, row, inside, classes, ignore_index):
    """Return labels, which rows count, and which are ignored; stop at a label that is no class."""
    label = tl.load(target_ptr + row, mask=inside, other=0)
    is_ignored = inside & (label == ignore_index)
    counts = inside & (label >= 0) & (label < classes) & (label != ignore_index)
    is_known = counts | is_ignored | (inside == 0)
    assert tl.min(is_known.to(tl.int32), 0) == 1, "a label of the focal loss is no class"
    return tl.where(counts, label, 0).to(classes.dtype), counts, is_ignored


@triton.jit
def _softmax_state(
    input_ptr,
    place,
    OPMATH: tl.constexpr,
    WIDTH: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Return the largest logit of each row, the sum of exp(x - largest) of the others, and logits.

    These are the tile's, if it is a ``SINGLE`` one.
    """
    infinity: tl.constexpr = float("inf")
    classes = place[2]
    _c, _is_class, offsets, mask = _classes_of(0, place, WIDTH, CLASS_AXIS)
    largest = widen(tl.load(input_ptr + offsets, mask=mask, other=-infinity), OPMATH)
    rest = tl.zeros_like(largest)
    if not SINGLE:
        for start in range(WIDTH, classes, WIDTH):
            _c, _is_class, offsets, mask = _classes_of(start, place, WIDTH, CLASS_AXIS)
            x = widen(tl.load(input_ptr + offsets, mask=mask, other=-infinity), OPMATH)
            is_larger = x > largest
            e = exp_of(tl.where(is_larger, largest - x, x - largest))
            # -inf adds nothing, not even to -inf.
            rest = tl.where(is_larger, (rest + 1.0) * e, rest + tl.where(x == -infinity, 0.0, e))
            largest = tl.where(is_larger, x, largest)
    top = tl.max(largest, CLASS_AXIS)
    is_top = largest == tl.expand_dims(top, CLASS_AXIS)
    e = exp_of(largest - tl.expand_dims(top, CLASS_AXIS))
    others = tl.sum(tl.where(is_top, rest, (rest + 1.0) * e), CLASS_AXIS)
    # All but one of those that are equal to the largest.
    return top, others + (tl.sum(is_top.to(OPMATH), CLASS_AXIS) - 1.0), largest


@triton.jit
def _soft_terms(
    x,
    state,
    label,
    pointers,
    parameters,
    block,
    classes,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
):
    """Return target, p, 1 - p, the loss of each class and what ``p_j - [j = t]`` is multiplied by.

    State and label have the axis of classes.
    """
    target_ptr, alphas_ptr, weight_ptr = pointers
    alpha, smoothing, gamma = parameters
    top, rest, log1p_rest = state
    c, is_class, offsets, mask = block
    if LABELS:
        target = (c == label).to(x.dtype)
    else:
        target = widen(tl.load(target_ptr + offsets, mask=mask, other=0), x.dtype)
    if SMOOTH:
        target = target * (1.0 - smoothing) + smoothing / classes.to(x.dtype)
    p, q, loss, slope = focal_of_class(x, top, rest, log1p_rest, gamma, GAMMA)
    factor, weight = load_softmax_weights(alpha, alphas_ptr, weight_ptr, c, is_class, x.dtype)
    factor = tl.where(mask, factor * weight * target, 0.0)
    is_absent = factor == 0.0  # 0 * inf would be NaN
    loss = tl.where(is_absent, 0.0, factor * loss)
    return target, p, q, loss, tl.where(is_absent, 0.0, factor * slope)


@triton.jit
def _soft_sums(
    input_ptr,
    tile_x,
    state,
    label,
    pointers,
    parameters,
    place,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    WIDTH: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    SINGLE: tl.constexpr,
    LIKELIEST: tl.constexpr,
):
    """Return of each row the loss and the sum of the slopes; and its label, the likeliest if so."""
    classes = place[2]
    top, rest, log1p_rest = state
    state = (
        tl.expand_dims(top, CLASS_AXIS),
        tl.expand_dims(rest, CLASS_AXIS),
        tl.expand_dims(log1p_rest, CLASS_AXIS),
    )
    tile_label = tl.expand_dims(label, CLASS_AXIS)
    losses = tl.zeros_like(tile_x)
    slopes = tl.zeros_like(tile_x)
    highest = tl.full(tile_x.shape, -float("inf"), tile_x.dtype)
    likeliest = tl.zeros(tile_x.shape, classes.dtype) + classes
    for start in range(0, classes, WIDTH):
        block = _classes_of(start, place, WIDTH, CLASS_AXIS)
        x = tile_x
        if not SINGLE:
            x = widen(tl.load(input_ptr + block[2], mask=block[3], other=0), tile_x.dtype)
        target, _p, _q, loss, slope = _soft_terms(
            x, state, tile_label, pointers, parameters, block, classes, LABELS, SMOOTH, GAMMA
        )
        losses += loss
        slopes += slope
        if LIKELIEST:
            is_higher = block[3] & (target > highest)
            highest = tl.where(is_higher, target, highest)
            likeliest = tl.where(is_higher, block[0], likeliest)
    if LIKELIEST:
        is_highest = highest == tl.expand_dims(tl.max(highest, CLASS_AXIS), CLASS_AXIS)
        label = tl.min(tl.where(is_highest, likeliest, classes), CLASS_AXIS)
    return tl.sum(losses, CLASS_AXIS), tl.sum(slopes, CLASS_AXIS), label


# --- kernels ---


@triton.jit(do_not_specialize=SIZES)
def softmax_forward_kernel(
    input_ptr,
    target_ptr,
    alphas_ptr,
    weight_ptr,
    loss_ptr,  # of the rows; None where they are summed up
    partials_ptr,
    saved_ptr,
    stats_ptr,
    rows: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    tiles_per_program: tl.int64,
    gamma: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    ignore_index: tl.int64,
    REDUCTION: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    OPMATH: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Write the losses of rows, or their sum and that of the weights, and what backward needs."""
    rows, classes, inner = _promise_vectors(rows, classes, inner, VEC, INDEX, CLASS_AXIS)
    input_ptr = wide_pointer(input_ptr, VEC)
    target_ptr = target_ptr if LABELS else wide_pointer(target_ptr, VEC)
    pointers = (target_ptr, alphas_ptr, weight_ptr)
    parameters = (alpha, scalar(smoothing, OPMATH), split_gamma(gamma, OPMATH))
    total = tl.full((), 0.0, tl.float64)
    count = tl.full((), 0.0, tl.float64)
    begin = tl.program_id(0).to(INDEX) * tiles_per_program.to(INDEX)
    end = tl.minimum(begin + tiles_per_program.to(INDEX), tl.cdiv(rows, ROWS))
    for tile in range(begin, end):
        row, first, inside = _rows_of(tile, rows, classes, inner, ROWS)
        if LABELS:
            label, counts, is_ignored = _load_labels(target_ptr, row, inside, classes, ignore_index)
        else:
            label = tl.zeros_like(row)
            counts = inside
            is_ignored = inside & False
        place = (first, inside, classes, inner)
        top, rest, tile_x = _softmax_state(input_ptr, place, OPMATH, WIDTH, CLASS_AXIS, SINGLE)
        log1p_rest = log1p_rest_of(rest)
        if LABELS:
            factor, weight = load_softmax_weights(
                alpha, alphas_ptr, weight_ptr, label, counts, OPMATH
            )
        else:
            weight = tl.full((ROWS,), 1.0, OPMATH)
        if LABELS and not SMOOTH:
            x = widen(tl.load(input_ptr + (first + label * inner), mask=counts, other=0), OPMATH)
            _p, q, loss, slope = focal_of_class(x, top, rest, log1p_rest, parameters[2], GAMMA)
            factor *= weight
            loss *= factor
            slope *= factor
            saved_1 = slope / (1.0 + rest)
            saved_2 = -slope * q
        else:
            loss, saved_2, label = _soft_sums(
                input_ptr,
                tile_x,
                (top, rest, log1p_rest),
                label,
                pointers,
                parameters,
                place,
                LABELS,
                SMOOTH,
                GAMMA,
                WIDTH,
                CLASS_AXIS,
                SINGLE,
                LIKELIEST=stats_ptr is not None and not LABELS,
            )
            saved_1 = rest
        if saved_ptr is not None:
            tl.store(saved_ptr + row, tl.where(counts, top, 0.0), mask=inside)
            tl.store(saved_ptr + rows + row, tl.where(counts, saved_1, 0.0), mask=inside)
            tl.store(saved_ptr + 2 * rows + row, tl.where(counts, saved_2, 0.0), mask=inside)
        loss = tl.where(counts, loss, 0.0)
        if REDUCTION == "none":
            tl.store(loss_ptr + row, narrow(loss, loss_ptr.dtype.element_ty), mask=inside)
        else:
            total += tl.sum(loss.to(tl.float64), 0)
            count += tl.sum(tl.where(counts, weight, 0.0).to(tl.float64), 0)
        if stats_ptr is not None:
            has_label = counts & (label < classes)  # NaN is no largest probability
            x = widen(tl.load(input_ptr + (first + label * inner), mask=has_label), OPMATH)
            units = probability_units(exp_of(x - top) / (1.0 + rest))
            one = tl.full((ROWS,), 1, tl.int64)
            tl.atomic_add(stats_ptr + label, one, mask=has_label, sem="relaxed")
            tl.atomic_add(stats_ptr + classes + label, units, mask=has_label, sem="relaxed")
            num_ignored = tl.sum(is_ignored.to(tl.int64), 0)
            tl.atomic_add(stats_ptr + 2 * classes, num_ignored, sem="relaxed")
    if REDUCTION != "none":
        store_partials(partials_ptr, total, count)


@triton.jit(do_not_specialize=SIZES)
def softmax_backward_kernel(
    grad_output_ptr,
    input_ptr,
    target_ptr,
    alphas_ptr,
    weight_ptr,
    saved_ptr,
    normalizer_ptr,
    grad_input_ptr,
    rows: tl.int64,
    classes: tl.int64,
    inner: tl.int64,
    tiles_per_program: tl.int64,
    gamma: tl.float64,
    alpha: tl.float64,
    smoothing: tl.float64,
    ignore_index: tl.int64,
    REDUCTION: tl.constexpr,
    LABELS: tl.constexpr,
    SMOOTH: tl.constexpr,
    GAMMA: tl.constexpr,
    CLASS_AXIS: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    OPMATH: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the gradient of the input."""
    rows, classes, inner = _promise_vectors(rows, classes, inner, VEC, INDEX, CLASS_AXIS)
    input_ptr = wide_pointer(input_ptr, VEC)
    grad_input_ptr = wide_pointer(grad_input_ptr, VEC)
    target_ptr = target_ptr if LABELS else wide_pointer(target_ptr, VEC)
    pointers = (target_ptr, alphas_ptr, weight_ptr)
    parameters = (alpha, scalar(smoothing, OPMATH), split_gamma(gamma, OPMATH))
    scale = load_scale(grad_output_ptr, normalizer_ptr, REDUCTION, OPMATH)
    begin = tl.program_id(0).to(INDEX) * tiles_per_program.to(INDEX)
    end = tl.minimum(begin + tiles_per_program.to(INDEX), tl.cdiv(rows, ROWS))
    for tile in range(begin, end):
        row, first, inside = _rows_of(tile, rows, classes, inner, ROWS)
        counts = inside
        label = tl.zeros_like(row)
        if LABELS:
            label, counts, _ignored = _load_labels(target_ptr, row, inside, classes, ignore_index)
        counts = tl.expand_dims(counts, CLASS_AXIS)
        label = tl.expand_dims(label, CLASS_AXIS)
        top = tl.expand_dims(tl.load(saved_ptr + row, mask=inside, other=0.0), CLASS_AXIS)
        saved_1 = tl.load(saved_ptr + rows + row, mask=inside, other=0.0)
        saved_2 = tl.load(saved_ptr + 2 * rows + row, mask=inside, other=0.0)
        row_scale = scale
        if REDUCTION == "none":
            row_scale = widen(tl.load(grad_output_ptr + row, mask=inside, other=0), OPMATH)
        if LABELS and not SMOOTH:
            factor = tl.expand_dims(saved_1 * row_scale, CLASS_AXIS)
            of_label = tl.expand_dims(saved_2 * row_scale, CLASS_AXIS)
        else:
            rest = tl.expand_dims(saved_1, CLASS_AXIS)
            state = (top, rest, tl.expand_dims(log1p_rest_of(saved_1), CLASS_AXIS))
            all_slopes = tl.expand_dims(saved_2, CLASS_AXIS)
            tile_scale = tl.expand_dims(tl.zeros_like(saved_1) + row_scale, CLASS_AXIS)
        place = (first, inside, classes, inner)
        for start in range(0, classes, WIDTH):
            block = _classes_of(start, place, WIDTH, CLASS_AXIS)
            x = widen(tl.load(input_ptr + block[2], mask=block[3], other=0), OPMATH)
            if LABELS and not SMOOTH:
                grad = tl.where(block[0] == label, of_label, exp_of(x - top) * factor)
            else:
                _t, p, q, _loss, slope = _soft_terms(
                    x, state, label, pointers, parameters, block, classes, LABELS, SMOOTH, GAMMA
                )
                grad = (p * (all_slopes - slope) - q * slope) * tile_scale
            grad = tl.where(counts, grad, 0.0)
            tl.store(grad_input_ptr + block[2], narrow(grad, DTYPE), mask=block[3])
