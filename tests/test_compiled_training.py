"""Whole training steps in torch.compile: the results of eager ones, compiled once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import fastremedy
from fastremedy.stats import Monitor

from .batch_norm_reference import spare

# torch's own, while it traces
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

NUM_CLASSES = 5
Step = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter() -> CompileCounterWithBackend:
    return CompileCounterWithBackend("aot_eager")


class Network(nn.Module):
    """Convolution, normalisation with and without residual, and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = fastremedy.nn.BatchNormReLU2d(4)
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        self.bn2 = fastremedy.nn.BatchNormReLU2d(4, activation="silu")
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.bn1(self.stem(images))
        return self.head(self.bn2(self.conv(x), x).mean((2, 3)))


def batches(device: torch.device, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return images and labels, of another number in every batch."""
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(4 + i, 3, 5, 5, generator=generator).to(device),
            torch.randint(0, NUM_CLASSES, (4 + i,), generator=generator).to(device),
        )
        for i in range(count)
    ]


def run(step: Step, model: nn.Module, device: torch.device) -> list[Tensor]:
    """Return losses, parameters and buffers after some steps, none of which recompiles."""
    seen = []
    for i, batch in enumerate(batches(device)):
        # The first size is compiled for itself, the second for all that follow.
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            seen.append(step(*batch).detach())
    return [*seen, *model.state_dict().values()]


def assert_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Compilers round sums of gradients otherwise, and Adam divides by them."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [fastremedy.nn.FocalLoss, fastremedy.nn.SigmoidFocalLoss])
def test_model_and_loss_are_one_graph_for_all_sizes(
    backend: str, device: torch.device, loss: type[nn.Module]
) -> None:
    spare(backend, loss is fastremedy.nn.SigmoidFocalLoss)
    criterion, model = loss(reduction="mean"), Network().to(device)
    other = copy.deepcopy(model)

    def run_all(model: nn.Module, forward: Step) -> list[Tensor]:
        losses = []
        for i, batch in enumerate(batches(device)):
            with torch._dynamo.config.patch(error_on_recompile=i > 0):
                losses.append(forward(*batch))
        torch.stack(losses).sum().backward()
        return [*(x.detach() for x in losses), *(p.grad for p in model.parameters())]

    compiled = torch.compile(
        lambda x, y: criterion(other(x), y), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    expected = run_all(model, lambda x, y: criterion(model(x), y))
    assert_equal(run_all(other, compiled), expected)


@pytest.mark.parametrize("clip", ["in_step", "apart"])
def test_step_compiles_once(
    backend: str, device: torch.device, clip: str, counter: CompileCounterWithBackend
) -> None:
    spare(backend, clip != "in_step")
    criterion, first = fastremedy.nn.FocalLoss(), Network().to(device)

    def make(model: nn.Module) -> Step:
        optimizer = fastremedy.optim.AdamW(
            model.parameters(), 1e-2, max_grad_norm=1.0 if clip == "in_step" else None
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            loss: Tensor = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if clip == "apart":
                fastremedy.clip_(model.parameters(), 1.0)
            optimizer.step()
            return loss

        def with_schedule(images: Tensor, labels: Tensor) -> Tensor:
            loss = inner(images, labels)
            schedule.step()
            return loss

        inner = step if model is first else torch.compile(step, backend=counter)
        return with_schedule

    other = copy.deepcopy(first)
    expected = run(make(first), first, device)
    assert_equal(run(make(other), other, device), expected)
    # The model for one size and for all, and the clipping; the step adds none.
    assert counter.frame_count == (3 if clip == "apart" else 2)


def test_closure_and_found_inf(counter: CompileCounterWithBackend) -> None:
    """A closure is evaluated; a scaler skips the step with an infinite gradient."""
    first = nn.Linear(3, 2)
    other = copy.deepcopy(first)

    def train(model: nn.Module, wrap: Callable[[Any], Any]) -> list[Tensor]:
        optimizer = fastremedy.optim.AdamW(model.parameters(), max_grad_norm=1.0)
        scaler = fastremedy.amp.GradScaler("cpu", init_scale=8.0)

        def scaled(x: Tensor) -> None:
            optimizer.zero_grad()
            scaler.scale(model(x).sum()).backward()
            scaler.step(optimizer)
            scaler.update()

        def closed(x: Tensor) -> Tensor:
            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                return loss

            loss: Tensor = optimizer.step(closure)
            return loss

        run_scaled, run_closed = wrap(scaled), wrap(closed)
        losses = [run_closed(torch.full((2, 3), value)).detach() for value in (1.0, 2.0, 3.0)]
        for value in (1.0, torch.inf, 2.0):
            run_scaled(torch.full((2, 3), value))
        assert optimizer.num_skipped == 1
        assert scaler.get_scale() == 4.0
        return [*losses, *model.parameters()]

    expected = train(first, lambda step: step)
    assert_equal(train(other, lambda step: torch.compile(step, backend=counter)), expected)


@pytest.mark.slow
def test_step_with_the_default_compiler() -> None:
    first = Network()
    other = copy.deepcopy(first)

    def make(model: nn.Module) -> Step:
        optimizer = fastremedy.optim.AdamW(model.parameters(), 1e-2, max_grad_norm=1.0)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            loss = fastremedy.functional.focal_loss(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return step

    expected = run(make(first), first, torch.device("cpu"))
    assert_equal(run(torch.compile(make(other)), other, torch.device("cpu")), expected)


# --- clipping ---


def weights_with_grads(device: torch.device) -> list[Tensor]:
    weights = [torch.zeros(shape, device=device) for shape in ((3, 4), (0,), (5,), (2,))]
    for i, weight in enumerate(weights):
        weight.requires_grad_()
        weight.grad = None if i == 3 else torch.full_like(weight, i + 1.0)
    return weights


@pytest.mark.parametrize("norm_type", [2.0, torch.inf, 3.0])
def test_clip_is_one_graph(
    backend: str, device: torch.device, norm_type: float, counter: CompileCounterWithBackend
) -> None:
    @torch.compile(fullgraph=True, backend=counter)
    def compiled(weights: list[Tensor]) -> tuple[Tensor, Tensor]:
        norm = fastremedy.grad_norm(iter(weights), norm_type)
        return norm, fastremedy.clip_(iter(weights), 1.0, norm_type)

    for scale in (1.0, 0.01):  # clips, and leaves alone
        expected, actual = weights_with_grads(device), weights_with_grads(device)
        for weight in (*expected, *actual):
            if weight.grad is not None:
                weight.grad *= scale
        grads = [weight.grad for weight in actual]
        norm = fastremedy.clip_(expected, 1.0, norm_type)
        for other in compiled(actual):
            torch.testing.assert_close(other, norm, rtol=0, atol=0)
        for weight, grad, twin in zip(actual, grads, expected, strict=True):
            assert weight.grad is grad
            torch.testing.assert_close(weight.grad, twin.grad, rtol=0, atol=0)
    assert counter.frame_count == 1


def test_clip_without_gradients(counter: CompileCounterWithBackend) -> None:
    weights = [torch.zeros(2, requires_grad=True)]
    norm = torch.compile(fastremedy.clip_, fullgraph=True, backend=counter)(weights, 1.0)
    torch.testing.assert_close(norm, torch.tensor(0.0), rtol=0, atol=0)


def test_clip_raises_and_changes_nothing(counter: CompileCounterWithBackend) -> None:
    weights = weights_with_grads(torch.device("cpu"))
    grad = weights[0].grad
    assert grad is not None
    grad[0, 0] = torch.inf
    compiled = torch.compile(fastremedy.clip_, backend=counter)
    with pytest.raises(RuntimeError, match="is non-finite"):
        compiled(weights, 1.0, error_if_nonfinite=True)
    assert grad[1, 1] == 1.0


def test_monitor_sees_what_compiled_code_clips(counter: CompileCounterWithBackend) -> None:
    model = nn.Linear(3, 2)
    compiled = torch.compile(fastremedy.clip_, backend=counter)
    with Monitor(model, gradients=True, activations=False, weights=False) as monitor:
        model(torch.ones(4, 3)).sum().backward()
        norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
        compiled(model.parameters(), 0.1)
        monitor.step()
    part = monitor.report().parts["gradients"]
    assert part.overall["l2"].tolist() == pytest.approx(norms, rel=1e-6)
