"""Precision of moments and quantiles, merging, and the same bits every time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastremedy.stats import Statistics

from .activation_stats_reference import (
    PRECISION,
    QUANTILE_PRECISION,
    assert_same,
    buffers,
    check,
    check_row,
    expected_of,
    histogram_of,
    of,
    spare_interpreted,
)
from .batch_norm_reference import LAYOUTS, is_slow
from .reference import FLOATS, HALVES, assert_same_bits, few_examples

# NumPy, under Triton's interpreter, warns of sums that overflow and are then taken again.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

MOMENTS = ("mean", "var", "std", "skewness", "kurtosis", "l1", "l2")


def gamma_of(size: int, ratio: float) -> Tensor:
    """Return values with skewness 1.4, excess 3, and a mean of ``ratio`` standard deviations."""
    values = torch.distributions.Gamma(torch.tensor(2.0).double(), 1.0).sample((size,))
    return (values - 2) / math.sqrt(2) + ratio


def assert_moments(statistics: Statistics, values: Tensor, precision: float) -> None:
    """Fail if a relative error is above ``precision``.

    Skewness near 0 is a difference of large sums: its error counts relative to those.
    """
    summary = statistics.compute()
    expected, scales = expected_of(values)
    for name in MOMENTS:
        actual = getattr(summary, name).item()
        scale = abs(expected[name])
        if name == "skewness" and scale < 0.1:
            scale = scales[name]
        error = abs(actual - expected[name]) / scale
        assert error <= precision, f"{name}: {actual!r}, expected {expected[name]!r}, {error:.1e}"


ARRANGEMENTS = {
    "random": lambda x: x,
    "sorted": lambda x: x.sort().values,
    "descending": lambda x: x.sort(descending=True).values,
    "half_zeros": lambda x: torch.cat([torch.zeros_like(x[::2]), x[1::2]]),
    "ends_in_zeros": lambda x: torch.cat([x[1::2], torch.zeros_like(x[::2])]),
    "outliers": lambda x: torch.cat([x[:-3], x[-3:] + 100]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("ratio", [1, 10, 100, 1000])
def test_far_from_zero(
    backend: str, device: torch.device, ratio: float, arrangement: str, dtype: torch.dtype
) -> None:
    spare_interpreted(backend, arrangement in ("descending", "ends_in_zeros") or ratio != 1000)
    size = 5000 if backend == "triton" else 70_000
    values = ARRANGEMENTS[arrangement](gamma_of(size, ratio).to(dtype)).to(device)
    if ratio in (10, 1000):
        values = -values
    assert_moments(of(values), values, PRECISION[dtype])


FEW_VALUES = {
    "one_or_zero": lambda n: (torch.rand(n) < 0.4).float(),
    "signs": lambda n: torch.where(torch.rand(n) < 0.5, 0.1234567, -0.1234567),
    "rare": lambda n: (torch.arange(n) % 10 == 7).float() * 0.7,
    "mostly_zero": lambda n: (torch.randn(n) - 1.3).relu(),
    "three": lambda n: torch.randn(3)[torch.randint(3, (n,))],
    "halves": lambda n: torch.cat([torch.full((n - n // 2,), 0.3), torch.full((n // 2,), 1.7)]),
    "far": lambda n: torch.where(torch.rand(n) < 0.4, 1000.0, 1001.37),
}


@pytest.mark.parametrize("distribution", FEW_VALUES)
def test_few_values(backend: str, device: torch.device, distribution: str) -> None:
    """Equal values round the same way every time; sizes are those of tails, vectors and units."""
    spare_interpreted(backend, distribution in ("rare", "three", "far"))
    sizes = (3, 15, 31, 129, 500, 1039, 1100, 1500, 2047, 3000)
    repeats = {"torch": 1, "cpu": 8, "cuda": 4, "triton": 1}[backend]
    for size in sizes[2::3] if backend == "triton" else sizes:
        for _ in range(repeats):
            values = FEW_VALUES[distribution](size).to(device)
            histogram = size % 2 == 0
            check(of(values, histogram=histogram), [values], PRECISION[torch.float32])


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("ratio", [1, 1000])
def test_channels_far_from_zero(
    backend: str, device: torch.device, ratio: float, layout: str
) -> None:
    """Also far from each other."""
    shape = (4, 5, 9, 9) if is_slow(backend) else (8, 5, 40, 40)
    values = gamma_of(math.prod(shape), ratio).view(shape)
    values = values * torch.tensor([1, -3, 1e-3, 1e6, -20]).view(-1, 1, 1)
    tensor = LAYOUTS[layout](values.float().to(device))
    statistics = Statistics(5, device=device)
    statistics.update(tensor, per_channel=True)
    for channel in range(5):
        row = Statistics(device=device)
        row.moments, row.counts = (
            statistics.moments[channel, None],
            statistics.counts[channel, None],
        )
        assert_moments(row, tensor[:, channel].reshape(-1), 1e-6)


def test_many_updates(backend: str, device: torch.device) -> None:
    """Moments keep their precision over steps whose means differ."""
    statistics = Statistics(device=device)
    parts = [
        (gamma_of(100, 1000) + step % 7).float()
        for step in range(9 if backend == "triton" else 200)
    ]
    for part in parts:
        statistics.update(part.to(device))
    assert_moments(statistics, torch.cat(parts), 1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1000.1, 6e4])
def test_constant(backend: str, device: torch.device, value: float, dtype: torch.dtype) -> None:
    """The variance is 0, not rounding, so that skewness and kurtosis are NaN; in pieces, too."""
    spare_interpreted(backend, dtype in HALVES or value in (0.0, 6e4))
    for size in (3, 1025) if backend == "triton" else (1, 3, 7, 1025):
        values = torch.full((size,), value, dtype=torch.float64).to(dtype).to(device)
        statistics = of(values)
        statistics.update(values)
        check(statistics, [torch.cat([values, values])], PRECISION[dtype])


SCALES = (1e30, 1e25, 1e15, 1e9, 1e-6, 1e-9, 1e-10, 1e-12, 1e-15, 1e-20, 1e-30)


@pytest.mark.parametrize("scale", SCALES)
def test_scale(backend: str, device: torch.device, scale: float) -> None:
    """Skewness and kurtosis do not know the unit, as long as it is one of float32."""
    spare_interpreted(backend, scale in (1e15, 1e9, 1e-9, 1e-15))
    values = (gamma_of(2000, 1) * scale).float().to(device)
    assert_moments(of(values), values, 1e-6)


def test_scale_of_one_channel(backend: str, device: torch.device) -> None:
    """A channel of small values beside one of large ones."""
    for layout in ("contiguous", "last"):
        values = gamma_of(2 * 3 * 300, 1).view(2, 3, 300) * torch.tensor([[1e20], [1e-12], [1.0]])
        tensor = LAYOUTS[layout](values.float().to(device))
        statistics = Statistics(3, device=device)
        statistics.update(tensor, per_channel=True)
        check(statistics, [row.reshape(-1) for row in tensor.unbind(1)], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_ends_of_the_range(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """The largest values, and those below the smallest normal one."""
    info = torch.finfo(dtype)
    largest = torch.tensor([info.max, -info.max, info.max / 2, 1.0, 0.0] * 30, dtype=dtype)
    step = info.smallest_normal * info.eps
    tiny = (torch.randint(-200, 200, (150,)).double() * step).to(dtype)
    for values in (largest, tiny, torch.cat([largest, tiny])):
        given = values.to(device)
        check(of(given), [given], PRECISION[dtype])


@pytest.mark.parametrize("scale", [1e70, 1e30, 1e-30, 1e-60])
def test_scale_of_doubles(backend: str, device: torch.device, scale: float) -> None:
    """Fourth powers stay in float64's range; beyond that they cannot."""
    spare_interpreted(backend, scale in (1e30, 1e-30))
    values = (gamma_of(500, 1) * scale).to(device)
    assert_moments(of(values, histogram=False), values, 1e-12)


def test_counts_past_32_bits(backend: str, device: torch.device) -> None:
    values = torch.randn(1000, device=device)
    values[::10] = torch.tensor([math.nan, math.inf, -math.inf, 0], device=device).repeat(25)
    before, after = Statistics(device=device), Statistics(device=device)
    before.update(values)
    after.update(values)
    after.counts += 2**33
    assert after.histogram is not None
    after.histogram += 2**33
    after.moments[0, 0] += 2**33
    after.update(values)
    assert before.histogram is not None
    assert torch.equal(after.counts, 2 * before.counts + 2**33)
    assert torch.equal(after.histogram, 2 * before.histogram + 2**33)
    assert after.compute().count.item() == 2**33 + 2 * before.compute().count.item()


def test_every_bucket(backend: str, device: torch.device) -> None:
    """One value in each but the NaN with a payload, at its edges and within."""
    upper = torch.arange(4096).int()
    for low in (0, 1, 0x7FFFF, 0xFFFFF):
        values = ((upper << 20) + low).int().view(torch.float32)
        values = values[~values.isnan()].to(device)
        statistics = of(values)
        assert statistics.histogram is not None
        assert torch.equal(statistics.histogram[0].cpu(), histogram_of(values))


DISTRIBUTIONS = {
    "normal": lambda n: torch.randn(n),
    "shifted": lambda n: torch.randn(n) + 5,
    "lognormal": lambda n: (3 * torch.randn(n)).exp(),
    "half_zeros": lambda n: torch.randn(n).relu(),
    "all_zeros": lambda n: torch.zeros(n),
    "negative": lambda n: -(torch.randn(n).exp()),
    "small": lambda n: torch.randn(n) * 1e-30,
    "large": lambda n: torch.randn(n) * 1e37,
    "subnormal": lambda n: torch.randn(n) * 1e-40,
    "two_values": lambda n: torch.where(torch.randn(n) > 0, 3.0, -100.0),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_quantiles(
    backend: str, device: torch.device, distribution: str, dtype: torch.dtype
) -> None:
    """Those of the nearest value, at most half a bucket off."""
    spare_interpreted(backend, dtype in (torch.float64, torch.bfloat16))
    rows = [DISTRIBUTIONS[distribution](size).to(dtype) for size in (1, 2, 1001)]
    rows = [row[row.isfinite()] for row in rows]
    rows = [row if len(row) else torch.ones(1, dtype=dtype) for row in rows]
    q = torch.tensor([0, 0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1]).double()
    actual = of([row.to(device) for row in rows]).quantile(q)
    assert actual.shape == (3, len(q))
    for row, values in zip(actual.cpu(), rows, strict=True):
        expected = torch.quantile(values.double(), q, interpolation="nearest")
        # Buckets of subnormal values are 2^-129 wide.
        allowed = (QUANTILE_PRECISION * (1 + 1e-6) * expected.abs()).clamp(min=2**-129)
        assert ((row - expected).abs() <= allowed).all(), (row, expected)


def test_quantiles_whatever_the_default_device() -> None:
    statistics = Statistics(histogram=True)
    statistics.update(torch.arange(100.0))
    with torch.device("meta"):
        median = statistics.quantile(0.5)
    assert_same_bits(median, statistics.quantile(0.5))


def test_quantiles_of_special_values(backend: str, device: torch.device) -> None:
    """Not finite: no part. Nothing: NaN. A number, a list and a tensor ask for the same."""
    values = torch.tensor([math.nan, -math.inf, 1.0, 2.0, 3.0, math.inf, math.nan], device=device)
    statistics = of([values, values[:0]])
    for q in (0.5, [0.5], torch.tensor(0.5), torch.tensor([0.5], device=device)):
        result = statistics.quantile(q)
        assert result.shape == (2, 1)
        assert result.device.type == device.type
        assert abs(result[0, 0].item() / 2 - 1) <= QUANTILE_PRECISION
        assert result[1, 0].isnan()
    assert statistics.quantile([0.0, 1.0])[0].tolist() == pytest.approx([1, 3], rel=0.061)
    assert statistics.quantile([]).shape == (2, 0)


parts_of_one_pass = st.lists(
    st.tuples(
        st.integers(0, 300),
        st.floats(-10, 10).map(lambda mean: round(mean, 3)),
        st.sampled_from([0.1, 1.0, 3.0]),
    ),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_merge_is_one_pass(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Unequal means and numbers of values; by merging, by updating, in any order."""
    spare_interpreted(backend, dtype == torch.float64)

    @settings(few_examples, max_examples=3 if backend == "triton" else 15)
    @given(parts_of_one_pass)
    def run(parts: list[tuple[int, float, float]]) -> None:
        tensors = [
            (gamma_of(size, 0) * scale + mean).to(dtype).to(device) for size, mean, scale in parts
        ]
        together = torch.cat(tensors)
        merged, updated = Statistics(device=device), Statistics(device=device)
        for tensor in tensors:
            merged.merge(of(tensor))
            updated.update(tensor)
        reverse = of(tensors[-1])
        for tensor in tensors[-2::-1]:
            reverse.merge(of(tensor))
        for statistics in (merged, updated, reverse, of(together)):
            check(statistics, [together], PRECISION[dtype])

    run()


def test_merge_does_not_care_for_brackets(backend: str, device: torch.device) -> None:
    parts = [of((gamma_of(200 * k + 3, 0) * k - 5 * k).to(device)) for k in range(1, 5)]
    left, right = copy.deepcopy(parts[0]), copy.deepcopy(parts[3])
    for part in parts[1:]:
        left.merge(part)
    for part in parts[2::-1]:
        right.merge(part)
    pairs = copy.deepcopy(parts[0]), copy.deepcopy(parts[2])
    pairs[0].merge(parts[1])
    pairs[1].merge(parts[3])
    pairs[0].merge(pairs[1])
    for other in (right, pairs[0]):
        torch.testing.assert_close(other.moments, left.moments, rtol=1e-12, atol=0)
        assert torch.equal(other.counts, left.counts)


def test_merge_with_nothing(backend: str, device: torch.device) -> None:
    """To the bit, from both sides; a merge with itself doubles it."""
    values = torch.randn(1000, device=device)
    values[5] = math.nan
    for histogram in (True, False):
        empty = Statistics(device=device, histogram=histogram)
        full = of(values, histogram=histogram)
        before = buffers(full)
        full.merge(empty)
        assert_same(full, before)
        empty.merge(full)
        assert_same(empty, before)
        empty.merge(Statistics(device=device, histogram=histogram))
        full.merge(full)
        check_row(full, 0, torch.cat([values, values]), 1e-6)
        assert_same(empty, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["whole", "contiguous", "last"])
def test_same_bits_every_time(
    backend: str, device: torch.device, layout: str, dtype: torch.dtype
) -> None:
    """Also for another number of threads."""
    if backend == "torch":
        pytest.skip("torch's sums depend on the number of threads")
    spare_interpreted(backend, dtype != (torch.float16 if layout == "last" else torch.float32))
    shape = (2, 3, 20, 30) if is_slow(backend) else (3, 7, 150, 150)
    values = LAYOUTS["contiguous" if layout == "whole" else layout](torch.randn(shape))
    values = values.to(dtype).to(device)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 2) if backend == "cpu" else (2, 2):
            torch.set_num_threads(count)
            statistics = Statistics(shape[1] + 1, device=device)
            statistics.update(values, per_channel=layout != "whole")
            statistics.update([values, values[0, 0]], [shape[1], 1])
            results.append(statistics)
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, buffers(results[0]))
