"""What a monitor reports, in files of TensorBoard, read back with its own reader."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastremedy.ops.activation_stats import histogram_of
from fastremedy.stats import tensorboard
from fastremedy.stats.report import Report

from .stats_reports import POOR_REPORTS, STEPS, make_part, make_report


def read_events(path: Path) -> Any:
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    everything = {"scalars": 0, "histograms": 0, "tensors": 0}
    return module.EventAccumulator(str(path), size_guidance=everything).Reload()


def write(path: Path, *reports: Report) -> Any:
    writers = pytest.importorskip("torch.utils.tensorboard")
    written: dict[str, Tensor] = {}
    with writers.SummaryWriter(str(path)) as writer:
        for step, report in enumerate(reports):
            written = tensorboard.write(report, writer, 100 * step, written)
    return read_events(path)


def test_scalars_are_those_of_the_last_step(tmp_path: Path) -> None:
    report = make_report()
    report.parts["activations"].by_step["mean"][:] = torch.tensor([[1.0], [2.0], [3.0]])
    events = write(tmp_path, report)
    mean = events.Scalars("activations/blocks.1.fc/mean")
    assert [(event.step, event.value) for event in mean] == [(0, 3.0)]
    tags = events.Tags()["scalars"]
    assert "updates/blocks.2.fc.bias/update_norm" in tags
    assert not any(tag.endswith("saturated") for tag in tags)
    assert events.Tags()["histograms"] == []


def histogram_report(*rows: Tensor) -> Report:
    histogram = torch.cat([histogram_of(row[None]) for row in rows])
    names = [f"layer{i}" for i in range(len(rows))]
    return Report(STEPS, {"activations": make_part("activations", names, histogram=histogram)})


def check_histogram(value: Any, x: Tensor) -> None:
    limits = torch.tensor(value.bucket_limit, dtype=torch.float64)
    x = x.double()[x.isfinite()]
    assert len(limits) <= tensorboard.MAX_LIMITS
    assert bool((limits.diff() > 0).all())
    assert value.min == limits[0] <= x.min() <= x.max() <= limits[-1] == value.max
    assert value.num == len(x) == sum(value.bucket)
    # Intervals are closed at the end nearer to zero; the one with zero is open.
    up = torch.bucketize(x, limits, right=True).clamp(max=len(limits) - 1)
    down = torch.bucketize(x, limits).clamp(min=1)
    expected = torch.where(x < 0, down, up).bincount(minlength=len(limits))
    assert value.bucket == expected.tolist()
    error = 0.0626 * x.abs().sum().item() + 1e-30
    assert value.sum == pytest.approx(x.sum().item(), abs=error)
    assert value.sum_squares == pytest.approx(x.square().sum().item(), rel=0.13, abs=1e-30)


HISTOGRAMS = {
    "normal": torch.randn(20000, generator=torch.Generator().manual_seed(0)),
    "relu": torch.randn(500, generator=torch.Generator().manual_seed(1)).relu(),
    "negative": -torch.rand(500, generator=torch.Generator().manual_seed(2)) - 1,
    "zeros": torch.tensor([0.0, -0.0, 0.0]),
    "one": torch.tensor([1.0]),
    "edges": torch.tensor([-1.125, -1.0, 1.0, 1.125, 1.25, -2.0]),
    "smallest": torch.tensor([2.0**-126, -(2.0**-126), 1e-40, -1e-40]),
    "largest": torch.tensor([1.0, -1.0]) * torch.finfo(torch.float32).max,
    "everything": torch.logspace(-37, 38, 9000) * torch.tensor([1.0, -1.0]).repeat(4500),
    "not finite": torch.tensor([math.nan, math.inf, -math.inf, 3.0]),
}


@pytest.mark.parametrize("case", HISTOGRAMS)
def test_histograms_read_back(tmp_path: Path, case: str) -> None:
    x = HISTOGRAMS[case]
    events = write(tmp_path, histogram_report(x))
    (event,) = events.Histograms("activations/layer0")
    assert event.step == 0
    check_histogram(event.histogram_value, x)


def test_histograms_are_fine_where_there_is_room() -> None:
    x = histogram_of(HISTOGRAMS["normal"][None])
    limits, counts = tensorboard._join(tensorboard._in_order(x)[0])
    assert sorted(counts[counts > 0].tolist()) == sorted(x[x > 0].tolist())
    assert not bool(((counts[:-1] == 0) & (counts[1:] == 0)).any())
    assert len(limits) == len(counts) + 1


def test_histograms_hold_what_is_new(tmp_path: Path) -> None:
    first, second = HISTOGRAMS["normal"], HISTOGRAMS["negative"]
    unused = torch.tensor([])
    reports = [
        histogram_report(first, unused),
        histogram_report(torch.cat([first, second]), unused),
        histogram_report(torch.cat([first, second]), torch.ones(2)),
    ]
    events = write(tmp_path, *reports)
    written = events.Histograms("activations/layer0")
    assert [event.step for event in written] == [0, 100]
    check_histogram(written[0].histogram_value, first)
    check_histogram(written[1].histogram_value, second)
    (only,) = events.Histograms("activations/layer1")
    assert (only.step, only.histogram_value.num) == (200, 2)


def test_tensorboard_shows_the_same_edges() -> None:
    """What its frontend gets: the outer limits come from min and max."""
    pytest.importorskip("tensorboard")
    from tensorboard import data_compat
    from tensorboard.util.tensor_util import make_ndarray
    from torch.utils.tensorboard.summary import histogram_raw

    class Writer:
        def add_histogram_raw(self, tag: str, **values: Any) -> None:
            del values["global_step"]
            (value,) = histogram_raw(tag, *values.values()).value
            self.buckets = make_ndarray(data_compat.migrate_value(value).tensor)

    writer = Writer()
    x = torch.tensor([-3.0, 0.0, 0.0, 1.0])
    tensorboard._write_histogram(writer, "x", tensorboard._in_order(histogram_of(x[None]))[0], 0)  # type: ignore[arg-type]
    buckets = [tuple(row) for row in writer.buckets.tolist() if row[2]]
    tiny = float(torch.tensor(1 << 20, dtype=torch.int32).view(torch.float32))
    assert buckets == [(-3.25, -3.0, 1.0), (-tiny, tiny, 2.0), (1.0, 1.125, 1.0)]


@pytest.mark.parametrize("poor", POOR_REPORTS)
def test_tensorboard_of_little(tmp_path: Path, poor: str) -> None:
    report = POOR_REPORTS[poor]
    events = write(tmp_path, report)
    tags = events.Tags()["scalars"]
    num_known = sum(
        int((~values[-1:].isnan()).sum())
        for part in report.parts.values()
        for values in part.by_step.values()
    )
    assert len(tags) == num_known


def test_scalars_are_the_last_that_are_known(tmp_path: Path) -> None:
    part = make_part("weights", ["a", "b"], num_steps=3, mean=1.0)
    part.by_step["mean"] = torch.tensor(
        [[1.0, math.nan], [2.0, math.nan], [math.nan, math.nan]], dtype=torch.float64
    )
    events = write(tmp_path, Report([0, 1, 2], {"weights": part}))
    assert [event.value for event in events.Scalars("weights/a/mean")] == [2.0]
    assert "weights/b/mean" not in events.Tags()["scalars"]
