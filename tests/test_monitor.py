"""A monitor's statistics of activations, gradients and weights are those of plain hooks."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from fastremedy.stats import Monitor

from .activation_stats_reference import QUANTILE_PRECISION, histogram_of
from .monitor_reference import (
    Values,
    check_part,
    counts_of,
    grads_of,
    make_input,
    make_model,
    outputs_of,
    state_of,
    step_of,
    together,
    train,
    weights_of,
)

INF, NAN = math.inf, math.nan


def test_statistics_are_those_of_the_tensors(backend: str, device: torch.device) -> None:
    model = make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    activations, gradients, weights = [], [], []
    with outputs_of(model) as seen, Monitor(model, full_every=1) as monitor:
        for step in range(3):
            optimizer.zero_grad()
            model(make_input(step, 5 + step, device)).square().sum().backward()
            activations.append(dict(seen))
            gradients.append(grads_of(model))
            weights.append(weights_of(model))
            optimizer.step()
            monitor.step()
            seen.clear()
    report = monitor.report()
    assert report.steps == [0, 1, 2]
    assert report.parts["activations"].names == [str(i) for i in range(6)]
    check_part(report.parts["activations"], activations)
    check_part(report.parts["gradients"], gradients)
    check_part(report.parts["weights"], weights)


def test_far_means_and_what_is_not_finite(backend: str, device: torch.device) -> None:
    class Shift(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input + 1000

    model = nn.Sequential(Shift(), nn.Identity()).to(device)
    planted = {0: (NAN, INF, -INF, 1.0), 1: (0.0, 0.0, NAN, 2.0), 2: (NAN, NAN, INF, INF)}
    steps: list[Values] = []
    with Monitor(model) as monitor:
        for step, values in planted.items():
            input = torch.randn(40, device=device)
            input[: len(values)] = torch.tensor(values)
            if step == 2:
                input = input[:4]  # nothing finite
            steps.append({"0": [model(input).cpu()]})
            monitor.step()
    part = monitor.report().parts["activations"]
    check_part(part, steps)
    assert part.by_step["nan"][:, 0].tolist() == [1, 1, 2]
    assert part.by_step["inf"][:, 0].tolist() == [2, 0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).to(device, dtype)
    with outputs_of(model) as seen, Monitor(model) as monitor:
        model(make_input(device=device).to(dtype)).sum().backward()
        expected = grads_of(model)
        monitor.step()
        activations = dict(seen)
    report = monitor.report()
    check_part(report.parts["activations"], [activations])
    check_part(report.parts["gradients"], [expected])
    check_part(report.parts["weights"], [weights_of(model)])


def test_histograms_are_those_of_full_steps(backend: str, device: torch.device) -> None:
    model = make_model().to(device)
    seen_in_full: list[dict[str, list[Tensor]]] = []
    with outputs_of(model) as seen, Monitor(model, full_every=2) as monitor:
        for step in range(4):
            train(model, None, [step], device=device)
            if step % 2 == 0:
                seen_in_full.append(dict(seen))
            seen.clear()
            monitor.step()
    part = monitor.report().parts["activations"]
    assert part.histogram is not None
    for row, name in enumerate(part.names):
        values = together(x for step in seen_in_full for x in step[name])
        assert torch.equal(part.histogram[row], histogram_of(values))
    gradients, weights = (monitor.report().parts[name] for name in ("gradients", "weights"))
    assert gradients.by_step["count"][:, 0].tolist() == [96, 96, 96, 96]
    assert weights.by_step["count"][:, 0].tolist() == [96, 0, 96, 0]
    assert weights.by_step["l2"][1].isnan().all()
    for part in (gradients, weights):
        assert part.histogram is not None
        assert part.histogram.sum(1).tolist() == [2 * p.numel() for p in model.parameters()]


def test_shares_of_saturated_outputs_are_those_of_each_step() -> None:
    model = make_model()
    limits = {"1": (-15 / 16, 15 / 16), "3": (1 / 16, 15 / 16)}
    expected: dict[str, list[float]] = {"1": [], "3": []}
    with outputs_of(model) as seen, Monitor(model, full_every=1, history=3) as monitor:
        for step in range(5):  # the first two are forgotten
            model(100.0**step * make_input())
            for name, (low, high) in limits.items():
                (x,) = seen[name]
                expected[name].append(((x <= low) | (x >= high)).float().mean().item())
            seen.clear()
            monitor.step()
    part = monitor.report().parts["activations"]
    for name, shares in expected.items():
        row = part.names.index(name)
        actual = part.by_step["saturated"][:, row]
        torch.testing.assert_close(actual, torch.tensor(shares[2:]).double(), rtol=0, atol=1e-6)
        assert part.overall["saturated"][row].item() == pytest.approx(sum(shares[2:]) / 3)
    assert part.by_step["saturated"][:, 0].isnan().all()  # Linear


def test_quantiles_are_within_a_bucket() -> None:
    layer = nn.Linear(6, 64)
    with outputs_of(layer) as seen, Monitor(layer) as monitor:
        layer(make_input(size=50))
        monitor.step()
        values = together(seen[""]).double()
    row = monitor.to_dict()["activations"][""]
    for column, q in {"q01": 0.01, "q50": 0.5, "q99": 0.99}.items():
        if column in row:
            exact = values.quantile(q, interpolation="nearest").item()
            assert row[column] == pytest.approx(exact, rel=QUANTILE_PRECISION + 1e-6)


# --- units ---


def test_units_that_are_dead(backend: str, device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Conv1d(1, 4, 1), nn.ReLU()).to(device)
    with torch.no_grad():
        model[0].bias[:2] = -1e6
        model[2].weight[:] = torch.tensor([1.0, -1.0, -1.0, -1.0])[:, None, None]
        model[2].bias[:] = -1e-3  # below 0 times anything
    with Monitor(model, per_channel=True) as monitor:
        hidden = model[1](model[0](make_input(size=50, device=device)))
        model[3](model[2](hidden[:, None]))
        monitor.step()
    report = monitor.to_dict()["activations"]
    assert report["1"]["dead"] == 2 / 8
    assert report["3"]["dead"] == 3 / 4
    assert report["0"]["dead"] == 0


def test_diversity_tells_symmetric_units(backend: str, device: torch.device) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8)).to(device)
    nn.init.constant_(model[0].weight, 0.1)
    nn.init.constant_(model[0].bias, 0.1)
    with outputs_of(model) as seen, Monitor(model, per_channel=True) as monitor:
        model(make_input(size=50, device=device))
        monitor.step()
        x = seen["2"][0].double()
    report = monitor.to_dict()["activations"]
    assert report["0"]["diversity"] == pytest.approx(0, abs=1e-12)
    assert report["1"]["diversity"] == pytest.approx(0, abs=1e-12)
    expected = x.mean(0).var(correction=0) / x.var(correction=0)
    assert report["2"]["diversity"] == pytest.approx(expected.item(), rel=1e-5)
    assert report["2"]["diversity"] > 0.01


def test_units_are_unknown_unless_asked_for() -> None:
    model = make_model()
    with Monitor(model) as monitor:
        train(model, monitor)
    part = monitor.report().parts["activations"]
    assert part.overall["dead"].isnan().all()
    assert part.overall["diversity"].isnan().all()


def test_memory_of_units_is_bounded() -> None:
    """Sequences of many lengths in the place of units."""

    class Pass(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input * 2

    model = Pass()
    with Monitor(model, per_channel=True, history=2) as monitor:
        sizes = []
        for length in (3, 4, 5, 6, 7, 8):
            model(torch.randn(2, length, 5))
            monitor.step()
            sizes.append(monitor.num_bytes)
    assert len(set(sizes[1:])) == 1


# --- which steps ---


def test_every() -> None:
    model = make_model()
    with Monitor(model, every=3, full_every=2) as monitor:
        before = state_of(model)
        train(model, monitor, range(8))
        assert len(model[0]._forward_hooks) == 0
    report = monitor.report()
    assert report.steps == [0, 3, 6]
    assert report.parts["weights"].by_step["count"][:, 0].tolist() == [96, 0, 96]
    assert len(before[1]["_forward_hooks"]) == 1
    assert counts_of(monitor)["0"] == [80, 80, 80]


def test_history_is_bounded_and_its_memory_told() -> None:
    model = make_model()
    with Monitor(model, history=5, full_every=2) as monitor:
        train(model, monitor, range(60))
        size = monitor.num_bytes
        train(model, monitor, range(60))
        assert monitor.num_bytes == size
    report = monitor.report()
    assert report.steps == [115, 116, 117, 118, 119]
    assert report.num_bytes == size
    kept = sum(
        t.numel() * t.element_size()
        for _, parcel in monitor._history._kept
        for t in parcel.values()
    )
    assert 0 < kept <= size
    expected: list[Values] = []
    with outputs_of(model) as seen:
        for step in range(55, 60):
            train(model, None, [step])
            expected.append(dict(seen))
            seen.clear()
    check_part(report.parts["activations"], expected)


def test_overall_is_all_steps_that_are_kept() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with outputs_of(model) as seen, Monitor(model, history=7) as monitor:
        for step in range(7):
            model(make_input(step, 1 + step) + 100 * step)
            monitor.step()
        check_part(monitor.report().parts["activations"], [{"0": [x]} for x in seen["0"]])


def test_parts_that_are_not_wanted_are_not_there() -> None:
    model = make_model()
    for part in ("activations", "gradients", "weights", "updates"):
        wanted = dict.fromkeys(("activations", "gradients", "weights", "updates"), False)
        with Monitor(model, **{**wanted, part: True}) as monitor:
            train(model, monitor, range(2))
        assert list(monitor.report().parts) == [part]


# --- which modules ---


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({}, ["0", "1.0", "1.1", "2"]),
        ({"include": "1.*"}, ["1.0", "1.1"]),
        ({"include": ["0", "2"]}, ["0", "2"]),
        ({"include": nn.Linear}, ["0", "1.0"]),
        ({"include": nn.Sequential}, ["", "1"]),
        ({"include": "1"}, ["1"]),
        ({"exclude": nn.ReLU}, ["0", "1.0"]),
        ({"exclude": ("1.*", "2")}, ["0"]),
        ({"include": nn.Linear, "exclude": "0"}, ["1.0"]),
    ],
    ids=str,
)
def test_include_and_exclude(options: dict[str, object], layers: list[str]) -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(nn.Linear(6, 4), inner, nn.ReLU(), nn.Dropout(), nn.Flatten())
    with Monitor(model, **options) as monitor:
        train(model, monitor)
    report = monitor.report()
    assert report.parts["activations"].names == layers
    assert all(count[0] > 0 for count in counts_of(monitor).values())
    if options == {"include": "1.*"}:
        assert report.parts["weights"].names == ["1.0.weight", "1.0.bias"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"include": 3}, TypeError, "iterable|include"),
        ({"include": [3]}, TypeError, "include must be names"),
        ({"exclude": [Tensor]}, TypeError, "exclude must be names"),
        ({"include": "no.such.layer"}, ValueError, "nothing of the model is included"),
        ({"exclude": "*"}, ValueError, "nothing of the model is included"),
        ({"every": 0}, ValueError, "every must be a positive integer"),
        ({"full_every": 1.5}, ValueError, "full_every must be a positive integer"),
        ({"history": -1}, ValueError, "history must be a positive integer"),
    ],
    ids=str,
)
def test_errors(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Monitor(make_model(), **options)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got list"):
        Monitor([nn.Linear(1, 1)])  # type: ignore[arg-type]


def test_import_loads_no_sink() -> None:
    code = (
        "import sys, fastremedy; fastremedy.stats.Monitor;"
        "print([m for m in ('matplotlib', 'rich', 'tensorboard') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_step_of_reads_columns() -> None:
    model = make_model()
    with Monitor(model) as monitor:
        train(model, monitor)
    assert step_of(monitor.report().parts["activations"], 0, "5")["negatives"] == 0
