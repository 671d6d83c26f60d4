"""What modules that measure by themselves tell a monitor."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastremedy
from fastremedy.nn import BatchNormReLU1d, BatchNormReLU2d, fuse_, unfuse_
from fastremedy.stats import Monitor

from .monitor_reference import counts_of, state_of, step_of


def make_net(*, norm: Callable[[int], nn.Module] = nn.BatchNorm2d, relu: bool = True) -> nn.Module:
    last = [nn.ReLU()] if relu else []
    return nn.Sequential(nn.Conv2d(2, 6, 3), norm(6), *last)


def images(step: int = 0, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 7, 7, generator=generator) * (1 + step) + step


FREE = ("count", "zeros", "negatives", "dead", "diversity")  # from the pass of the module


def expected_of(inputs: list[Tensor], norm: nn.Module) -> dict[str, float]:
    """Return what a BatchNorm with ReLU puts out, by torch in float64; every call has its batch.

    Diversity is that of the inputs.
    """
    xs = [x.detach().cpu().double() for x in inputs]
    assert isinstance(norm.weight, Tensor)
    weight, bias = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
    outputs = [nn.functional.batch_norm(x, None, None, weight, bias, True).relu() for x in xs]
    x, y = (torch.cat([t.movedim(1, 0).flatten(1) for t in ts], 1) for ts in (xs, outputs))
    return {
        "count": y.numel(),
        "mean": y.mean().item(),
        "std": y.std(correction=0).item(),
        "max": y.max().item(),
        "zeros": (y == 0).double().mean().item(),
        "negatives": 0.0,
        "dead": (y == 0).all(1).double().mean().item(),
        "diversity": (x.mean(1).var(correction=0) / x.var(correction=0)).item(),
    }


def check_free(columns: dict[str, float], expected: dict[str, float]) -> None:
    """Check a step in which the output is not read."""
    check(columns, {name: expected[name] for name in FREE})
    for name in ("mean", "std", "skewness", "min", "l1"):
        assert columns[name] != columns[name], name


def check(columns: dict[str, float], expected: dict[str, float]) -> None:
    for column, value in expected.items():
        assert columns[column] == pytest.approx(value, rel=2e-5, abs=1e-6), column


def kill(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight[:] = torch.rand(6) + 0.5
        norm.bias[:] = torch.tensor([0.1, -9.0, 0.3, -9.0, -0.2, 0.0])  # the second and fourth die


@pytest.mark.parametrize("kind", ["ours", "fused"])
def test_free_ride(backend: str, device: torch.device, kind: str) -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False) if kind == "ours" else make_net()
    model.to(device)
    kill(model[1])
    if kind == "fused":
        assert len(fuse_(model).fused) == 1
    expected = []
    with Monitor(model) as monitor:
        for step in range(3):
            hidden = model[0](images(step).to(device))
            expected.append(expected_of([hidden], model[1]))
            model(images(step).to(device)).sum().backward()
            monitor.step()
    report = monitor.report()
    part = report.parts["activations"]
    for step, columns in enumerate(expected):
        (check_free if step else check)(step_of(part, step, "1"), columns)
        assert columns["dead"] == 2 / 6
    row = part.names.index("1")
    if kind == "fused":  # its ReLU is not called
        assert part.by_step["count"][:, part.names.index("2")].tolist() == [0, 0, 0]
    overall = {name: values[row].item() for name, values in part.overall.items()}
    counts = torch.tensor([columns["count"] for columns in expected], dtype=torch.float64)
    zeros = torch.tensor([columns["zeros"] for columns in expected], dtype=torch.float64)
    assert overall["count"] == counts.sum()
    assert overall["zeros"] == pytest.approx(((counts * zeros).sum() / counts.sum()).item())
    check(overall, {name: expected[0][name] for name in ("mean", "std", "max")})
    assert part.histogram is not None
    assert part.histogram[row].sum() == expected[0]["count"]


def test_outputs_are_read_in_full_steps() -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False)
    with Monitor(model, full_every=3) as monitor:
        for step in range(7):
            assert len(model[1]._forward_hooks) == (step % 3 == 0)
            model(images(step))
            monitor.step()
    part = monitor.report().parts["activations"]
    is_known = ~part.by_step["mean"][:, 1].isnan()
    assert is_known.tolist() == [True, False, False, True, False, False, True]
    of_full_steps = [expected_of([model[0](images(step))], model[1]) for step in (0, 3, 6)]
    mean = sum(columns["mean"] for columns in of_full_steps) / 3
    assert part.overall["mean"][1].item() == pytest.approx(mean, rel=1e-5)
    assert part.overall["count"][1] == 7 * of_full_steps[0]["count"]


@pytest.mark.parametrize("fused_first", [True, False])
def test_fused_forward_stays_fused(fused_first: bool) -> None:
    model = make_net()
    monitor = Monitor(model)
    if fused_first:
        fuse_(model)
        monitor.attach()
    else:
        monitor.attach()
        fuse_(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.ReLU, "forward", None)  # not to be called
        model(images()).sum().backward()
    with contextlib.nullcontext() if fused_first else pytest.warns(UserWarning, match="1 report"):
        monitor.step()
    part = monitor.report().parts["activations"]
    expected = expected_of([model[0](images())], model[1])
    columns = step_of(part, 0, "1")
    if not fused_first:  # an ordinary hook, which sees what the fused module returns
        del expected["dead"], expected["diversity"]
    check(columns, expected)
    monitor.detach()


def test_fused_and_unfused_while_monitored() -> None:
    """The warning comes once for each change, and names what reports and what does not."""
    model = nn.Sequential(make_net(), make_net(norm=BatchNormReLU2d, relu=False)[1])
    before = [set(vars(module)) for module in model.modules()]
    with Monitor(model, exclude=nn.Conv2d) as monitor:
        for change in (None, fuse_, None, unfuse_, None):
            if change is not None:
                change(model)
            for is_first in (True, False):
                model(images())
                if change is None or not is_first:
                    monitor.step()
                    continue
                with pytest.warns(UserWarning, match=r"0\.1 report") as caught:
                    monitor.step()
                assert len(caught) == 1
                assert ("0.2 are called no more" in str(caught[0].message)) == (change is fuse_)
                assert caught[0].filename == __file__
    counts = counts_of(monitor)
    assert counts["1"] == [600] * 10
    assert counts["0.1"] == [600] * 6 + [0] + [600] * 3  # whose hook was not there yet
    assert counts["0.2"] == [600] * 2 + [0] * 4 + [600] * 4
    assert [set(vars(module)) for module in model.modules()] == before


@pytest.mark.parametrize("sizes", [(4, 4), (4, 1, 9), (4, 0), (0, 4)])
@pytest.mark.filterwarnings("ignore:var_mean")  # torch's own, of empty batches
def test_several_calls_in_a_step(sizes: tuple[int, ...]) -> None:
    model = BatchNormReLU2d(6)
    kill(model)
    inputs = [torch.randn(size, 6, 3, 3) * (1 + i) + 3 * i for i, size in enumerate(sizes)]
    inputs[0][:, 1] += 10 * torch.arange(float(sizes[0]))[:, None, None]
    with Monitor(model) as monitor:
        for _ in range(2):
            for input in inputs:
                model(input)
            monitor.step()
    part = monitor.report().parts["activations"]
    check(step_of(part, 0, ""), expected_of(inputs, model))
    check_free(step_of(part, 1, ""), expected_of(inputs, model))


def test_values_that_are_not_finite() -> None:
    model = BatchNormReLU1d(6)
    input = torch.randn(5, 6)
    expected = expected_of([input[:, 1:, None]], BatchNormReLU1d(5))
    input[2, 0] = torch.nan
    with Monitor(model) as monitor:
        model(input)
        monitor.step()
    columns = step_of(monitor.report().parts["activations"], 0, "")
    assert columns["nan"] == 5
    assert columns["count"] == 25
    assert columns["mean"] == pytest.approx(expected["mean"], rel=1e-5)
    assert columns["std"] == pytest.approx(expected["std"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:var_mean")  # torch's own, of empty batches
def test_no_value_that_is_finite() -> None:
    model = BatchNormReLU1d(6)
    with Monitor(model) as monitor:
        for size in (5, 5, 0):
            model(torch.full((size, 6), torch.nan))
            monitor.step()
    part = monitor.report().parts["activations"]
    assert part.by_step["nan"].tolist() == [[30], [6], [0]]  # a step between counts units
    assert part.by_step["count"].tolist() == [[0]] * 3


def test_other_activations_have_no_dead_units() -> None:
    model = BatchNormReLU2d(6, activation="silu")
    with Monitor(model) as monitor:
        for _ in range(2):
            output = model(torch.randn(4, 6, 3, 3))
            monitor.step()
            assert (output < 0).any()
    part = monitor.report().parts["activations"]
    assert part.by_step["count"].tolist() == [[4 * 6 * 9]] * 2
    assert part.by_step["dead"].isnan().all()
    for name in ("zeros", "negatives"):
        assert part.by_step[name].isnan().tolist() == [[False], [True]]


def test_steps_without_a_call_have_nothing() -> None:
    model = nn.ModuleList([BatchNormReLU2d(6), BatchNormReLU2d(6)])
    with Monitor(model) as monitor:
        for called in ([0, 1], [0], [], [1]):
            for i in called:
                model[i](torch.randn(4, 6, 3, 3))
            monitor.step()
    counts = monitor.report().parts["activations"].by_step["count"]
    assert (counts > 0).tolist() == [[True, True], [True, False], [False, False], [False, True]]


def test_evaluation_counts_nothing() -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False)
    with Monitor(model) as monitor:
        model.eval()
        model(images())
        model[1].train()  # as for statistics of another data set
        model(images())
        monitor.step()
        model.train()
        monitor.step()
        model(images())
        monitor.step()
    counts = monitor.report().parts["activations"].by_step["count"]
    assert counts.tolist() == [[0, 0], [0, 0], [600, 600]]


def test_norms_frozen_after_the_monitor_is_attached() -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False)
    with Monitor(model) as monitor:
        model[1].eval()  # as many do at the beginning of an epoch
        for _ in range(3):
            model(images())
            monitor.step()
    assert counts_of(monitor)["1"] == [600] * 3


def test_attached_in_evaluation_mode() -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False).eval()
    with Monitor(model) as monitor:
        model.train()
        output = model(images())
        monitor.step()
    columns = step_of(monitor.report().parts["activations"], 0, "1")
    assert columns["count"] == output.numel()
    assert columns["mean"] == pytest.approx(output.mean().item(), rel=1e-5)


def test_recomputation_is_counted_once() -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False)
    for reentrant in (True, False):
        with Monitor(model) as monitor:
            for called in (True, False, True):
                if called:
                    input = images().requires_grad_()
                    torch.utils.checkpoint.checkpoint(
                        model, input, use_reentrant=reentrant
                    ).sum().backward()
                monitor.step()
        counts = monitor.report().parts["activations"].by_step["count"]
        assert counts.tolist() == [[600, 600], [0, 0], [600, 600]]


def test_replicas_in_threads() -> None:
    model = nn.Sequential(*(BatchNormReLU2d(6) for _ in range(8)))
    with Monitor(model) as monitor:
        replicas = [model._replicate_for_data_parallel() for _ in range(4)]
        for replica in replicas:
            for name, child in model.named_children():
                copy = child._replicate_for_data_parallel()
                copy._parameters = dict(child._parameters)
                copy._buffers = {k: v.clone() for k, v in child._buffers.items()}
                replica._modules[name] = copy
        for _ in range(20):
            inputs = [torch.randn(2 + i, 6, 3, 3) for i in range(4)]
            threads = [
                threading.Thread(target=replica, args=(input,))
                for replica, input in zip(replicas, inputs, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            monitor.step()
    counts = monitor.report().parts["activations"].by_step["count"]
    assert (counts == (2 + 3 + 4 + 5) * 54).all()


# --- what modules are left like ---


@pytest.mark.parametrize("collects", [None, True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_detach_leaves_modules_as_they_were(collects: bool | None, fused: bool) -> None:
    model = make_net() if fused else make_net(norm=BatchNormReLU2d, relu=False)
    if fused:
        fuse_(model)
    if collects is not None:
        model[1].collect_stats = collects
    before = state_of(model)
    with Monitor(model, every=2) as monitor:
        assert model[1]._watch
        assert model[1].collect_stats is bool(collects)
        monitor.step()
        assert state_of(model) == before
        monitor.step()
        model(images())
        last = model[1]._last
    if collects:
        assert vars(model[1]).pop("_last") is last  # what the user asked for
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    for old, new in zip(before, state_of(model), strict=True):
        for name in set(buffers) & set(old["_buffers"]):
            assert old["_buffers"][name] is new["_buffers"][name]
        assert old.keys() == new.keys()
        for key in set(old) - {"_buffers", "_parameters", "forward", "_modules"}:
            assert old[key] == new[key]


def test_fused_again_between_steps() -> None:
    model = make_net()
    fuse_(model)
    with Monitor(model) as monitor:
        for _ in range(3):
            model(images())
            monitor.step()
            unfuse_(model)  # to save it, say
            fuse_(model)
    assert counts_of(monitor)["1"] == [600] * 3
    assert not {"_watch", "_last", "collect_stats"} & set(vars(model[1]))


@pytest.mark.parametrize("first_out", [0, 1])
def test_two_monitors(first_out: int) -> None:
    model = make_net(norm=BatchNormReLU2d, relu=False)
    before = set(vars(model[1]))
    monitors = [Monitor(model).attach(), Monitor(model, include="1").attach()]
    for _ in range(2):
        model(images())
        model(images())
        for monitor in monitors:
            monitor.step()
    monitors[first_out].detach()
    stays = monitors[1 - first_out]
    model(images())
    stays.step()
    stays.detach()
    for monitor in monitors:
        part = monitor.report().parts["activations"]
        counts = part.by_step["count"][:, part.names.index("1")]
        assert counts.tolist() == [1200, 1200] + [600] * (monitor is stays)
    assert set(vars(model[1])) == before


def test_unfused_while_monitored() -> None:
    model = make_net()
    fuse_(model)
    monitor = Monitor(model).attach()
    model(images())
    monitor.step()
    unfuse_(model)
    model(images())
    with pytest.warns(UserWarning, match="unfuse_"):
        monitor.step()
    monitor.detach()
    assert type(model[1]) is nn.BatchNorm2d
    assert not {"_watch", "_last", "collect_stats"} & set(vars(model[1]))
    assert fastremedy.nn.fuse_(model).fused
