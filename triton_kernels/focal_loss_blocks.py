# mypy: allow-untyped-defs, allow-incomplete-defs
"""What the kernels of the focal loss share: ``csrc/core/focal_loss.h`` in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .batch_norm_relu_blocks import INTERPRETED
from .exponential import exp_of
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
        low += (a - (total - rest)) + (b - rest)
        # Large products have a large `low`, and an exponential of 0.
        return exp_of(-total, tl.where(total > 100.0, 0.0, -low))


@triton.jit
def load_class_values(pointer, classes, mask, OPMATH: tl.constexpr):
    """Load a value for each class; float64 stays what it is."""
    stored = tl.load(pointer + classes, mask=mask, other=None if mask is None else 0)
    if stored.dtype.is_fp64():
        return stored
    else:
        return widen(stored, OPMATH)


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
