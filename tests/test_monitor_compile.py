"""A monitor in compiled code, and on a GPU: graphs, replays, and nobody who waits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastremedy
from fastremedy.nn import BatchNormReLU1d
from fastremedy.stats import Monitor

from .monitor_reference import (
    check_part,
    counts_of,
    grads_of,
    make_input,
    make_model,
    outputs_of,
    state_of,
    step_of,
    train,
)

# torch's own, while it traces
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


class Counter:
    """Count graphs that a backend of torch.compile is given."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        self.num_graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture
def counter() -> Iterator[Counter]:
    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


# --- torch.compile ---


@pytest.mark.parametrize("whole", [True, False], ids=["model", "submodule"])
def test_compiled_once_and_right(counter: Counter, whole: bool) -> None:
    model = make_model()
    expected = []
    with outputs_of(model) as seen:
        for step in range(10):
            train(model, None, [step])
            expected.append(dict(seen))
            seen.clear()
    with Monitor(model, full_every=4) as monitor:
        if whole:
            run = torch.compile(model, backend=counter, fullgraph=True)
        else:
            inner = torch.compile(model[2:5], backend=counter, fullgraph=True)
            run = nn.Sequential(model[0], model[1], inner, model[5])
        for step in range(10):
            train(run, monitor, [step])
    assert counter.num_graphs == 1
    report = monitor.report()
    check_part(report.parts["activations"], expected)
    assert report.parts["gradients"].by_step["count"][:, 0].tolist() == [96] * 10
    assert report.parts["weights"].by_step["count"][:, 0].tolist() == [96, 0, 0, 0] * 2 + [96, 0]


def test_evaluation_of_compiled_code(counter: Counter) -> None:
    model = make_model()
    with Monitor(model) as monitor:
        run = torch.compile(model, backend=counter, fullgraph=True)
        for training in (True, False, True, False):
            model.train(training)
            run(make_input())
            monitor.step()
    assert counts_of(monitor)["0"] == [80, 0, 80, 0]
    assert counter.num_graphs == 2


@pytest.mark.parametrize("whole", [True, False], ids=["model", "submodule"])
def test_compiled_code_is_disarmed_by_its_flag(counter: Counter, whole: bool) -> None:
    model = make_model()
    expected = []
    with outputs_of(model) as seen:
        for step in (0, 3, 6):
            train(model, None, [step])
            expected.append(dict(seen))
            seen.clear()
    before = state_of(model)
    with Monitor(model, every=3, full_every=2) as monitor:
        inner = torch.compile(model if whole else model[2:], backend=counter, fullgraph=True)
        run = inner if whole else nn.Sequential(model[0], model[1], inner)
        train(run, monitor, range(8))
    assert counter.num_graphs == 1
    part = monitor.report().parts["activations"]
    check_part(part, expected)
    assert part.histogram is not None
    if not whole:  # compiled code takes histograms in all steps that are monitored
        assert part.histogram[0].sum() == 2 * 80
    assert part.histogram[4].sum() == 3 * 20
    assert [state["_forward_hooks"] for state in state_of(model)] == [{}] * len(before)


def test_flag_disarms_code_that_still_measures() -> None:
    """What was compiled without guards of hooks, and what a CUDA graph replays."""
    model = make_model()
    with Monitor(model, every=2) as monitor:
        operator = torch.ops.fastremedy.activation_stats_
        buffer = monitor._recorder.buffer(torch.device("cpu"))
        for _ in range(3):
            statistics = buffer.statistics
            rest = (buffer.armed, statistics.moments, statistics.counts, statistics.histogram)
            operator([torch.ones(3)], [0], False, *rest)
            monitor.step()
    assert counts_of(monitor)["0"] == [3, 3]


@pytest.mark.parametrize("kind", ["ours", "fused"])
def test_compiled_modules_that_measure_themselves(counter: Counter, kind: str) -> None:
    if kind == "ours":
        model = nn.Sequential(nn.Linear(6, 8), BatchNormReLU1d(8), nn.Linear(8, 2))
    else:
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        fastremedy.nn.fuse_(model)
    with Monitor(model) as monitor:
        run = torch.compile(model, backend=counter, fullgraph=True)
        for step in range(4):
            train(run, monitor, [step])
            if step == 2:
                monitor.step()  # without a call
    part = monitor.report().parts["activations"]
    assert part.by_step["count"][:, 1].tolist() == [40, 40, 40, 0, 40]
    for place, step in ((0, 0), (2, 2), (4, 3)):
        hidden = model[0](make_input(step)).detach()
        output = nn.functional.batch_norm(hidden, None, None, training=True).relu().double()
        columns = step_of(part, place, "1")
        assert columns["mean"] == pytest.approx(output.mean().item(), rel=1e-4, abs=1e-6)
        assert columns["std"] == pytest.approx(output.std(correction=0).item(), rel=1e-4)
        assert columns["dead"] == (output == 0).all(0).double().mean().item()
    assert counter.num_graphs <= 2  # the first call finds no statistics on the module


def test_compiled_beside_a_module_that_is_called_twice(counter: Counter) -> None:
    model = nn.Sequential(BatchNormReLU1d(6), BatchNormReLU1d(6))
    run = torch.compile(model[1].forward, backend=counter)  # which calls no hooks
    with Monitor(model) as monitor:
        for step in range(2):
            run(model[0](model[0](make_input(step))))
            monitor.step()
    assert counts_of(monitor) == {"0": [60, 60], "1": [30, 30]}


def test_attached_again(counter: Counter) -> None:
    """torch guards nothing where there were no hooks; its cache has to be emptied."""
    model = make_model()
    run = torch.compile(model, backend=counter)
    monitor = Monitor(model).attach()
    train(run, monitor)
    monitor.detach()
    assert not any(module._forward_hooks for module in model.modules())
    train(run)
    torch.compiler.reset()
    with pytest.warns(UserWarning, match=r"torch\.compiler\.reset\(\)"):
        monitor.attach()
    train(run, monitor)
    monitor.detach()
    counts = counts_of(monitor)
    assert counts
    for name, (first, second) in counts.items():
        assert first == second > 0, name


@pytest.mark.filterwarnings("error::UserWarning:tests")
@pytest.mark.parametrize("whole", [True, False], ids=["model", "submodule"])
@pytest.mark.parametrize("other", [True, False], ids=["second", "first"])
def test_attached_to_compiled_code(counter: Counter, other: bool, whole: bool) -> None:
    """Hooks that came later are not called: the second step says so, and what helps."""
    model = make_model()
    inner = torch.compile(model if whole else model[2:], backend=counter)
    run = inner if whole else nn.Sequential(model[0], model[1], inner)
    if other:
        with Monitor(model) as before:
            train(run, before)
    train(run)
    with Monitor(model) as monitor:
        with pytest.warns(UserWarning, match=r"torch\.compiler\.reset\(\)") as caught:
            train(run, monitor, range(2))
        (warning,) = caught
        message = str(warning.message)
        names = ["0", "2", "4"] if whole else ["2", "4"]
        assert message.startswith(f"{', '.join(names)} got gradients")
        assert warning.filename.endswith("monitor_reference.py")
        train(run, monitor)  # once
        torch.compiler.reset()
        train(run, monitor)
    assert counts_of(monitor)["5"] == [0, 0, 0, 20]


@pytest.mark.filterwarnings("error::UserWarning:tests")
def test_silent_layers_that_are_not_compiled(counter: Counter) -> None:
    """Attention calls no module for its last projection, tied weights are used by another."""
    torch.compile(nn.Linear(2, 2), backend=counter)(torch.ones(1, 2))
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(4, 2),
            "embedding": nn.Linear(4, 4),
            "head": nn.Linear(4, 4, bias=False),
            "unused": nn.Linear(4, 4),
        }
    )
    model["head"].weight = model["embedding"].weight
    with Monitor(model, include=["*"]) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            x = torch.randn(3, 1, 4)
            model["head"](model["attention"](x, x, x)[0]).sum().backward()
            monitor.step()
    with Monitor(model) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):  # what is left of the last one
            monitor.step()


@pytest.mark.slow
def test_inductor() -> None:
    torch._dynamo.reset()
    model = make_model()
    with outputs_of(model) as seen:
        train(model)
    with Monitor(model) as monitor:
        run = torch.compile(model, fullgraph=True)
        train(run, monitor)
    part = monitor.report().parts["activations"]
    for name, (output,) in seen.items():
        columns = step_of(part, 0, name)
        assert columns["count"] == output.numel()
        assert columns["mean"] == pytest.approx(output.mean().item(), rel=1e-4, abs=1e-6)
    torch._dynamo.reset()


def test_checkpoint_in_compiled_code(counter: Counter) -> None:
    model = make_model()

    def run(input: Tensor) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(model[:4], input, use_reentrant=False)
        return model[4:](hidden)

    with Monitor(model) as monitor:
        compiled = torch.compile(run, backend=counter)
        for _ in range(2):
            compiled(make_input()).square().sum().backward()
            monitor.step()
    counts = counts_of(monitor)
    assert counts["5"] == [20, 20]
    for name, size in {"0": 80, "1": 80, "2": 40, "3": 40}.items():
        assert counts[name] == [size, size]


# --- on a GPU ---


@pytest.mark.needs_cuda
def test_nobody_waits(gpu: torch.device) -> None:
    model = make_model(BatchNormReLU1d(4)).to(gpu)
    optimizer = fastremedy.optim.AdamW(model.parameters())
    inputs = [make_input(step, device=gpu) for step in range(4)]

    def step(input: Tensor) -> None:
        optimizer.zero_grad()
        model(input).square().sum().backward()
        fastremedy.clip_(model.parameters(), 1.0)
        optimizer.step()
        monitor.step()

    with Monitor(model, per_channel=True, full_every=2) as monitor:
        step(inputs[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for input in inputs[1:]:
                step(input)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert counts_of(monitor)["0"] == [80] * 4
    assert (monitor.report().parts["updates"].by_step["update_norm"] > 0).all()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("every", [1, 2])
def test_replay_is_like_eager(gpu: torch.device, every: int) -> None:
    model = make_model().to(gpu)
    inputs = [make_input(step, device=gpu) for step in range(4)]
    expected = []
    with outputs_of(model) as seen:
        for input in inputs:
            model.zero_grad(set_to_none=False)
            model(input).square().sum().backward()
            expected.append((dict(seen), grads_of(model)))
            seen.clear()
    static = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(static).square().sum().backward()

    with Monitor(model, every=every, full_every=1) as monitor:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            step()
        for _ in range(every):
            monitor.step()  # of the warm-up
        for input in inputs:
            static.copy_(input)
            graph.replay()
            monitor.step()
    report = monitor.report()
    replayed = [values for i, values in enumerate(expected) if i % every == 0]
    for name in report.parts["activations"].names:
        actual = report.parts["activations"].by_step["count"][1:]
        assert len(actual) == len(replayed), name
    for part, place in (("activations", 0), ("gradients", 1)):
        columns = report.parts[part]
        by_step = {name: values[1:] for name, values in columns.by_step.items()}
        mean = by_step["mean"]
        for i, values in enumerate(replayed):
            for row, name in enumerate(columns.names):
                (tensor,) = values[place][name]
                wanted = tensor.double().mean().item()
                scale = tensor.double().abs().mean().item()
                assert mean[i, row].item() == pytest.approx(wanted, abs=1e-5 * scale + 1e-30)
