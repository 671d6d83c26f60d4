"""Operator ``activation_stats``: the definition in pure torch, and what its results mean.

Rows of results are float64 ``moments`` and int64 ``counts`` and ``histogram`` as
``csrc/core/activation_stats.h`` says. They merge: over steps, ranks and runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MOMENTS = ("count", "mean", "m2", "m3", "m4", "l1", "min", "max")
COUNTS = ("zero", "negative", "nan", "positive_inf", "negative_inf")
NUM_BUCKETS = 4096
FIRST_NON_FINITE_BUCKET = 255 << 3  # of either sign; these and those behind stay empty

Sizes = tuple[int, int, int]  # outer, channels, inner


def empty_moments(num_rows: int, device: torch.device | str | None = None) -> Tensor:
    """Return the moments of no value, ``[num_rows, 8]``."""
    moments = torch.zeros(num_rows, len(MOMENTS), dtype=torch.float64, device=device)
    moments[:, 6] = math.inf
    moments[:, 7] = -math.inf
    return moments


def update(
    tensors: Sequence[Tensor],
    sizes: Sequence[Sizes],
    first_rows: Sequence[int],
    armed: Tensor | None,
    moments: Tensor,
    counts: Tensor,
    histogram: Tensor | None,
) -> None:
    """Merge what dense tensors hold into the rows ``first_row + channel``."""
    keep = None if armed is None else armed.reshape(()) == 0
    for tensor, (outer, channels, inner), first in zip(tensors, sizes, first_rows, strict=True):
        shape = (outer, channels, inner)
        flat = tensor.detach().as_strided(shape, (channels * inner, inner, 1))
        rows = flat.movedim(1, 0).reshape(channels, -1)
        into = slice(first, first + channels)
        results = [(moments, merge(moments[into], moments_of(rows)))]
        results.append((counts, counts[into] + counts_of(rows)))
        if histogram is not None:
            results.append((histogram, histogram[into] + histogram_of(rows)))
        for target, value in results:
            value = value if keep is None else torch.where(keep, target[into], value)
            target[into] = value


def moments_of(rows: Tensor) -> Tensor:
    """Return ``[R, 8]`` of the finite values of ``[R, n]``."""
    x = rows.double()
    finite = x.isfinite()
    n = finite.sum(1).double()
    # One more value of each, for rows without any.
    least = F.pad(torch.where(finite, x, math.inf), (0, 1), value=math.inf).amin(1)
    most = F.pad(torch.where(finite, x, -math.inf), (0, 1), value=-math.inf).amax(1)
    zeroed = torch.where(finite, x, 0.0)
    # Rounding must not move the mean of equal values.
    mean = torch.where(n > 0, (zeroed.sum(1) / n).clamp(least, most), 0.0)
    d = torch.where(finite, x - mean[:, None], 0.0)
    powers = [d.pow(k).sum(1) for k in (2, 3, 4)]
    return torch.stack([n, mean, *powers, zeroed.abs().sum(1), least, most], 1)


def counts_of(rows: Tensor) -> Tensor:
    """Return ``[R, 5]``: zeros, finite negatives, NaN and infinities of ``[R, n]``."""
    negative = (rows < 0) & rows.isfinite()
    flags = (rows == 0, negative, rows.isnan(), rows == math.inf, rows == -math.inf)
    return torch.stack([flag.sum(1) for flag in flags], 1)


def histogram_of(rows: Tensor) -> Tensor:
    """Return ``[R, 4096]``: how many values have the same sign, exponent and 3 mantissa bits."""
    buckets = rows.float().contiguous().view(torch.int32).long().bitwise_and(0xFFFFFFFF) >> 20
    counts = buckets.new_zeros(rows.shape[0], NUM_BUCKETS)
    finite = buckets % (NUM_BUCKETS // 2) < FIRST_NON_FINITE_BUCKET
    return counts.scatter_add_(1, buckets, finite.long())


def merge(a: Tensor, b: Tensor) -> Tensor:
    """Return the moments ``[R, 8]`` of both (Pebay, 2008)."""
    n_a, mean_a, m2_a, m3_a, m4_a, l1_a, min_a, max_a = a.unbind(1)
    n_b, mean_b, m2_b, m3_b, m4_b, l1_b, min_b, max_b = b.unbind(1)
    n = n_a + n_b
    share_a, share_b = n_a / n, n_b / n
    d = mean_b - mean_a
    between = d.square() * share_a * n_b
    m3 = m3_a + m3_b + between * d * (share_a - share_b)
    m3 = m3 + 3 * d * (share_a * m2_b - share_b * m2_a)
    m4 = m4_a + m4_b + between * d.square() * (1 - 3 * share_a * share_b)
    m4 = m4 + 6 * d.square() * (share_a.square() * m2_b + share_b.square() * m2_a)
    m4 = m4 + 4 * d * (share_a * m3_b - share_b * m3_a)
    both = [n, mean_a + d * share_b, m2_a + m2_b + between, m3, m4, l1_a + l1_b]
    result = torch.stack([*both, min_a.minimum(min_b), max_a.maximum(max_b)], 1)
    result = torch.where((n_a == 0)[:, None], b, result)
    return torch.where((n_b == 0)[:, None], a, result)


def quantiles(histogram: Tensor, moments: Tensor, q: Tensor) -> Tensor:
    """Return quantiles ``[R, Q]`` of finite values, at most 6.1 % off; NaN where there is none."""
    positive = torch.arange(FIRST_NON_FINITE_BUCKET, device=histogram.device)
    order = torch.cat([NUM_BUCKETS // 2 + positive.flip(0), positive])
    edges = (torch.arange(len(positive) + 1, device=histogram.device) << 20).int()
    low, high = edges[:-1].view(torch.float32).double(), edges[1:].view(torch.float32).double()
    high[-1] = torch.finfo(torch.float32).max
    middle = (low * high).sqrt()
    values = torch.cat([-middle.flip(0), middle])
    cumulative = histogram[:, order].cumsum(1)
    total = cumulative[:, -1:]
    rank = (q.double() * (total - 1)).round().long() + 1  # of the nearest value
    place = torch.searchsorted(cumulative, rank.contiguous()).clamp(max=len(order) - 1)
    result = values[place].clamp(moments[:, 6:7], moments[:, 7:8])
    return torch.where(total > 0, result, math.nan)
