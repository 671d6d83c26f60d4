"""What a monitor reports, as a picture."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastremedy.stats import plot
from fastremedy.stats.report import Report

from .stats_reports import POOR_REPORTS, STEPS, make_part, make_report, plant


def pixels(report: Report, tmp_path: Path, name: str = "picture.png") -> Tensor:
    """8-bit colours ``[H, W, 3]``."""
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    plot.draw(report, tmp_path / name)
    return torch.tensor(imread(tmp_path / name))[..., :3].mul(255).round().int()


def where(image: Tensor, color: str) -> Tensor:
    return (image == torch.tensor(list(bytes.fromhex(color[1:])), dtype=torch.int32)).all(2)


def extent(mask: Tensor, dim: int) -> tuple[int, int]:
    places = mask.any(dim).nonzero().squeeze(1)
    return int(places[0]), int(places[-1])


def test_picture_of_a_planted_layer(tmp_path: Path) -> None:
    colormaps = pytest.importorskip("matplotlib").colormaps
    report = Report(STEPS, {"activations": make_part("activations", list("abcde"), std=1.0)})
    plant(report, "activations", 1, std=math.nan, nan=3.0)
    plant(report, "activations", 3, std=math.nan)
    image = pixels(report, tmp_path)
    assert image.shape[0] == round(150 * (2.4 + 0.16 * 8))
    heat_map = image[: int(0.88 * len(image))]  # without the legend
    left, right = extent(where(heat_map, plot.NON_FINITE), 0)
    column = heat_map[:, (left + right) // 2, None]
    red, grey = (extent(where(column, color), 1) for color in (plot.NON_FINITE, plot.UNKNOWN))
    height = red[1] - red[0] + 1
    assert grey[1] - grey[0] + 1 == pytest.approx(height, abs=1)
    assert grey[0] - red[0] == pytest.approx(2 * height, abs=2)
    healthy = torch.tensor(colormaps["viridis"](0.5, bytes=True)[:3])
    for row in (red[0] - height // 2, red[1] + height // 2, grey[1] + height // 2):
        assert int((column[row, 0] - healthy).abs().max()) <= 2
    others = [red[0] - height - 10, grey[1] + height + 10]  # above and below all rows
    assert all(int((column[row, 0] - healthy).abs().max()) > 9 for row in others)


def test_one_bad_step_of_many_is_seen(tmp_path: Path) -> None:
    report = make_report(200, list(range(1000)))
    assert int(where(pixels(report, tmp_path), plot.NON_FINITE).sum()) == 0
    report.parts["gradients"].by_step["inf"][537, 90] = 1
    image = pixels(report, tmp_path)
    red = where(image, plot.NON_FINITE)[: int(0.9 * len(image))]
    (top, bottom), (left, right) = extent(red, 1), extent(red, 0)
    assert right - left >= 2
    assert bottom - top >= 4
    assert max(image.shape) < 4000


def test_the_scale_covers_what_vanishes_and_is_calm_otherwise() -> None:
    low, high = plot._log_limits(torch.tensor([0.9, 1.0, 1.1]).double())
    assert high / low == pytest.approx(1e4)
    low, high = plot._log_limits(torch.tensor([1e-9, 1e-3, 1e-1]).double())
    assert (low, high) == (pytest.approx(1e-9), pytest.approx(1e-1))
    low, high = plot._log_limits(torch.tensor([0.0, 1.0, 1.0, 1e30, math.inf, math.nan]).double())
    assert (low, high) == (pytest.approx(1.0), pytest.approx(1e6))
    low, high = plot._log_limits(torch.tensor([math.nan, 0.0]).double())
    assert (low, high) == (1e-2, 1e2)


def test_what_was_not_read_is_as_it_was_in_the_last_full_step() -> None:
    nan = math.nan
    values = torch.tensor([[nan, 1.0], [2.0, nan], [nan, nan], [nan, 3.0]], dtype=torch.float64)
    was_called = torch.tensor([[True, True], [True, True], [True, False], [False, True]])
    expected = torch.tensor([[nan, 1.0], [2.0, 1.0], [2.0, nan], [nan, 3.0]], dtype=torch.float64)
    held = plot._held(values, was_called)
    torch.testing.assert_close(held, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("num", [1, 2, 5])
def test_joined_steps(num: int) -> None:
    values = torch.tensor([[1.0], [100.0], [math.nan], [10.0], [0.0]]).double()
    bad = torch.tensor([[False], [True], [False], [False], [False]])
    panel = plot.Panel("", [0], values, bad, (1e-2, 1e2))
    joined, non_finite = plot._join_steps(panel, num)
    expected = {1: [1, 100, math.nan, 10, 0], 2: [10, 10, 0], 5: [0]}[num]
    torch.testing.assert_close(joined[:, 0], torch.tensor(expected).double(), equal_nan=True)
    assert non_finite[:, 0].tolist() == [any(group) for group in bad[:, 0].split(num)]
    assert plot._borders([0, 10, 20, 30, 40], num)[:: len(joined)] == [-5, 45]


@pytest.mark.parametrize("poor", POOR_REPORTS)
def test_picture_of_little(tmp_path: Path, poor: str) -> None:
    image = pixels(POOR_REPORTS[poor], tmp_path)
    assert bool((image != 255).any())


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new folder" / f"picture.{suffix}"
    plot.draw(make_report(2), path)
    assert path.stat().st_size > 1000


def test_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("pip install 'fastremedy[stats]'")):
        plot.draw(make_report(), tmp_path / "picture.png")
