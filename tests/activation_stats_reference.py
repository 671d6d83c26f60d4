"""Statistics by their definition, in more digits than float64, and what ranks do together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from fastremedy.stats import Statistics, Summary

from .batch_norm_reference import spare
from .reference import assert_same_bits

INTEGERS = ("count", "nan", "positive_inf", "negative_inf")
EXACT = ("min", "max", "amax", "zeros", "negatives")
NAMES = tuple(field.name for field in fields(Summary))

# Error of a moment relative to the mean of the magnitudes that it is the mean of.
PRECISION = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}

# Half a bucket of 1/8 of an octave.
QUANTILE_PRECISION = math.sqrt(1 + 1 / 8) - 1


def spare_interpreted(backend: str, case: bool) -> None:
    """Skip a case for interpreted kernels; emulated ones take a hundredth of their time."""
    spare(backend, case and backend == "triton")


def rows_of(tensor: Tensor, per_channel: bool) -> list[Tensor]:
    """Return what belongs to every row of ``[N, C, *]``, ``[C]`` or a tensor as a whole."""
    if not per_channel:
        return [tensor.reshape(-1)]
    if tensor.dim() == 1:
        return list(tensor[:, None])
    return [channel.reshape(-1) for channel in tensor.unbind(1)]


def expected_of(values: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Return the fields of Summary for one row, and what errors of some are relative to."""
    x = values.detach().cpu().double().resolve_neg().numpy().astype(np.longdouble)
    finite = x[np.isfinite(x)]
    n = len(finite)
    expected = dict.fromkeys(NAMES, math.nan)
    expected["count"] = n
    expected["nan"] = int(np.isnan(x).sum())
    expected["positive_inf"] = int((x == np.inf).sum())
    expected["negative_inf"] = int((x == -np.inf).sum())
    if n == 0:
        return expected, {}
    mean = finite.mean()
    d = finite - mean
    if (finite == finite[0]).all():
        mean, d = finite[0], np.zeros_like(finite)
    d2 = d * d
    var = d2.mean()
    expected |= {
        "mean": float(mean),
        "var": float(var),
        "std": float(np.sqrt(var)),
        "min": float(finite.min()),
        "max": float(finite.max()),
        "amax": float(np.abs(finite).max()),
        "l1": float(np.abs(finite).sum()),
        "l2": float(np.sqrt((finite * finite).sum())),
        "zeros": int((finite == 0).sum()) / n,
        "negatives": int((finite < 0).sum()) / n,
    }
    scales = {name: expected[name] for name in ("var", "std", "l1", "l2")}
    scales["mean"] = float(np.abs(finite).mean())
    if var > 0:
        expected["skewness"] = float((d2 * d).mean() / var**1.5)
        expected["kurtosis"] = float((d2 * d2).mean() / var**2 - 3)
        scales["skewness"] = float((d2 * np.abs(d)).mean() / var**1.5)
        scales["kurtosis"] = expected["kurtosis"] + 3
    return expected, scales


def histogram_of(values: Tensor) -> Tensor:
    """Count the upper 12 bits of values that are finite as float32."""
    floats = values.detach().cpu().float().reshape(-1).resolve_neg()
    bits = floats[floats.isfinite()].numpy().view(np.uint32)
    return torch.from_numpy(np.bincount(bits >> 20, minlength=4096))


def check_row(statistics: Statistics, row: int, values: Tensor, precision: float) -> None:
    """Fail unless a row holds what ``values`` are, and nothing else."""
    summary = statistics.compute()
    expected, scales = expected_of(values)
    for name in NAMES:
        field = getattr(summary, name)
        assert field.shape == (statistics.num_rows,)
        assert field.dtype == (torch.int64 if name in INTEGERS else torch.float64), name
        actual, wanted = field[row].item(), expected[name]
        message = f"{name} of row {row}: got {actual!r}, expected {wanted!r}"
        if name in INTEGERS or name in EXACT or name not in scales:
            assert actual == wanted or (actual != actual and wanted != wanted), message
        else:
            assert abs(actual - wanted) <= precision * scales[name], message
    if statistics.histogram is not None:
        assert torch.equal(statistics.histogram[row].cpu(), histogram_of(values))


def check(statistics: Statistics, rows: Sequence[Tensor], precision: float) -> None:
    assert statistics.num_rows == len(rows)
    for row, values in enumerate(rows):
        check_row(statistics, row, values, precision)


def of(values: Tensor | Sequence[Tensor], **options: object) -> Statistics:
    """Return statistics of one tensor or several, each in a row of its own."""
    tensors = [values] if isinstance(values, Tensor) else list(values)
    statistics = Statistics(len(tensors), device=tensors[0].device, **options)
    statistics.update(tensors, range(len(tensors)))
    return statistics


def buffers(statistics: Statistics) -> list[Tensor]:
    """Copy all that an update may change."""
    parts = (statistics.moments, statistics.counts, statistics.histogram)
    return [part.clone() for part in parts if part is not None]


def assert_same(statistics: Statistics, before: Sequence[Tensor]) -> None:
    """Fail unless the buffers are as :func:`buffers` found them, to the bit."""
    for actual, expected in zip(buffers(statistics), before, strict=True):
        assert_same_bits(actual, expected)


def data_of_rank(rank: int) -> list[Tensor]:
    """Unequal means, numbers of values and signs; row 2 has values on one rank only."""
    generator = torch.Generator().manual_seed(rank)
    first = torch.randn(1000 + 3000 * rank, generator=generator) * (1 + rank) + 7 * rank
    second = torch.rand(700 - 500 * rank, generator=generator) - 5 * rank
    second[3 : 5 + rank] = (math.nan, math.inf, -math.inf)[rank]
    return [first, second, torch.randn(33 * rank, generator=generator).exp(), torch.zeros(0)]


def run_rank(rank: int, world_size: int, folder: str) -> None:
    """Reduce the rank's own data; save what it holds afterwards."""
    results = []
    for histogram in (True, False):
        statistics = of(data_of_rank(rank), histogram=histogram)
        statistics.all_reduce()
        results.append(statistics)
    torch.save([buffers(statistics) for statistics in results], f"{folder}/rank{rank}.pt")
