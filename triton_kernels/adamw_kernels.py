# mypy: allow-untyped-defs, allow-incomplete-defs
"""Kernels of AdamW: ``csrc/core/adamw.h`` in Triton; :mod:`.adamw` launches them."""

from __future__ import annotations

import triton
import triton.language as tl

from .adamw_stats_kernels import (
    NUM_UPDATE_STATS,
    add_update,
    no_update_stats,
    store_update_stats,
)
from .clip_grad_norm_kernels import clip_coefficient, combine_partials
from .multi_tensor import NARROW_BLOCK, aligned_pointer, locate_chunk, wide_count
from .rounding import noise_bits, noise_key, round_nearest, round_stochastic, widen

NUM_HYPERS = tl.constexpr(7)  # lr, beta1, beta2, eps, weight_decay, maximize, decoupled
NUM_COEFFICIENTS = tl.constexpr(8)  # as _adamw_update unpacks them


# --- the formula, on blocks of values ---


@triton.jit
def _lerp(start, end, weight):
    """Return ``start + weight * (end - start)``, from the nearer end: weight 1 gives ``end``.

    The weight is float64, so that ``weight - 1`` has no rounding error of its own.
    """
    is_near_start = weight < 0.5
    base = tl.where(is_near_start, start, end)
    rest = tl.where(is_near_start, weight, weight - 1.0).to(start.dtype)
    return base + rest * (end - start)


@triton.jit
def _sqrt(x):
    if x.dtype.is_fp64():
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)  # tl.sqrt is an approximation in float32


@triton.jit
def _divide(x, y):
    if x.dtype.is_fp64():
        return x / y
    else:
        return tl.div_rn(x, y)  # `/` is an approximation in float32


@triton.jit
def _adamw_update(
    coefficients, grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq, AMSGRAD: tl.constexpr
):
    """Return parameter and moments after a step; see ``adamw_update`` in ``csrc/core/adamw.h``."""
    (
        grad_factor,
        l2,
        decay,
        one_minus_beta1,
        one_minus_beta2,
        step_size,
        inv_sqrt_bias_correction2,
        eps,
    ) = coefficients
    grad = grad * grad_factor
    grad = tl.where(l2 == 0.0, grad, grad + l2 * param)
    exp_avg = _lerp(exp_avg, grad, one_minus_beta1)
    grad_sq = grad * grad
    # An infinite second moment stays infinite (infinity - infinity would make it NaN).
    is_infinite = tl.abs(exp_avg_sq) == float("inf")
    exp_avg_sq = tl.where(
        is_infinite, exp_avg_sq + grad_sq, _lerp(exp_avg_sq, grad_sq, one_minus_beta2)
    )
    second_moment = exp_avg_sq
    if AMSGRAD:
        grows = (exp_avg_sq > max_exp_avg_sq) | (exp_avg_sq != exp_avg_sq)
        max_exp_avg_sq = tl.where(grows, exp_avg_sq, max_exp_avg_sq)
        second_moment = max_exp_avg_sq
    denom = _sqrt(second_moment) * inv_sqrt_bias_correction2 + eps
    # An infinite parameter stays infinite, too.
    decayed = tl.where(tl.abs(param) < float("inf"), decay * param, 0.0)
    param = param - (decayed + step_size * _divide(exp_avg, denom))
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def _update_block(
    pointers,
    coefficients,
    key,
    begin,
    offsets,
    mask,
    sums,
    ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    MEASURES: tl.constexpr,
):
    """Update the elements ``begin + offsets``; a mask of None takes them all.

    Returns:
        The sums of the update's statistics with these elements; as they were unless MEASURES.
    """
    grad_ptr, param_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, residual_ptr = pointers
    elements = begin + offsets
    grad = widen(tl.load(grad_ptr + elements, mask=mask), OPMATH)
    stored = tl.load(param_ptr + elements, mask=mask)
    stored_avg = tl.load(exp_avg_ptr + elements, mask=mask)
    param = widen(stored, OPMATH)
    exp_avg = widen(stored_avg, OPMATH)
    exp_avg_sq = widen(tl.load(exp_avg_sq_ptr + elements, mask=mask), OPMATH)
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = widen(tl.load(max_exp_avg_sq_ptr + elements, mask=mask), OPMATH)
    if ROUNDING == "kahan" or ROUNDING == "master":
        residual = tl.load(residual_ptr + elements, mask=mask)
    if ROUNDING == "kahan":
        param += widen(residual, OPMATH)
    elif ROUNDING == "master":
        # A master whose rounding is not the parameter is stale: that was set from outside.
        is_current = widen(round_nearest(residual, stored.dtype), OPMATH) == param
        param = tl.where(is_current, residual, param)
    before = param

    param, exp_avg, exp_avg_sq, max_exp_avg_sq = _adamw_update(
        coefficients, grad, param, exp_avg, exp_avg_sq, max_exp_avg_sq, AMSGRAD
    )

    if ROUNDING == "stochastic":
        rounded = round_stochastic(param, noise_bits(key, begin, offsets), stored.dtype)
    else:
        rounded = round_nearest(param, stored.dtype)
    tl.store(param_ptr + elements, rounded, mask=mask)
    after = widen(rounded, OPMATH)
    if ROUNDING == "kahan":
        # Infinity minus infinity: nothing is left to compensate.
        lost = tl.where(tl.abs(after) < float("inf"), param - after, 0.0)
        lost = round_nearest(lost, residual.dtype)
        tl.store(residual_ptr + elements, lost, mask=mask)
        after += widen(lost, OPMATH)
    elif ROUNDING == "master":
        tl.store(residual_ptr + elements, param, mask=mask)
        after = param
    state_dtype: tl.constexpr = stored_avg.dtype
    tl.store(exp_avg_ptr + elements, round_nearest(exp_avg, state_dtype), mask=mask)
    tl.store(exp_avg_sq_ptr + elements, round_nearest(exp_avg_sq, state_dtype), mask=mask)
    if AMSGRAD:
        stored_max = round_nearest(max_exp_avg_sq, state_dtype)
        tl.store(max_exp_avg_sq_ptr + elements, stored_max, mask=mask)
    if MEASURES:
        sums = add_update(sums, grad, before, after, mask)
    return sums


# --- kernels ---


@triton.jit
def _power(base, exponent):
    return tl.exp2(exponent * tl.log2(base))


@triton.jit(
    do_not_specialize=["num_partials", "num_rows"],
    do_not_specialize_on_alignment=[
        "options_ptr",
        "hypers_ptr",
        "lrs_ptr",
        "grads_ptr",
        "groups_ptr",
        "steps_ptr",
        "grad_scale_ptr",
        "found_inf_ptr",
    ],
)
def prepare_kernel(
    options_ptr,  # max_norm, norm_type
    hypers_ptr,  # [num_groups, NUM_HYPERS]
    lrs_ptr,  # [num_groups], addresses of float32 scalars, 0 where hypers has the lr
    grads_ptr,  # [num_rows], addresses, 0 where there is no gradient
    groups_ptr,
    steps_ptr,  # [num_rows], addresses of float32 scalars
    partials_ptr,
    num_partials,
    num_rows,
    grad_scale_ptr,  # None: 1
    found_inf_ptr,  # None: 0
    total_norm_ptr,
    skipped_ptr,  # None: never skip
    coefficients_ptr,  # [num_rows, NUM_COEFFICIENTS]
    NORM: tl.constexpr,
    SKIP_NONFINITE: tl.constexpr,
    PARTIALS_BLOCK: tl.constexpr,
    ROWS_BLOCK: tl.constexpr,
):
    """Finish the norm, decide whether to skip, advance the steps and write the coefficients."""
    inv_scale = 1.0
    if grad_scale_ptr is not None:
        inv_scale = 1.0 / tl.load(grad_scale_ptr).to(tl.float64)
    grad_factor = tl.full((), 1.0, tl.float64) * inv_scale
    skip = tl.full((), 0, tl.int32)
    if NORM != "none":
        norm_type = tl.load(options_ptr + 1)
        norm = combine_partials(partials_ptr, num_partials, norm_type, NORM, PARTIALS_BLOCK)
        norm = norm * inv_scale
        tl.store(total_norm_ptr, norm)
        grad_factor = clip_coefficient(norm, tl.load(options_ptr)) * inv_scale
        if SKIP_NONFINITE:
            skip = tl.where(tl.abs(norm) < float("inf"), 0, 1)
    if found_inf_ptr is not None:
        skip = tl.where(tl.load(found_inf_ptr) == 0.0, skip, 1)
    if skipped_ptr is not None:
        tl.store(skipped_ptr, skip)

    num_updated = tl.where(skip == 0, num_rows, 0)
    for start in range(0, num_updated, ROWS_BLOCK):
        rows = start + tl.arange(0, ROWS_BLOCK)
        mask = rows < num_updated
        mask = mask & (tl.load(grads_ptr + rows, mask=mask, other=0) != 0)
        step_ptr = tl.load(steps_ptr + rows, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        tl.store(step_ptr, step, mask=mask)

        group = tl.load(groups_ptr + rows, mask=mask, other=0)
        hyper_ptr = hypers_ptr + group * NUM_HYPERS
        lr = tl.load(hyper_ptr, mask=mask, other=0.0)
        beta1 = tl.load(hyper_ptr + 1, mask=mask, other=0.0)
        beta2 = tl.load(hyper_ptr + 2, mask=mask, other=0.0)
        eps = tl.load(hyper_ptr + 3, mask=mask, other=0.0)
        weight_decay = tl.load(hyper_ptr + 4, mask=mask, other=0.0)
        maximize = tl.load(hyper_ptr + 5, mask=mask, other=0.0) != 0.0
        is_decoupled = tl.load(hyper_ptr + 6, mask=mask, other=0.0) != 0.0
        lr_address = tl.load(lrs_ptr + group, mask=mask, other=0)
        lr_ptr = lr_address.to(tl.pointer_type(tl.float32))
        device_lr = tl.load(lr_ptr, mask=lr_address != 0, other=0.0).to(tl.float64)
        lr = tl.where(lr_address != 0, device_lr, lr)
        bias_correction1 = 1.0 - _power(beta1, step.to(tl.float64))
        bias_correction2 = 1.0 - _power(beta2, step.to(tl.float64))

        out_ptr = coefficients_ptr + rows * NUM_COEFFICIENTS
        tl.store(out_ptr, tl.where(maximize, -grad_factor, grad_factor), mask=mask)
        tl.store(out_ptr + 1, tl.where(is_decoupled, 0.0, weight_decay), mask=mask)
        tl.store(out_ptr + 2, tl.where(is_decoupled, lr * weight_decay, 0.0), mask=mask)
        tl.store(out_ptr + 3, 1.0 - beta1, mask=mask)
        tl.store(out_ptr + 4, 1.0 - beta2, mask=mask)
        tl.store(out_ptr + 5, lr / bias_correction1, mask=mask)
        tl.store(out_ptr + 6, 1.0 / tl.sqrt(bias_correction2), mask=mask)
        tl.store(out_ptr + 7, eps, mask=mask)


@triton.jit(
    do_not_specialize=["first_row", "end_row", "last_chunk"],
    do_not_specialize_on_alignment=[
        "first_chunks_ptr",
        "sizes_ptr",
        "grads_ptr",
        "params_ptr",
        "exp_avgs_ptr",
        "exp_avg_sqs_ptr",
        "max_exp_avg_sqs_ptr",
        "residuals_ptr",
        "steps_ptr",
        "streams_ptr",
        "seed_ptr",
    ],
)
def update_kernel(
    first_chunks_ptr,
    sizes_ptr,
    grads_ptr,
    params_ptr,
    exp_avgs_ptr,
    exp_avg_sqs_ptr,
    max_exp_avg_sqs_ptr,
    residuals_ptr,
    steps_ptr,
    streams_ptr,
    seed_ptr,
    coefficients_ptr,
    skipped_ptr,
    partials_ptr,  # [num_chunks, NUM_UPDATE_STATS] if MEASURES
    first_row,
    end_row,
    last_chunk,
    GRAD: tl.constexpr,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROUNDING: tl.constexpr,
    AMSGRAD: tl.constexpr,
    OPMATH: tl.constexpr,
    MEASURES: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update the elements of each chunk; if MEASURES, write the sums of its statistics.

    Chunks are taken backwards: the gradients that the norm read last are still in L2.
    """
    chunk = last_chunk - tl.program_id(0)
    row, begin, count = locate_chunk(first_chunks_ptr, sizes_ptr, chunk, first_row, end_row, CHUNK)
    grad = tl.load(grads_ptr + row)
    runs = grad != 0
    if skipped_ptr is not None:
        runs = runs & (tl.load(skipped_ptr) == 0)
    if runs:
        param = tl.load(params_ptr + row)
        exp_avg = tl.load(exp_avgs_ptr + row)
        exp_avg_sq = tl.load(exp_avg_sqs_ptr + row)
        max_exp_avg_sq = tl.load(max_exp_avg_sqs_ptr + row)
        residual = tl.load(residuals_ptr + row)
        coefficient_ptr = coefficients_ptr + row * NUM_COEFFICIENTS
        coefficients = (
            tl.load(coefficient_ptr).to(OPMATH),
            tl.load(coefficient_ptr + 1).to(OPMATH),
            tl.load(coefficient_ptr + 2).to(OPMATH),
            tl.load(coefficient_ptr + 3),
            tl.load(coefficient_ptr + 4),
            tl.load(coefficient_ptr + 5).to(OPMATH),
            tl.load(coefficient_ptr + 6).to(OPMATH),
            tl.load(coefficient_ptr + 7).to(OPMATH),
        )
        key = None
        if ROUNDING == "stochastic":
            step = tl.load(tl.load(steps_ptr + row).to(tl.pointer_type(tl.float32)))
            stream = tl.load(streams_ptr + row).to(tl.uint32)
            key = noise_key(tl.load(seed_ptr), stream, step.to(tl.int64).to(tl.uint32))
        num_wide = wide_count(
            count, grad | param | exp_avg | exp_avg_sq | max_exp_avg_sq | residual, BLOCK
        )
        wide_pointers = (
            aligned_pointer(grad, GRAD),
            aligned_pointer(param, PARAM),
            aligned_pointer(exp_avg, STATE),
            aligned_pointer(exp_avg_sq, STATE),
            aligned_pointer(max_exp_avg_sq, STATE),
            aligned_pointer(residual, RESIDUAL),
        )
        sums = ()
        if MEASURES:
            sums = no_update_stats()
        offsets = tl.arange(0, BLOCK)
        for start in range(0, num_wide, BLOCK):
            sums = _update_block(
                wide_pointers,
                coefficients,
                key,
                begin + start,
                offsets,
                None,
                sums,
                ROUNDING,
                AMSGRAD,
                OPMATH,
                MEASURES,
            )
        pointers = (
            grad.to(tl.pointer_type(GRAD)),
            param.to(tl.pointer_type(PARAM)),
            exp_avg.to(tl.pointer_type(STATE)),
            exp_avg_sq.to(tl.pointer_type(STATE)),
            max_exp_avg_sq.to(tl.pointer_type(STATE)),
            residual.to(tl.pointer_type(RESIDUAL)),
        )
        offsets = tl.arange(0, NARROW_BLOCK)
        for start in range(num_wide, count, NARROW_BLOCK):
            mask = start + offsets < count
            sums = _update_block(
                pointers,
                coefficients,
                key,
                begin + start,
                offsets,
                mask,
                sums,
                ROUNDING,
                AMSGRAD,
                OPMATH,
                MEASURES,
            )
        if MEASURES:
            store_update_stats(partials_ptr + chunk * NUM_UPDATE_STATS, sums)
