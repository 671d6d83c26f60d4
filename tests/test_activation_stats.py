"""Statistics of tensors: every field on every backend, and every way that tensors come."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastremedy.stats import Statistics, Summary

from .activation_stats_reference import (
    PRECISION,
    assert_same,
    buffers,
    check,
    check_row,
    of,
    rows_of,
    spare_interpreted,
)
from .batch_norm_reference import LAYOUTS, is_slow
from .reference import FLOATS, assert_same_bits

SIZES = (0, 1, 2, 3, 15, 16, 17, 31, 33, 1023, 1024, 1025)
LONG_SIZES = (16383, 16384, 16385, 65535, 65536, 65537, 200_001)


def values_of(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return both signs, both zeros and no symmetry."""
    values = torch.randn(size, dtype=torch.float64).exp() - 0.75
    values[2::7] = 0
    values[5::11] = -0.0
    return values.to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_field(backend: str, device: torch.device, size: int, dtype: torch.dtype) -> None:
    spare_interpreted(backend, dtype != torch.float32 and size not in (1, 17))
    values = values_of(size, dtype).to(device)
    check(of(values), [values], PRECISION[dtype])


@pytest.mark.parametrize("histogram", [True, False], ids=["histogram", "moments"])
@pytest.mark.parametrize("size", LONG_SIZES)
def test_pieces_of_long_tensors(
    backend: str, device: torch.device, size: int, histogram: bool
) -> None:
    spare_interpreted(backend, size != 16385)
    values = values_of(size).to(device)
    check(of(values, histogram=histogram), [values], 1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_updates_accumulate(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    statistics = Statistics(2, device=device)
    given: list[list[Tensor]] = [[torch.empty(0)], [torch.empty(0)]]
    for step in range(5):
        values = (values_of(100 + 30 * step) * 2**step + 3 * step).to(dtype).to(device)
        row = step % 2
        statistics.update(values, row)
        given[row].append(values.cpu())
    check(statistics, [torch.cat(values) for values in given], PRECISION[dtype])


def test_tensors_of_all_dtypes_at_once(backend: str, device: torch.device) -> None:
    """In any order of rows; tensors without elements are nothing."""
    dtypes = (*FLOATS, torch.int64, torch.bool, torch.float32)
    tensors = [values_of(40 + 3 * i).to(dtype).to(device) for i, dtype in enumerate(dtypes)]
    tensors[-1] = tensors[-1][:0]
    rows = [5, 0, 2, 7, 1, 4, 3]
    statistics = Statistics(9, device=device)
    statistics.update(tensors, rows)
    given = {row: tensor for row, tensor in zip(rows, tensors, strict=True)}
    check(statistics, [given.get(row, torch.empty(0)) for row in range(9)], 1e-6)


@pytest.mark.parametrize("histogram", [True, False], ids=["histogram", "moments"])
def test_many_tensors(backend: str, device: torch.device, histogram: bool) -> None:
    """More than the arguments of a launch hold."""
    spare_interpreted(backend, histogram)
    count = 20 if backend == "triton" else 700
    tensors = [values_of(1 + i % 50).to(device) + i for i in range(count)]
    statistics = of(tensors, histogram=histogram)
    for row in range(0, count, 7):
        check_row(statistics, row, tensors[row], 1e-6)


def test_no_tensor(backend: str, device: torch.device) -> None:
    statistics = Statistics(2, device=device)
    statistics.update([], [])
    check(statistics, [torch.empty(0)] * 2, 0)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "scalar": lambda t: t.reshape(-1)[0],
    "expanded": lambda t: t[:, :1].expand(-1, 9, *[-1] * (t.dim() - 2)),
    "overlapping": lambda t: t.reshape(-1).unfold(0, 5, 2),
    "diagonal": lambda t: t.reshape(-1)[:36].view(6, 6).diagonal(),
    "negative": lambda t: torch.view_as_complex(torch.stack([t, t], -1)).conj().imag,
    "permuted": lambda t: t.permute(2, 0, 3, 1),
    "offset": lambda t: t.reshape(-1)[3:],
}


@pytest.mark.parametrize("way", WAYS)
def test_any_strides(backend: str, device: torch.device, way: str) -> None:
    for dtype in FLOATS if way == "misaligned" else FLOATS[:1]:
        values = values_of(3 * 5 * 4 * 7, torch.float32 if way == "negative" else dtype)
        tensor = WAYS[way](values.view(3, 5, 4, 7).to(device))
        assert way != "negative" or tensor.is_neg()
        check(of(tensor), [tensor.reshape(-1)], PRECISION[dtype])


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_misaligned(backend: str, device: torch.device, offset: int) -> None:
    spare_interpreted(backend, offset > 2)
    for dtype in FLOATS:
        tensor = values_of(300 + offset, dtype).to(device)[offset:]
        check(of(tensor), [tensor], PRECISION[dtype])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
def test_integers(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    tensor = torch.randint(0 if dtype in (torch.bool, torch.uint8) else -100, 100, (4, 3, 5))
    tensor = tensor.to(dtype).to(device)
    check(of(tensor), [tensor.reshape(-1)], 1e-6)
    statistics = Statistics(3, device=device)
    statistics.update(tensor, per_channel=True)
    check(statistics, rows_of(tensor, True), 1e-6)


SHAPES = [
    (5,), (1, 1), (7, 3), (1, 70), (2, 3, 5), (3, 5, 4, 4), (2, 33, 3, 2), (1, 3, 1, 1),
    (2, 4, 3, 2, 5), (4, 1, 6, 6), (600, 2), (300, 20), (2, 3, 1030),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_per_channel(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    """Rows before and after those of the channels stay as they are."""
    spare_interpreted(backend, shape not in ((5,), (7, 3), (3, 5, 4, 4), (2, 3, 1030)))
    tensor = values_of(math.prod(shape)).view(shape)
    channels = shape[0] if len(shape) == 1 else shape[1]
    tensor = (tensor + torch.arange(channels).view(-1, *[1] * (len(shape) - 2))).to(device)
    statistics = Statistics(channels + 2, device=device)
    statistics.update(tensor, 1, per_channel=True)
    statistics.update(tensor * 3, 1, per_channel=True)
    rows = rows_of(torch.cat([tensor, tensor * 3]), True) if tensor.dim() > 1 else [
        torch.stack([value, value * 3]) for value in tensor
    ]  # fmt: skip
    check(statistics, [torch.empty(0), *rows, torch.empty(0)], 1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_per_channel_of_any_strides(
    backend: str, device: torch.device, layout: str, dtype: torch.dtype
) -> None:
    of_kernels = ("contiguous", "last", "misaligned", "misaligned_last", "sliced")
    spare_interpreted(backend, dtype != torch.float16 or layout not in of_kernels)
    shapes = (3, 5, 4, 6), (2, 3, 7), (6, 9), (2, 3, 2, 3, 4)
    for shape in shapes[: 2 if backend == "triton" else None]:
        tensor = LAYOUTS[layout](values_of(math.prod(shape), dtype).view(shape).to(device))
        statistics = Statistics(shape[1], device=device)
        statistics.update(tensor, per_channel=True)
        check(statistics, rows_of(tensor, True), PRECISION[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("shape", [(2, 3, 260, 130), (5, 200, 24, 24), (700, 300)], ids=str)
def test_pieces_of_channels(
    backend: str, device: torch.device, shape: tuple[int, ...], layout: str
) -> None:
    spare_interpreted(backend, shape == (5, 200, 24, 24))
    if backend == "triton":
        shape = tuple(1 + size // 5 for size in shape)
    elif is_slow(backend):
        shape = tuple(1 + size // 2 for size in shape)
    tensor = LAYOUTS[layout](values_of(math.prod(shape)).view(shape).to(device))
    statistics = Statistics(shape[1], device=device)
    statistics.update(tensor, per_channel=True)
    check(statistics, rows_of(tensor, True), 1e-6)


def test_several_tensors_per_channel(backend: str, device: torch.device) -> None:
    tensors = [values_of(24).view(2, 3, 4), values_of(5), values_of(40).view(10, 4)]
    tensors = [tensor.to(device) for tensor in tensors] + [torch.empty(0, 2, 3, device=device)]
    statistics = Statistics(15, device=device)
    statistics.update(tensors, [9, 0, 5, 13], per_channel=True)
    rows = {13: torch.empty(0), 14: torch.empty(0)}
    for tensor, first in zip(tensors, (9, 0, 5), strict=False):
        rows |= dict(enumerate(rows_of(tensor, True), first))
    check(statistics, [rows.get(row, torch.empty(0)) for row in range(15)], 1e-6)


SPECIAL = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
def test_values_that_are_not_finite(
    backend: str, device: torch.device, per_channel: bool, dtype: torch.dtype
) -> None:
    """They are counted and take no part in the rest, wherever they are."""
    spare_interpreted(backend, dtype in (torch.float64, torch.bfloat16))
    for value, place in ((v, p) for v in SPECIAL for p in (slice(0, 1), slice(7, 9))):
        tensor = values_of(2 * 3 * 40, dtype).view(2, 3, 40)
        tensor[1, 2, place] = value
        tensor[0, 0, ::3] = value
        tensor = tensor.to(device)
        statistics = Statistics(3 if per_channel else 1, device=device)
        statistics.update(tensor, per_channel=per_channel)
        check(statistics, rows_of(tensor, per_channel), PRECISION[dtype])


@pytest.mark.parametrize("size", [1, 2, 17, 1025])
def test_nothing_but_special_values(backend: str, device: torch.device, size: int) -> None:
    """Quantiles and everything else are NaN; finite values may follow."""
    tensors = [torch.full((size,), value, device=device) for value in SPECIAL]
    tensors.append(torch.tensor(SPECIAL, device=device).repeat(size))
    statistics = of(tensors)
    check(statistics, tensors, 0)
    assert statistics.quantile([0, 0.5, 1]).isnan().all()
    finite = values_of(100).to(device)
    statistics.update([finite] * 4, range(4))
    check(statistics, [torch.cat([tensor, finite]) for tensor in tensors], 1e-6)


@pytest.mark.parametrize("flag", [0, 1])
@pytest.mark.parametrize("per_channel", [False, True])
def test_armed(backend: str, device: torch.device, per_channel: bool, flag: int) -> None:
    statistics = Statistics(3, device=device)
    statistics.update(values_of(60).view(4, 3, 5).to(device), per_channel=True)
    other = copy.deepcopy(statistics)
    before = buffers(statistics)
    tensor = values_of(24).view(2, 3, 4).to(device)
    armed = torch.tensor(flag, dtype=torch.int32, device=device)
    statistics.update(tensor, per_channel=per_channel, armed=armed)
    other.update(tensor, per_channel=per_channel)
    assert_same(statistics, buffers(other) if flag else before)
    armed.fill_(1)
    statistics.update(tensor, per_channel=per_channel, armed=armed)
    assert not torch.equal(statistics.counts, before[1])


@pytest.mark.parametrize("histogram", [True, False], ids=["histogram", "moments"])
def test_life_of_the_buffer(backend: str, device: torch.device, histogram: bool) -> None:
    """Reset is in place; copies are independent; bytes are those of the tensors."""
    statistics = Statistics(3, histogram=histogram, device=device)
    assert statistics.num_rows == 3
    assert statistics.num_bytes == 3 * 8 * (8 + 5 + 4096 * histogram)
    assert statistics.moments.device.type == device.type
    empty = buffers(statistics)
    values = values_of(50).to(device)
    statistics.update(values, 1)
    full = buffers(statistics)
    copies = [copy.deepcopy(statistics), pickle.loads(pickle.dumps(statistics))]
    addresses = statistics.moments.data_ptr(), statistics.counts.data_ptr()
    summary = statistics.compute()
    statistics.reset()
    assert_same(statistics, empty)
    assert addresses == (statistics.moments.data_ptr(), statistics.counts.data_ptr())
    check_row(copies[0], 1, values, 1e-6)
    assert summary.count[1] == 50, "results do not share memory with the buffer"
    for each in copies:
        assert_same(each, full)
        each.update(values, 1)
        check_row(each, 1, torch.cat([values, values]), 1e-6)
    assert_same(statistics, empty)


def test_results_are_new(device: torch.device, backend: str) -> None:
    statistics = of(values_of(50).to(device))
    before = buffers(statistics)
    summary = statistics.compute()
    assert isinstance(summary, Summary)
    for value in vars(summary).values():
        assert value.device.type == device.type
        value.fill_(-7)
    statistics.quantile(0.5).fill_(-7)
    assert_same(statistics, before)


def test_values_are_only_read(backend: str, device: torch.device) -> None:
    tensor = values_of(100).to(device)
    given = tensor.clone()
    of(tensor)
    assert_same_bits(tensor, given)


ONES = torch.ones(2, 3)
nested = torch.nested.as_nested_tensor
REFUSED = (TypeError, ValueError)
# The call, the exception, and what its message has to say.
REFUSALS: list[tuple[Callable[[Statistics], Any], Any, str]] = [
    (lambda s: s.update(ONES, 3), ValueError, "row must lead to rows of its own in [0, 3), got 3"),
    (lambda s: s.update(ONES, -1), ValueError, "row must lead to rows of its own in [0, 3), got -"),
    (lambda s: s.update([ONES, ONES], [1, 1]), ValueError, "row must lead to rows of its own"),
    (lambda s: s.update(torch.ones(2, 4), per_channel=True), ValueError, "got 0 for 4 channels"),
    (lambda s: s.update(ONES, 1, per_channel=True), ValueError, "got 1 for 3 channels"),
    (lambda s: s.update([ONES[:, :2]] * 2, [0, 1], per_channel=True), ValueError, "got 1 for 2"),
    (lambda s: s.update([ONES, ONES], [0]), ValueError, "row must have one value for each of 2"),
    (lambda s: s.update([ONES, ONES], 0), ValueError, "row must have one value for each of 2"),
    (lambda s: s.update([ONES, ONES * 1j], [0, 1]), TypeError, "must be real, got torch.complex64"),
    (lambda s: s.update(ONES.to_mkldnn()), TypeError, "must be strided, got torch._mkldnn"),
    (lambda s: s.update([ONES, ONES.to_sparse()], [0, 1]), TypeError, "got torch.sparse_coo"),
    (lambda s: s.update(nested([ONES], layout=torch.jagged)), TypeError, "got a nested tensor"),
    (lambda s: s.update([ONES, 1.0], [0, 1]), TypeError, "tensor must be a Tensor, got float"),
    (lambda s: s.update(1.0), TypeError, "tensor must be a Tensor, got float"),
    (lambda s: s.update(None), TypeError, "tensor must be a Tensor, got NoneType"),
    (lambda s: s.update(ONES, 1.5), TypeError, "row must be"),
    (lambda s: s.update([ONES], [1.5]), TypeError, "row must be"),
    (lambda s: s.update([ONES, ONES.to("meta")], [0, 1]), ValueError, "must be on cpu, got meta"),
    (lambda s: s.update(ONES[0, 0], per_channel=True), ValueError, "[C] or [N, C, *]"),
    (lambda s: s.update(ONES, armed=True), TypeError, "armed must be"),
    (lambda s: s.update(ONES, armed=torch.tensor(True)), REFUSED, "armed must be"),
    (lambda s: s.update(ONES, armed=torch.ones(2).int()), ValueError, "armed must be"),
    (lambda s: s.update(ONES, armed=ONES[0, 0].int().to("meta")), REFUSED, "armed must be"),
    (lambda s: s.merge(Statistics(2)), ValueError, "other must have 3 rows and a histogram, got 2"),
    (lambda s: s.merge(Statistics(3, False)), ValueError, "got 3 rows and no histogram"),
    (lambda s: s.merge(3), TypeError, "other must be"),
    (lambda s: s.quantile(1.5), ValueError, "q must be in [0, 1], got 1.5"),
    (lambda s: s.quantile([0.5, -0.1]), ValueError, "q must be in [0, 1], got [0.5, -0.1]"),
    (lambda s: s.quantile(math.nan), ValueError, "q must be in [0, 1], got nan"),
    (lambda s: Statistics(3, False).quantile(0.5), RuntimeError, "histogram=True"),
    (lambda s: Statistics(0), ValueError, "num_rows must be positive, got 0"),
    (lambda s: Statistics(-2), ValueError, "num_rows must be positive, got -2"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSALS)))
def test_refused(case: int) -> None:
    """The message names the argument, what was expected and what came; rows stay as they were."""
    call, error, message = REFUSALS[case]
    statistics = Statistics(3)
    statistics.update(values_of(30).view(2, 3, 5), per_channel=True)
    before = buffers(statistics)
    with pytest.raises(error, match=re.escape(message)):
        call(statistics)
    assert_same(statistics, before)
