"""Statistics of tensors in Triton, on a GPU or interpreted: tiles, programs, rows and values."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastremedy.triton_kernels import activation_stats

from .reference import FLOATS, assert_same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True])

Shape = tuple[int, int, int]

# NumPy, under the interpreter, warns of sums that overflow and are then taken again.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)


class Rows:
    """The buffers of the operator, and how far they are from the definition in float64."""

    def __init__(self, num_rows: int, has_histogram: bool = True) -> None:
        self.moments = torch.zeros(num_rows, 8, dtype=torch.float64, device=DEVICE)
        self.moments[:, 6] = math.inf
        self.moments[:, 7] = -math.inf
        self.counts = torch.zeros(num_rows, 5, dtype=torch.int64, device=DEVICE)
        self.histogram = (
            torch.zeros(num_rows, 4096, dtype=torch.int64, device=DEVICE) if has_histogram else None
        )
        self.seen: dict[int, list[Tensor]] = {}

    def update(
        self,
        tensors: list[Tensor],
        shapes: list[Shape],
        first_rows: list[int],
        armed: Tensor | None = None,
    ) -> None:
        activation_stats.update(
            tensors, shapes, first_rows, armed, self.moments, self.counts, self.histogram
        )
        if armed is None or armed.item() != 0:
            for tensor, shape, first_row in zip(tensors, shapes, first_rows, strict=True):
                for c, values in enumerate(tensor.reshape(shape).unbind(1)):
                    self.seen.setdefault(first_row + c, []).append(values.reshape(-1))

    def check(self, tolerance: float = 1e-6) -> None:
        for row in range(len(self.moments)):
            values = self.seen.get(row, [])
            x = torch.cat([torch.zeros(0, dtype=torch.float64, device=DEVICE), *values])
            finite = x[x.isfinite()]
            self._check_moments(row, finite, tolerance)
            kinds = [finite == 0, finite < 0, x.isnan(), x == math.inf, x == -math.inf]
            assert self.counts[row].tolist() == [int(kind.sum()) for kind in kinds]
            if self.histogram is not None:
                bits = finite.float().view(torch.int32).long() & 0xFFFFFFFF
                expected = torch.bincount(bits >> 20, minlength=4096)
                assert torch.equal(self.histogram[row], expected)

    def _check_moments(self, row: int, x: Tensor, tolerance: float) -> None:
        count, mean, m2, m3, m4, l1, low, high = self.moments[row].tolist()
        assert count == x.numel()
        if count == 0:
            assert (mean, m2, m3, m4, l1, low, high) == (0, 0, 0, 0, 0, math.inf, -math.inf)
            return
        d = x - x.mean()
        std = d.square().mean().sqrt().item()
        noise = 1e-15 * float(x.abs().max())
        assert mean == pytest.approx(x.mean().item(), abs=tolerance * std + noise)
        for k, actual in ((2, m2), (3, m3), (4, m4)):
            magnitude = d.abs().pow(k).sum().item()
            expected = d.pow(k).sum().item()
            assert actual == pytest.approx(expected, abs=tolerance * magnitude + count * noise**k)
        assert l1 == pytest.approx(x.abs().sum().item(), rel=tolerance)
        assert (low, high) == (x.min().item(), x.max().item())


def flat(tensor: Tensor, has_histogram: bool = True) -> Rows:
    """Measure and check a tensor as a whole."""
    rows = Rows(1, has_histogram)
    rows.update([tensor], [(1, 1, tensor.numel())], [0])
    rows.check(1e-12 if tensor.dtype == torch.float64 else 1e-6)
    return rows


def channels_of(tensor: Tensor) -> Rows:
    """Measure and check the channels of a tensor [outer, channels, inner]."""
    rows = Rows(tensor.shape[1])
    rows.update([tensor], [tuple(tensor.shape)], [0])
    rows.check(1e-12 if tensor.dtype == torch.float64 else 1e-6)
    return rows


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).add(0.5).to(DEVICE, dtype)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each program several tiles, as large tensors do."""
    monkeypatch.setattr(activation_stats, "PROGRAMS", 3)
    activation_stats.plan.cache_clear()
    yield
    activation_stats.plan.cache_clear()


# --- tiles and programs ---


@pytest.mark.parametrize("size", [0, 1, 511, 513, 1023, 1025, 2049])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_edges(dtype: torch.dtype, size: int) -> None:
    x = randn(size, dtype=dtype)
    flat(x, has_histogram=False)
    flat(x)


@pytest.mark.parametrize("inner", [2, 7, 8, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_contiguous_channels(dtype: torch.dtype, inner: int) -> None:
    channels_of(randn(5, 3, inner, dtype=dtype))


@pytest.mark.parametrize("channels", [2, 7, 8, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channels_last(dtype: torch.dtype, channels: int) -> None:
    channels_of(randn(17 if channels > 8 else 130, channels, 1, dtype=dtype))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("shape", [(1, 1, 20_000), (70, 2, 200), (700, 9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_tiles_and_programs(dtype: torch.dtype, shape: Shape) -> None:
    x = randn(*shape, dtype=dtype)
    first, second = channels_of(x), channels_of(x)
    assert_same_bits(first.moments, second.moments)


@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 1), (1, 1, 2**34 + 1), (32, 64, 56 * 56), (256, 2048, 49)],
        *[(2**20, 4096, 1), (7, 65, 10_000), (2, 3, 2**31 + 1), (1, 2**22, 1)],
    ],
)
def test_plans_cover_everything(shape: Shape) -> None:
    for dtype in FLOATS:
        for has_histogram in (False, True):
            plan = activation_stats.plan(*shape, dtype, True, has_histogram)
            outer, channels, inner = plan.shape
            assert outer * channels * inner == math.prod(shape)
            form = plan.form
            num_tiles = -(-outer // form.rows)
            if form.channels_last:
                assert (plan.num_blocks - 1) * form.cols < channels <= plan.num_blocks * form.cols
            else:
                assert plan.num_blocks == channels
                num_tiles *= -(-inner // form.cols)
            assert (plan.num_splits - 1) * plan.tiles_per_split < num_tiles
            assert num_tiles <= plan.num_splits * plan.tiles_per_split
            assert plan.tiles_per_split <= activation_stats.MAX_TILES
            assert plan.num_blocks * plan.num_splits < 2**31
            lanes = activation_stats.NUM_THREADS * (2 if form.channels_last else 1)
            in_lane = form.rows * form.cols // lanes
            assert in_lane < 32  # counts of a tile have five bits
            assert in_lane * plan.tiles_per_split < 1024  # and those of a program ten


def test_misaligned_views() -> None:
    for dtype in FLOATS:
        buffer = torch.full((6 * 8 * 4 + 3,), math.nan, device=DEVICE, dtype=dtype)
        for shape in ((1, 1, 192), (6, 8, 4), (24, 8, 1)):
            view = buffer[1:-2].view(shape).copy_(randn(*shape))
            channels_of(view)


# --- rows ---


def test_many_tensors_in_one_call() -> None:
    rows = Rows(40)
    shapes = [(1, 1, 700), (4, 5, 6), (0, 3, 2), (9, 7, 1), (1, 1, 1), (3, 2, 100), (2, 1, 8)]
    tensors = [randn(*shape, dtype=FLOATS[i % 4]) for i, shape in enumerate(shapes)]
    first_rows = [39, 0, 36, 5, 20, 30, 12]
    for _ in range(2):
        rows.update(tensors, shapes, first_rows)
        rows.check()
    rows.update([], [], [])
    rows.check()


@LAYOUTS
def test_calls_accumulate(channels_last: bool) -> None:
    rows = Rows(3)
    for outer, mean, std in ((4, 0.0, 1.0), (100, 1000.0, 1.0), (1, -3.0, 0.1), (30, 5.0, 100.0)):
        shape = (outer, 3, 1) if channels_last else (outer, 3, 5)
        rows.update([randn(*shape) * std + mean], [shape], [0])
        rows.check()


def test_nothing_happens_unless_armed() -> None:
    armed = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    rows = Rows(4)
    x = randn(10, 3, 2)
    rows.update([x, x], [(1, 1, 60), (10, 3, 2)], [0, 1], armed)
    rows.check()
    armed.fill_(1)
    rows.update([x, x], [(1, 1, 60), (10, 3, 2)], [0, 1], armed)
    rows.check()
    assert rows.moments[0, 0] == 60


# --- values ---


def test_mean_is_a_thousand_deviations() -> None:
    for x in (randn(12_000) + 1000, (randn(12_000) + 1000).sort().values):
        flat(x)
        channels_of(x.view(60, 2, 100))
        channels_of(x[:3000].view(-1, 2, 1))


@pytest.mark.usefixtures("few_programs")
def test_tiles_of_another_kind_than_the_first() -> None:
    for others in (1e30, 1e-12, 1e-38, 1000.0):
        x = randn(8192) * others
        for first in (0.0, 1.0, math.nan):
            x[:1024] = first
            flat(x)


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-12, 1e12, 3e37])
def test_powers_that_float32_does_not_hold(scale: float) -> None:
    x = (torch.randn(3000).double() * scale).float().to(DEVICE)
    flat(x)
    channels_of(x.view(-1, 3, 1))
    flat(x.bfloat16())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype) -> None:
    x = randn(50, 6, 10, dtype=dtype)
    x[3, 0, 2] = math.nan
    x[4, 1] = math.inf
    x[:, 2] = -math.inf
    x[:, 3] = math.nan
    x[::2, 4] = 0.0
    x[1::2, 4] = -0.0
    channels_of(x)
    flat(x)
    channels_of(x.permute(0, 2, 1).reshape(500, 6, 1))


def test_extremes_of_every_dtype() -> None:
    for dtype in FLOATS:
        info = torch.finfo(dtype)
        tiny = info.smallest_normal
        values = [0.0, -0.0, tiny, -tiny, 1.0, -1.0]
        if dtype != torch.float64:  # whose fourth powers overflow
            values += [info.max, info.min]
        flat(torch.tensor(values * 50, dtype=dtype, device=DEVICE))


def test_constants_have_no_deviation() -> None:
    rows = flat(torch.full((3000,), 0.1, device=DEVICE))
    assert rows.moments[0, 2:5].tolist() == [0, 0, 0]
