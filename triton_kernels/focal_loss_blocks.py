# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels of the focal loss share: ``csrc/core/focal_loss.h`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .batch_norm_relu_blocks import INTERPRETED
from .exponential import exp_of, log1p_of, log_of, log_parts
from .rounding import round_nearest, widen

FINISH_BLOCK = tl.constexpr(1024)  # partials that are added at a time

# Only what VEC promises is gained from the values of these.
SIZES = [
    *("rows", "classes", "inner", "numel", "tiles_per_program", "num_partials"),
    *("classes_magic", "classes_shift", "inner_magic", "inner_shift"),
    *("ignore_index", "background"),
]


@triton.jit
def scalar(value, DTYPE: tl.constexpr):
    """Return a float64 argument of a kernel, which the interpreter leaves a Python number."""
    return tl.full((), value, tl.float64).to(DTYPE)


@triton.jit
def split_gamma(gamma, OPMATH: tl.constexpr):
    """Return gamma in two parts: rounded to float32, it would put an error of 3e-6 in exp(-87)."""
    value = scalar(gamma, OPMATH)
    return value, (scalar(gamma, tl.float64) - value.to(tl.float64)).to(OPMATH)


@triton.jit
def _product_error(x, y, product):
    if INTERPRETED:  # its fma rounds twice
        return (x.to(tl.float64) * y.to(tl.float64) - product.to(tl.float64)).to(product.dtype)
    else:
        return tl.fma(x.broadcast_to(y.shape), y, -product)


@triton.jit
def power(q, whole, part, gamma, GAMMA: tl.constexpr):
    """Return q^gamma, where ``-log(q) = whole + part``, whole exactly and a part of at most 2."""
    if GAMMA == "0":
        return tl.full(q.shape, 1.0, q.dtype)
    elif GAMMA == "1":
        return q
    elif GAMMA == "2":
        return q * q
    else:
        value, value_low = gamma
        # -gamma log(q) = total + low, exact enough for an exponential of 1e-38.
        a = value * whole
        b = value * part
        total = a + b
        rest = total - a
        low = _product_error(value, whole, a) + value_low * whole
        low += _product_error(value, part, b)
        low += (a - (total - rest)) + (b - rest)
        # Large products have a large `low`, and an exponential of 0.
        return exp_of(-total, tl.where(total > 100.0, 0.0, -low))


# --- sigmoid: one element ---


@triton.jit
def _focal_of_hard_target(x, is_positive, weights, gamma, GAMMA: tl.constexpr):
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
    # Without gamma there is no p * ce, which is 0 * inf for an infinite logit.
    slope = factor * (q if GAMMA == "0" else gamma[0] * p * ce + q)
    return factor * ce, tl.where(is_positive, -slope, slope)


@triton.jit
def _focal_of_soft_target(x, target, not_target, weights, gamma, GAMMA: tl.constexpr):
    """Return loss and slope of a target in [0, 1] and the rest: ``p_t = t p + (1 - t) (1 - p)``."""
    positive, negative, pos_weight = weights
    magnitude = tl.abs(x)
    e = exp_of(-magnitude)
    r = 1.0 / (1.0 + e)
    log1p_e = log1p_of(e)
    small = e * r
    is_high = x > 0
    p = tl.where(is_high, r, small)
    not_p = tl.where(is_high, small, r)
    # 1 - p_t = r w, with w from the share of the target on the side of the logit and the rest.
    with_logit = tl.where(is_high, target, not_target)
    against = tl.where(is_high, not_target, target)
    is_right = against == 0
    w = tl.where(is_right, e, against + with_logit * e)
    q = r * w
    log_w, log_w_low = log_parts(w)
    whole = tl.where(is_right, magnitude, -log_w)
    part = tl.where(is_right, log1p_e, log1p_e - log_w_low)
    ce = pos_weight * target * (log1p_e + tl.where(is_high, 0.0, -x))
    ce += not_target * (log1p_e + tl.where(is_high, x, 0.0))
    ce_slope = not_target * p - pos_weight * target * not_p
    log_q_slope = (not_target - target) * r * tl.where(is_right, 1.0, e / w)
    factor = power(q, whole, part, gamma, GAMMA)
    factor *= positive * target + negative * not_target
    return factor * ce, factor * (gamma[0] * log_q_slope * ce + ce_slope)


@triton.jit
def focal_of_target(
    x, target, weights, smoothing, gamma, LABELS: tl.constexpr, SMOOTH: tl.constexpr, GAMMA
):
    """Return loss and slope of a target, which is bool for labels."""
    if LABELS and not SMOOTH:
        return _focal_of_hard_target(x, target, weights, gamma, GAMMA)
    else:
        target = target.to(x.dtype)
        not_target = 1.0 - target
        if SMOOTH:
            # Each by itself: the difference of a smoothed target from 1 has lost digits.
            target = target * (1.0 - smoothing) + 0.5 * smoothing
            not_target = not_target * (1.0 - smoothing) + 0.5 * smoothing
        return _focal_of_soft_target(x, target, not_target, weights, gamma, GAMMA)


# --- softmax: one class ---


@triton.jit
def log1p_rest_of(rest):
    """Return log(1 + rest), relatively exact for small ones."""
    if rest.dtype.is_fp64():
        return log1p_of(rest)
    else:
        return tl.where(rest > 1.0, log_of(1.0 + rest), log1p_of(rest))


@triton.jit
def focal_of_class(x, top, rest, log1p_rest, gamma, GAMMA: tl.constexpr):
    """Return p, 1 - p, the loss of a class, and what ``p_j - [j = t]`` is multiplied by."""
    if rest.dtype.is_fp64():
        share = 1.0 / (1.0 + rest)
    else:
        # A large gamma multiplies the error of q; the usual division has two units of it.
        share = tl.div_rn(tl.full(rest.shape, 1.0, tl.float32), 1.0 + rest)
    p = exp_of(x - top) * share
    # Only the largest can have p above 1/2.
    q = tl.where(x == top, rest * share, 1.0 - p)
    ce = (top - x) + log1p_rest
    if GAMMA == "0":
        return p, q, ce, tl.full(ce.shape, 1.0, ce.dtype)
    else:
        if GAMMA == "any":
            high, low = log_parts(q)
            factor = tl.where(q == 0.0, 0.0, power(q, -high, -low, gamma, GAMMA))
        else:
            factor = power(q, q, q, gamma, GAMMA)
        ce_by_q = tl.where(q == 0.0, 1.0, ce / q)  # -log(1 - q) / q -> 1
        p_ce_by_q = tl.where(p == 0.0, 0.0, p * ce_by_q)  # not 0 * inf
        return p, q, factor * ce, factor * (1.0 + gamma[0] * p_ce_by_q)


# --- weights of classes ---


@triton.jit
def _load_class_values(pointer, classes, mask, OPMATH: tl.constexpr):
    """Load a value for each class; float64 stays what it is."""
    stored = tl.load(pointer + classes, mask=mask, other=None if mask is None else 0)
    if stored.dtype.is_fp64():
        return stored
    else:
        return widen(stored, OPMATH)


@triton.jit
def load_sigmoid_weights(
    classes, alpha, alphas_ptr, weight_ptr, pos_weight_ptr, OPMATH: tl.constexpr
):
    """Return what positives, negatives and the cross entropy of positives are multiplied by."""
    if alphas_ptr is None:
        share = scalar(alpha, tl.float64)
    else:
        share = _load_class_values(alphas_ptr, classes, None, OPMATH)
    positive = tl.where(share < 0, 1.0, share).to(OPMATH)
    negative = tl.where(share < 0, 1.0, 1.0 - share).to(OPMATH)
    if weight_ptr is not None:
        weight = _load_class_values(weight_ptr, classes, None, OPMATH).to(OPMATH)
        positive *= weight
        negative *= weight
    if pos_weight_ptr is None:
        return positive, negative, scalar(1.0, OPMATH)
    else:
        pos_weight = _load_class_values(pos_weight_ptr, classes, None, OPMATH).to(OPMATH)
        return positive, negative, pos_weight


@triton.jit
def load_softmax_weights(alpha, alphas_ptr, weight_ptr, c, is_class, OPMATH: tl.constexpr):
    """Return alpha and the weight of classes."""
    if alphas_ptr is None:
        factor = scalar(alpha, OPMATH)
    else:
        factor = _load_class_values(alphas_ptr, c, is_class, OPMATH).to(OPMATH)
    if weight_ptr is None:
        return factor, tl.full(c.shape, 1.0, OPMATH)
    else:
        return factor, _load_class_values(weight_ptr, c, is_class, OPMATH).to(OPMATH)


# --- sums ---


@triton.jit
def probability_units(p):
    """Return p in units of 2^-32, NaN as 0: integers give the same sum in every order."""
    return (tl.where(p >= 0, p, 0.0).to(tl.float64) * 4294967296.0 + 0.5).to(tl.int64)


@triton.jit
def store_partials(partials_ptr, total, count):
    """Store a program's sum of losses and what it adds to the normalizer."""
    program = tl.program_id(0)
    tl.store(partials_ptr + program, total)
    tl.store(partials_ptr + tl.num_programs(0) + program, count)


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(partials_ptr, loss_ptr, normalizer_ptr, num_partials, REDUCTION: tl.constexpr):
    """Add the partials in a fixed order; write the loss and what it was divided by."""
    offsets = tl.arange(0, FINISH_BLOCK)
    total = tl.zeros((FINISH_BLOCK,), tl.float64)
    count = tl.zeros((FINISH_BLOCK,), tl.float64)
    for start in range(0, num_partials, FINISH_BLOCK):
        mask = start + offsets < num_partials
        total += tl.load(partials_ptr + start + offsets, mask=mask, other=0.0)
        if REDUCTION == "mean":
            counts_ptr = partials_ptr + num_partials
            count += tl.load(counts_ptr + start + offsets, mask=mask, other=0.0)
    loss = tl.sum(total, 0)
    if REDUCTION == "mean":
        normalizer = tl.sum(count, 0)
        tl.store(normalizer_ptr, normalizer)
        loss = loss / normalizer
    tl.store(loss_ptr, round_nearest(loss, loss_ptr.dtype.element_ty))


@triton.jit
def load_scale(grad_output_ptr, normalizer_ptr, REDUCTION: tl.constexpr, OPMATH: tl.constexpr):
    """Return what every gradient is multiplied by."""
    if REDUCTION == "none":
        return tl.full((), 1.0, OPMATH)
    scale = widen(tl.load(grad_output_ptr), tl.float64)
    if REDUCTION == "mean":
        scale = scale / tl.load(normalizer_ptr)
    return scale.to(OPMATH)
