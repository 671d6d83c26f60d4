"""A monitor comes and goes, and its model is its owner's: copied, saved, and left as it was."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

import fastremedy
from fastremedy import clip
from fastremedy.nn import BatchNormReLU1d
from fastremedy.stats import Monitor

from .monitor_reference import (
    counts_of,
    make_input,
    make_model,
    outputs_of,
    state_of,
    step_of,
    train,
)


def make_deep() -> nn.Sequential:
    """Return plain modules and one that measures by itself."""
    return make_model(BatchNormReLU1d(4), nn.Sequential(nn.Linear(4, 2), nn.Tanh()))


def through_pickle(model: nn.Module) -> nn.Module:
    loaded: nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def through_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES: list[Callable[[nn.Module], nn.Module]] = [copy.deepcopy, through_pickle, through_save]


@pytest.mark.parametrize("copy_of", COPIES)
def test_copies_are_independent(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    model = make_deep()
    with Monitor(model) as monitor:
        train(model, monitor)
        copied = copy_of(model)
        train(copied)
        monitor.step()
        train(model, monitor, range(2))
    counts = counts_of(monitor)
    assert counts["0"] == [80, 0, 80, 80]
    assert counts["6"] == [20, 0, 20, 20]
    before = state_of(copied)
    with Monitor(copied) as other:
        train(copied, other)
    assert counts_of(other)["0"] == [80]
    assert counts_of(other)["6"] == [20]
    assert [state.keys() for state in state_of(copied)] == [state.keys() for state in before]
    assert len(monitor.report().steps) == 4


@pytest.mark.parametrize("copy_of", COPIES)
def test_copies_measure_nothing(copy_of: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(BatchNormReLU1d(6))
    with Monitor(model):
        copied = copy_of(model)
        copied(make_input())
    assert copied[0].last_stats is None


def test_copy_of_a_monitored_model_trains_alike() -> None:
    model = make_deep()
    with Monitor(model):
        copied = copy.deepcopy(model)
    input = make_input()
    assert torch.equal(copied(input), model(input))


@pytest.mark.parametrize("every", [1, 3])
def test_detach_leaves_the_model_as_it_was(every: int) -> None:
    model = make_deep()
    handle = model[0].register_forward_hook(lambda *_: None)
    before, observers = state_of(model), list(clip.observers)
    monitor = Monitor(model, every=every, per_channel=True).attach()
    for _ in range(4):
        monitor.step()
    monitor.detach()
    assert state_of(model) == before
    assert clip.observers == observers
    handle.remove()


def test_what_was_measured_before_is_no_output() -> None:
    model = BatchNormReLU1d(6)
    model.collect_stats = True
    model(make_input())
    with Monitor(model) as monitor:
        monitor.step()
    assert counts_of(monitor) == {"": [0]}


def test_what_the_owner_sets_meanwhile_stays() -> None:
    model = BatchNormReLU1d(6)
    with Monitor(model, every=2) as monitor:
        model.collect_stats = True
        model(make_input())
        monitor.step()
        assert model.last_stats is not None


def test_outputs_and_gradients_stay_what_they_are() -> None:
    model = make_deep()
    states = []
    for monitored in (False, True):
        copied = copy.deepcopy(model)
        monitor = Monitor(copied, per_channel=True)
        if monitored:
            monitor.attach()
        optimizer = fastremedy.optim.AdamW(copied.parameters(), max_grad_norm=0.1)
        train(copied, monitor if monitored else None, range(3), optimizer)
        monitor.detach()
        states.append(copied.state_dict())
    for plain, watched in zip(*(state.values() for state in states), strict=True):
        assert torch.equal(plain, watched)


def test_attach_twice_and_step_without() -> None:
    monitor = Monitor(make_model())
    with pytest.raises(RuntimeError, match="not attached: call attach"):
        monitor.step()
    monitor.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        monitor.attach()
    with pytest.raises(RuntimeError, match="attached already"), monitor:
        pass
    monitor.detach()
    monitor.detach()
    with pytest.raises(RuntimeError, match="not attached"):
        monitor.step()


def test_attach_again() -> None:
    model = make_deep()
    monitor = Monitor(model, every=2, full_every=1)
    for _ in range(2):
        with monitor:
            train(model, monitor, range(3))
        train(model)
    report = monitor.report()
    assert report.steps == [0, 2, 4]
    assert counts_of(monitor)["0"] == [80, 80, 80]
    assert counts_of(monitor, "weights")["0.weight"] == [96, 96, 96]


def test_what_an_unfinished_step_has_left_is_forgotten() -> None:
    model = make_deep()
    optimizer = fastremedy.optim.AdamW(model.parameters())
    monitor = Monitor(model, full_every=1, per_channel=True)
    for _ in range(2):
        with monitor:
            train(model, None, optimizer=optimizer)
    with monitor:
        monitor.step()
    report = monitor.report()
    assert (report.parts["activations"].by_step["count"] == 0).all()
    assert report.parts["activations"].by_step["dead"].isnan().all()
    assert report.parts["updates"].by_step["update_norm"].isnan().all()
    assert (report.parts["weights"].by_step["count"] > 0).all()


def test_two_monitors() -> None:
    model = make_deep()
    before = state_of(model)
    with Monitor(model, every=2) as first, Monitor(model, exclude=nn.Tanh, full_every=1) as second:
        assert len(model[0]._forward_hooks) == 2
        optimizer = fastremedy.optim.AdamW(model.parameters())
        for step in range(4):
            train(model, None, [step], optimizer)
            first.step()
            second.step()
    assert counts_of(first)["0"] == [80, 80]
    assert counts_of(second)["0"] == [80] * 4
    assert counts_of(first)["6"] == [20, 20]
    assert counts_of(second)["6"] == [20] * 4
    assert "1" not in counts_of(second)
    for monitor in (first, second):
        updates = monitor.report().parts["updates"].by_step["update_norm"]
        assert (updates > 0).all()
    assert not optimizer.collect_stats
    after = state_of(model)
    assert [state.keys() for state in after] == [state.keys() for state in before]
    assert all(not state["_forward_hooks"] for state in after)


def test_monitors_of_parts_of_a_model() -> None:
    model = make_deep()
    with Monitor(model[0]) as monitor:
        train(model, monitor)
    assert counts_of(monitor) == {"": [80]}


def test_nothing_is_kept_alive() -> None:
    model = make_deep()
    output = None
    with Monitor(model, per_channel=True) as monitor:
        output = model(make_input())
        output.sum().backward()
        alive = weakref.ref(output)
        del output
        assert alive() is None
        monitor.step()
    del monitor
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_optimizers_that_are_gone_are_forgotten() -> None:
    model = make_model()
    with Monitor(model) as monitor:
        optimizer = torch.optim.SGD(model.parameters())
        train(model, monitor, optimizer=optimizer)
        gone = weakref.ref(optimizer)
        del optimizer
        gc.collect()
        assert gone() is None


def test_steps_in_inference_mode() -> None:
    model = make_model()
    with Monitor(model, per_channel=True) as monitor:
        for is_inference in (True, False, True, False):
            with torch.inference_mode(is_inference):
                model(make_input())
            monitor.step()
    assert counts_of(monitor)["0"] == [80] * 4


def test_memory_from_inference_mode() -> None:
    model = nn.ReLU()  # with no parameters that tell a device
    with Monitor(model) as monitor:
        with torch.inference_mode():
            model(make_input())
        monitor.step()
    assert counts_of(monitor) == {"": [30]}


def test_backend_may_change() -> None:
    """At the next full step."""
    model = make_model()
    with Monitor(model, full_every=1) as monitor, outputs_of(model) as seen:
        for name in ("torch", "cpu"):
            with fastremedy.backends.use(name):
                train(model, monitor)
        mean = seen["0"][0].double().mean().item()
    part = monitor.report().parts["activations"]
    for step in range(2):
        assert step_of(part, step, "0")["mean"] == pytest.approx(mean, rel=1e-5, abs=1e-7)


def test_report_within_a_step_and_before_any() -> None:
    model = make_model()
    monitor = Monitor(model)
    assert monitor.report().steps == []
    assert monitor.to_dict()["activations"]["0"]["count"] == 0
    with monitor:
        model(make_input())
        assert monitor.report().steps == []
        assert "layer" in monitor.summary()
        monitor.step()
    assert monitor.report().steps == [0]


def reports_under(default: str, folder: Path) -> list[str]:
    torch.manual_seed(0)
    model, inputs = make_deep(), [make_input(step) for step in range(3)]
    optimizer = fastremedy.optim.AdamW(model.parameters())
    path = folder / default / "steps.jsonl"  # in a folder that is not there
    with torch.device(default), Monitor(model, per_channel=True, full_every=2) as monitor:
        for x in inputs:
            model.zero_grad()
            (model(x) + model(x.neg())).square().sum().backward()
            fastremedy.clip_(model.parameters(), 1.0)
            optimizer.step()
            monitor.step()
        monitor.to_jsonl(path)
        monitor.to_tensorboard(MagicMock())
        return [monitor.summary(), str(monitor.to_dict()), path.read_text()]


def test_numbers_stay_on_the_host_whatever_the_default_device(tmp_path: Path) -> None:
    """As with ``torch.set_default_device("cuda")``; "meta" fails where anything is read from it."""
    assert reports_under("meta", tmp_path) == reports_under("cpu", tmp_path)
