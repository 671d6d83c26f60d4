"""A monitor on several ranks says what one would say that saw the batches of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastremedy.optim import AdamW
from fastremedy.stats import Monitor, Report

from .process_group import spawn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs gloo")

STEPS = 10
# Of the ranks, step by step in turn: unequal, and nothing at all.
BATCHES = [(5, 3, 4), (6, 0, 2), (0, 1, 0)]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh())


def batches(step: int, world_size: int) -> list[Tensor]:
    """Return what each rank sees; their means lie apart."""
    generator = torch.Generator().manual_seed(step)
    sizes = BATCHES[step % len(BATCHES)][:world_size]
    return [
        torch.randn(size, 6, generator=generator) + 10 * rank for rank, size in enumerate(sizes)
    ]


def watch(inputs: list[Tensor], group: dist.ProcessGroup | None) -> Report:
    model = make_model()
    monitor = Monitor(model, per_channel=True, full_every=2, process_group=group)
    with monitor:
        for x in inputs:
            model(x).sum().backward()
            monitor.step()
    return monitor.report()


def run_rank(rank: int, world_size: int, folder: str) -> None:
    inputs = [batches(step, world_size)[rank] for step in range(STEPS)]
    report = watch(inputs, dist.group.WORLD)

    model = make_model()
    with Monitor(model, process_group=dist.group.WORLD) as monitor:
        for _ in range(1 + rank):
            model(inputs[0])
            monitor.step()
    with pytest.raises(RuntimeError, match="ranks must have monitored the same steps, got"):
        monitor.report()

    optimizer = AdamW(model.parameters())
    with Monitor(model, process_group=dist.group.WORLD) as monitor:
        nn.Sequential(*model)(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        monitor.step()
    updates = monitor.report().parts["updates"].overall  # copies of the same parameters
    assert not optimizer.collect_stats
    torch.save((report, updates), Path(folder, f"{rank}.pt"))


@pytest.fixture(scope="module", params=[2, 3], ids="{}_ranks".format)
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Report]:
    folder = tmp_path_factory.mktemp("reports")
    spawn(run_rank, request.param, str(folder))
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]
    for _, updates in saved[1:]:
        for column, values in saved[0][1].items():
            torch.testing.assert_close(updates[column], values, rtol=0, atol=0, equal_nan=True)
    return [report for report, _ in saved]


def test_ranks_agree(reports: list[Report]) -> None:
    first = reports[0].parts["activations"]
    for report in reports[1:]:
        part = report.parts["activations"]
        for column, values in first.overall.items():
            torch.testing.assert_close(part.overall[column], values, rtol=0, atol=0, equal_nan=True)
        assert part.histogram is not None
        assert first.histogram is not None
        assert part.histogram.equal(first.histogram)


def test_activations_are_those_of_one_process(reports: list[Report]) -> None:
    inputs = [torch.cat(batches(step, len(reports))) for step in range(STEPS)]
    expected, actual = watch(inputs, None).parts["activations"], reports[0].parts["activations"]
    # Units are not known of all ranks together: a share of dead ones is at most that of any rank.
    columns = set(expected.overall) - {"dead", "diversity"}
    for values, others in (
        (actual.overall, expected.overall),
        (actual.by_step, expected.by_step),
    ):
        for column in columns:
            # Moments are exact to 1e-6 for themselves; matrix products of other batches round.
            torch.testing.assert_close(
                values[column], others[column], rtol=1e-5, atol=1e-5, equal_nan=True
            )
    assert actual.histogram is not None
    assert expected.histogram is not None
    # A value at the edge of a bucket may round into the next.
    moved = (actual.histogram - expected.histogram).abs().sum() / expected.histogram.sum()
    assert moved <= 0.01
    assert (actual.overall["dead"] >= expected.overall["dead"] - 1e-12).all()


def test_copies_of_parameters_are_not_added_up(reports: list[Report]) -> None:
    for report in reports:
        weights = report.parts["weights"].overall["l2"]
        norms = torch.stack([p.detach().double().norm() for p in make_model().parameters()])
        # Five full steps read the same weights five times.
        torch.testing.assert_close(weights / 5**0.5, norms, rtol=1e-6, atol=0)
