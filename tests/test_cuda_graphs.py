"""CUDA graphs: replays of clipping, optimizer and modules equal eager steps."""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastremedy
from fastremedy import _native
from fastremedy.ops import dispatch

from .conftest import HAS_GPU
from .reference import assert_same_bits

SHAPES = ((64, 33), (7,), (0,), (4096,))
SCALES = (1.0, 1e-3, torch.inf, 5.0, torch.nan, 0.1)  # of the gradients of a step


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest, gpu: torch.device) -> Iterator[str]:
    with fastremedy.backends.use(request.param):
        yield request.param


def capture(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Run a step, as graphs need it, and capture another; neither may wait for the device."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph


class Training:
    """An optimizer with gradients at fixed addresses and a learning rate on the device."""

    def __init__(self, gpu: torch.device, dtype: torch.dtype, **options: Any) -> None:
        torch.manual_seed(0)
        self.params = [torch.randn(shape, device=gpu).to(dtype) for shape in SHAPES]
        for param in self.params:
            param.grad = torch.randn_like(param)
        self.lr = torch.tensor(1e-2, device=gpu)
        self.optimizer = fastremedy.optim.AdamW(self.params, self.lr, **options)

    def prepare(self, number: int) -> None:
        """Write the gradients and the learning rate of a step."""
        generator = torch.Generator("cuda").manual_seed(number)
        for param in self.params:
            assert param.grad is not None
            param.grad.normal_(generator=generator).mul_(SCALES[number])
        self.lr.fill_(1e-2 / (1 + number))

    def state(self) -> list[Tensor]:
        """Return parameters and state; the steps of an optimizer are tensors, too."""
        return [*self.params, *(t for p in self.params for t in self.optimizer.state[p].values())]


@pytest.mark.needs_cuda
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"max_grad_norm": 1.0, "nonfinite": "skip"}),
        (torch.float32, {"amsgrad": True}),
        (torch.bfloat16, {"low_precision": "stochastic", "nonfinite": "skip"}),
        (torch.bfloat16, {"low_precision": "master", "max_grad_norm": 0.1}),
    ],
)
def test_replayed_steps_equal_eager_ones(
    gpu: torch.device, gpu_backend: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    eager, graphed = (Training(gpu, dtype, **options) for _ in range(2))
    if dtype is torch.bfloat16:
        for training in (eager, graphed):
            training.optimizer.param_groups[0]["noise_seed"] = 1
    eager.optimizer.step()  # the warm-up
    graph = capture(graphed.optimizer.step)
    for number in range(len(SCALES)):
        for training in (eager, graphed):
            training.prepare(number)
        eager.optimizer.step()
        graph.replay()
        for actual, expected in zip(graphed.state(), eager.state(), strict=True):
            assert_same_bits(actual, expected)
    assert graphed.optimizer.num_skipped == eager.optimizer.num_skipped
    assert eager.optimizer.num_skipped == (2 if options.get("nonfinite") == "skip" else 0)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("norm_type", [2.0, torch.inf, 3.0])
def test_replayed_clipping(gpu: torch.device, gpu_backend: str, norm_type: float) -> None:
    training = Training(gpu, torch.float32)
    norms = []

    def clip() -> None:
        norms.append(fastremedy.clip_(training.params, 1.0, norm_type))

    graph = capture(clip)
    for number in range(len(SCALES)):
        training.prepare(number)
        twins = [torch.zeros_like(param) for param in training.params]
        for twin, param in zip(twins, training.params, strict=True):
            assert param.grad is not None
            twin.grad = param.grad.clone()
        graph.replay()
        assert_same_bits(norms[-1], fastremedy.clip_(twins, 1.0, norm_type))
        for twin, param in zip(twins, training.params, strict=True):
            assert param.grad is not None
            assert twin.grad is not None
            assert_same_bits(param.grad, twin.grad)


@pytest.mark.needs_cuda
def test_replayed_scaler(gpu: torch.device, gpu_backend: str) -> None:
    """The scale is halved and the step skipped by the replay whose gradients are infinite."""
    training = Training(gpu, torch.float32, max_grad_norm=1.0)
    scaler = fastremedy.amp.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.ones((), device=gpu))  # makes the scale's tensor

    def step() -> None:
        scaler.step(training.optimizer)
        scaler.update()

    graph = capture(step)
    for number, scale in enumerate(SCALES[:3]):
        before = [param.clone() for param in training.params]
        training.prepare(number)
        graph.replay()
        is_skipped = scale == torch.inf
        assert scaler.get_scale() == (4.0 if is_skipped else 8.0)
        assert torch.equal(training.params[0], before[0]) == is_skipped
    assert training.optimizer.num_skipped == 1


@pytest.mark.needs_cuda
def test_graphed_callables(gpu: torch.device, gpu_backend: str) -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        fastremedy.nn.BatchNormReLU2d(8),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    ).to(gpu)
    eager = copy.deepcopy(module)
    sample = torch.randn(4, 3, 8, 8, device=gpu)
    graphed = torch.cuda.make_graphed_callables(module, (sample,))
    criterion = fastremedy.nn.FocalLoss()
    labels = torch.arange(4, device=gpu)
    for _ in range(3):
        images = torch.randn_like(sample)
        losses = [criterion(run(images), labels) for run in (graphed, eager)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
    for actual, expected in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad)


@pytest.mark.slow
@pytest.mark.needs_cuda
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_graphs_of_the_compiler(gpu: torch.device, gpu_backend: str) -> None:
    """Before it captures them it runs them, and raises if anything stays in their memory pool."""
    torch.compiler.reset()
    eager = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        fastremedy.nn.BatchNormReLU2d(8),
        nn.Flatten(),
        nn.Linear(8 * 6 * 6, 5),
    ).to(gpu)
    compiled = copy.deepcopy(eager)
    criterion, labels = fastremedy.nn.FocalLoss(), torch.arange(4, device=gpu)

    def loss_of(model: nn.Module, images: Tensor) -> Tensor:
        loss: Tensor = criterion(model(images), labels)
        return loss

    graphed = torch.compile(loss_of, mode="reduce-overhead")
    for _ in range(4):  # run, captured, replayed
        images = torch.randn(4, 3, 8, 8, device=gpu)
        torch.compiler.cudagraph_mark_step_begin()
        for run, model in ((loss_of, eager), (graphed, compiled)):
            model.zero_grad()
            run(model, images).backward()
        for actual, expected in zip(compiled.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-4)


def test_memory_for_good_is_of_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools of CUDA graphs are of a thread."""
    threads = []

    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        threads.append(threading.get_ident())
        return torch.empty(*args, dtype=kwargs["dtype"]).zero_()

    stream = types.SimpleNamespace(cuda_stream=1, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(dispatch, "_workspaces", {})
    monkeypatch.setattr(torch, "zeros", zeros)
    first, second = (dispatch.workspace(torch.device("cuda:0"), 8) for _ in range(2))
    assert first is second
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


# --- the native optimizer, emulated without a GPU ---


def launches_of(step: Callable[[], Any]) -> Callable[[], None]:
    """Capture a step of native kernels; return what runs it."""
    if not HAS_GPU:
        run: Callable[[], None] = _native.module_for("cuda").capture(step)
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("is_first", [False, True], ids=["after a step", "first step with grads"])
def test_eager_steps_between_replays(backend: str, device: torch.device, is_first: bool) -> None:
    """Each step has its own gradients and learning rate, whatever the kernels were given last."""
    grads = [torch.full((70000,), value, device=device) for value in (0.5, -2.0, 1.0)]
    rates = (0.1, 0.01, 0.001)
    results = []
    for is_graphed in (False, True):
        param = torch.ones(70000, device=device)
        optimizer = fastremedy.optim.AdamW([param])

        def step(number: int, param: Tensor = param, optimizer: Any = optimizer) -> None:
            param.grad = grads[number]
            optimizer.param_groups[0]["lr"] = rates[number]
            optimizer.step()

        step(0)
        if is_first:  # a table whose kernels have not been given anything
            param.grad = None
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        replay = launches_of(lambda step=step: step(1)) if is_graphed else lambda step=step: step(1)
        for number in (2, 2, 1, 2, 1, 1, 2):
            replay() if number == 1 else step(number)
        results.append(param)
    assert_same_bits(*results)


# --- what is refused ---


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch say that a CUDA graph is being captured."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)


def weight_with_grad() -> Tensor:
    weight = torch.zeros(3)
    weight.grad = torch.full((3,), 2.0)
    return weight


def test_clip_that_raises_is_refused(capturing: None) -> None:
    weight = weight_with_grad()
    with pytest.raises(RuntimeError, match="error_if_nonfinite=True reads the norm, which a CUDA"):
        fastremedy.clip_(weight, 1.0, error_if_nonfinite=True)
    assert weight.grad.tolist() == [2.0] * 3


def test_parameters_on_the_cpu_are_refused(request: pytest.FixtureRequest) -> None:
    weight = weight_with_grad()
    optimizer = fastremedy.optim.AdamW([weight])
    optimizer.step()
    before = weight.clone()
    request.getfixturevalue("capturing")
    with pytest.raises(RuntimeError, match="on the CPU, where a CUDA graph replays nothing"):
        optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["step"] == 1


@pytest.mark.needs_cuda
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
def test_first_step_is_refused(gpu: torch.device, gpu_backend: str) -> None:
    training = Training(gpu, torch.float32)
    before = [param.clone() for param in training.params]
    with (
        pytest.raises(RuntimeError, match="run at least one step with all gradients before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        training.optimizer.step()
    for param, value in zip(training.params, before, strict=True):
        assert torch.equal(param, value)
    training.optimizer.step()  # works again


@pytest.mark.needs_cuda
def test_step_that_raises_is_refused(gpu: torch.device, gpu_backend: str) -> None:
    training = Training(gpu, torch.float32, nonfinite="error")
    training.optimizer.step()
    with (
        pytest.raises(RuntimeError, match="nonfinite='error' reads the norm, which a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        training.optimizer.step()
