"""Statistics of tensors: where they are collected, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends
from ..ops import activation_stats_dispatch as dispatch
from ..ops.activation_stats import (
    COUNTS,
    NUM_BUCKETS,
    empty_moments,
    merge,
    quantiles,
)
from ..ops.dispatch import is_traced


@dataclass(frozen=True)
class Summary:
    """Statistics of the finite values of every row, each ``[R]``; NaN where there is no value."""

    count: Tensor  # int64, finite values
    mean: Tensor  # float64, as all that follows unless it says otherwise
    var: Tensor  # biased
    std: Tensor
    skewness: Tensor
    kurtosis: Tensor  # excess: 0 for a normal distribution
    min: Tensor
    max: Tensor
    amax: Tensor  # largest magnitude
    l1: Tensor  # sum of magnitudes
    l2: Tensor  # norm
    zeros: Tensor  # share of the finite values that are zero
    negatives: Tensor  # share of the finite values that are below zero
    nan: Tensor  # int64
    positive_inf: Tensor  # int64
    negative_inf: Tensor  # int64


class Statistics:
    """Statistics of tensors, one row for each tensor or channel, in a small buffer on their device.

    Every update reads each element once; nothing waits for the device. Values that are not finite
    are counted and take no part in the rest. Counts are int64. Moments are those of one pass over
    all values in float64 up to 1e-6, also where the mean is 1000 standard deviations.

    Equivalent to: ``torch.var_mean``, ``aminmax``, ``isnan().sum()`` and so on of the concatenation
    of all that was given to a row.

    Args:
        num_rows: number of tensors or channels to keep apart.
        histogram: also count values by sign, exponent and 3 bits of the mantissa (32 KiB a row),
            for :meth:`quantile`.
        device: where the tensors will be.

    Example:
        >>> import torch, fastremedy
        >>> statistics = fastremedy.stats.Statistics()
        >>> statistics.update(torch.tensor([1.0, 2.0, 3.0, float("nan")]))
        >>> statistics.update(torch.tensor([0.0]))
        >>> summary = statistics.compute()
        >>> summary.mean, summary.nan
        (tensor([1.5000], dtype=torch.float64), tensor([1]))
    """

    def __init__(
        self,
        num_rows: int = 1,
        histogram: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        """Create empty rows."""
        if num_rows < 1:
            raise ValueError(f"num_rows must be positive, got {num_rows}")
        with torch.inference_mode(False):  # whoever comes first, others may update
            self.moments = empty_moments(num_rows, device)  # [R, 8]
            self.counts = self.moments.new_zeros(num_rows, len(COUNTS), dtype=torch.int64)
            self.histogram: Tensor | None = None
            if histogram:
                self.histogram = self.moments.new_zeros(num_rows, NUM_BUCKETS, dtype=torch.int64)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.moments.shape[0]

    @property
    def num_bytes(self) -> int:
        """Memory of the buffer."""
        tensors = (self.moments, self.counts, self.histogram)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def update(
        self,
        tensor: Tensor | Sequence[Tensor],
        row: int | Sequence[int] = 0,
        *,
        per_channel: bool = False,
        armed: Tensor | None = None,
    ) -> None:
        """Add the values of a tensor, or of several in one launch.

        Args:
            tensor: of any shape and strides; real. float32, float64, float16 and bfloat16 are read
                as they lie, others are converted.
            row: where the values belong; of ``per_channel`` the row of channel 0.
            per_channel: tensors are ``[N, C, *]`` or ``[C]``, and channel c belongs to row
                ``row + c``.
            armed: int32 scalar on the device: nothing happens while it is 0, which a CUDA graph
                sees at every replay.

        Raises:
            ValueError: rows do not exist or overlap; a tensor is on another device.
            TypeError: a tensor is complex, not strided or not a tensor.
        """
        tensors: list[Tensor] = _as_list("tensor", tensor, lambda t: isinstance(t, Tensor))
        rows: list[int] = _as_list("row", row, lambda r: hasattr(r, "__index__"))
        self._check(tensors, rows, per_channel)
        self._check_armed(armed)
        buffers = (armed, self.moments, self.counts, self.histogram)
        if any(is_traced(t) for t in tensors):
            torch.ops.fastremedy.activation_stats_(tensors, rows, per_channel, *buffers)
        else:
            backend = backends.active(dispatch.STEM, self.moments.device)
            dispatch.update(tensors, rows, per_channel, *buffers, backend)

    def _check(self, tensors: list[Tensor], rows: list[int], per_channel: bool) -> None:
        if len(tensors) != len(rows):
            raise ValueError(
                f"row must have one value for each of {len(tensors)} tensors, got {rows}"
            )
        end = 0
        for tensor, row in sorted(zip(tensors, rows, strict=True), key=lambda pair: pair[1]):
            if tensor.is_complex():
                raise TypeError(f"tensor must be real, got {tensor.dtype}")
            if tensor.layout != torch.strided or tensor.is_nested:
                layout = "a nested tensor" if tensor.is_nested else tensor.layout
                raise TypeError(f"tensor must be strided, got {layout}")
            if tensor.device != self.moments.device:
                raise ValueError(f"tensor must be on {self.moments.device}, got {tensor.device}")
            if per_channel and tensor.dim() == 0:
                raise ValueError("tensor must be [C] or [N, C, *] to be taken per channel, got []")
            channels = tensor.shape[0 if tensor.dim() == 1 else 1] if per_channel else 1
            if row < end or row + channels > self.num_rows:
                raise ValueError(
                    f"row must lead to rows of its own in [0, {self.num_rows}), got {row} for "
                    f"{channels} channels"
                )
            end = row + channels

    def _check_armed(self, armed: Tensor | None) -> None:
        if armed is None:
            return
        device = self.moments.device
        if not isinstance(armed, Tensor):
            raise TypeError(f"armed must be a Tensor, got {type(armed).__name__}")
        if armed.dtype != torch.int32 or armed.numel() != 1 or armed.device != device:
            raise ValueError(
                f"armed must be one int32 on {device}, got {armed.dtype} {list(armed.shape)} on "
                f"{armed.device}"
            )

    def _kind(self) -> str:
        return f"{self.num_rows} rows and {'no' if self.histogram is None else 'a'} histogram"

    def merge(self, other: Statistics) -> None:
        """Add what ``other`` holds, row by row, as if its values had been given to this one."""
        if not isinstance(other, Statistics):
            raise TypeError(f"other must be Statistics, got {type(other).__name__}")
        if other._kind() != self._kind():
            raise ValueError(f"other must have {self._kind()}, got {other._kind()}")
        device = self.moments.device
        self.moments.copy_(merge(self.moments, other.moments.to(device)))
        self.counts += other.counts.to(device)
        if self.histogram is not None and other.histogram is not None:
            self.histogram += other.histogram.to(device)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge over the ranks of a group, in the order of ranks: the same bits on all of them."""
        parts = [torch.empty_like(self.moments) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, self.moments, group=group)
        total = parts[0]
        for part in parts[1:]:
            total = merge(total, part)
        self.moments.copy_(total)
        dist.all_reduce(self.counts, group=group)
        if self.histogram is not None:
            dist.all_reduce(self.histogram, group=group)

    def reset(self) -> None:
        """Forget everything, in place."""
        self.moments.copy_(empty_moments(self.num_rows, self.moments.device))
        self.counts.zero_()
        if self.histogram is not None:
            self.histogram.zero_()

    def compute(self) -> Summary:
        """Return what the rows hold; the tensors are new and stay on the device."""
        return summarize(self.moments, self.counts)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Return quantiles of the finite values ``[R, Q]``, at most 6.1 % off.

        That holds for the normal numbers of float32; smaller values count as zero, and larger ones
        are left out.

        Args:
            q: in [0, 1]; 0.5 is the median.

        Raises:
            RuntimeError: there is no histogram.
            ValueError: ``q`` is not in [0, 1].
        """
        if self.histogram is None:
            raise RuntimeError("quantiles need Statistics(histogram=True)")
        points = torch.as_tensor(q, dtype=torch.float64, device="cpu").reshape(-1)
        if not bool(((points >= 0) & (points <= 1)).all()):
            raise ValueError(f"q must be in [0, 1], got {q}")
        return quantiles(self.histogram, self.moments, points.to(self.moments.device))


def summarize(moments: Tensor, counts: Tensor) -> Summary:
    """Return what rows ``[*, R, 8]`` and ``[*, R, 5]`` of the operator's results say."""
    count, mean, m2, m3, m4, l1, least, most = moments.unbind(-1)
    zero, negative, nan, positive_inf, negative_inf = counts.unbind(-1)
    var = m2 / count
    nothing = torch.where(count > 0, 0.0, torch.nan)
    return Summary(
        count.long(),
        mean + nothing,
        var,
        var.sqrt(),
        m3 / count / var.pow(1.5),
        m4 / count / var.square() - 3,
        least + nothing,
        most + nothing,
        torch.maximum(least.abs(), most.abs()) + nothing,
        l1 + nothing,
        (m2 + count * mean.square()).sqrt() + nothing,
        zero / count,
        negative / count,
        *(values.clone() for values in (nan, positive_inf, negative_inf)),
    )


def _as_list(name: str, value: Any, is_one: Callable[[Any], bool]) -> list[Any]:
    """Return one value or several as a list; fail if anything else is among them."""
    values = list(value) if isinstance(value, Iterable) and not is_one(value) else [value]
    for item in values:
        if not is_one(item):
            kind = "a Tensor" if name == "tensor" else "an integer"
            raise TypeError(f"{name} must be {kind}, got {type(item).__name__}, or a sequence")
    return values
