"""What a monitor knows of the optimizers' steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastremedy
from fastremedy.stats import Monitor
from fastremedy.stats.report import COLUMNS

from .monitor_reference import Values, check_part, grads_of, make_input, make_model, step_of, train

EXACT = ("moved", "stuck")


def backward(model: nn.Module, step: int, device: torch.device | str = "cpu") -> None:
    model.zero_grad()
    model(make_input(step, device=device)).square().sum().backward()


def updates_of(
    model: nn.Module, grads: dict[str, Tensor], before: dict[str, Tensor]
) -> dict[str, dict[str, float]]:
    """Return the columns of updates in float64."""
    updates = {}
    for name, param in model.named_parameters():
        values = (param.detach(), before[name], grads[name])
        new, old, grad = (tensor.double().cpu() for tensor in values)
        moved = new != old
        columns = {
            "grad_norm": grad.norm(),
            "weight_norm": old.norm(),
            "update_norm": (new - old).norm(),
            "ratio": (new - old).norm() / old.norm(),
            "moved": moved.double().mean(),
            "stuck": (~moved & (grad != 0)).double().mean(),
        }
        updates[name] = {column: value.item() for column, value in columns.items()}
    return updates


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def first_grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: grads[0] for name, grads in grads_of(model).items()}


def check_updates(
    monitor: Monitor, step: int, expected: dict[str, dict[str, float]], rel: float = 1e-6
) -> None:
    part = monitor.report().parts["updates"]
    assert part.names == list(expected)
    for name, columns in expected.items():
        actual = step_of(part, step, name)
        for column, value in columns.items():
            near = pytest.approx(value, rel=0 if column in EXACT else rel, nan_ok=True)
            assert actual[column] == near, (name, column)


@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_adamw(backend: str, device: torch.device, max_grad_norm: float | None) -> None:
    model = make_model().to(device)
    params = model.parameters()
    optimizer = fastremedy.optim.AdamW(params, lr=0.01, max_grad_norm=max_grad_norm)
    expected = []
    with Monitor(model, full_every=4) as monitor:
        for step in range(3):
            backward(model, step, device)
            grads, before = first_grads(model), copies(model)
            optimizer.step()
            monitor.step()
            expected.append(updates_of(model, grads, before))
    for step, updates in enumerate(expected):
        check_updates(monitor, step, updates, rel=2e-6)
    overall = monitor.report().parts["updates"].overall
    ratios = sorted(updates["0.weight"]["ratio"] for updates in expected)
    assert overall["ratio"][0].item() == pytest.approx(ratios[1], rel=1e-5)
    assert not optimizer.collect_stats


@pytest.mark.parametrize("wants", [True, False])
def test_norms_before_clipping_win(backend: str, device: torch.device, wants: bool) -> None:
    model = make_model().to(device)
    optimizer = fastremedy.optim.AdamW(model.parameters(), lr=0.01)
    with Monitor(model, full_every=1, updates=wants) as monitor:
        backward(model, 0, device)
        grads, before = first_grads(model), copies(model)
        fastremedy.clip_(model.parameters(), 1e-3)
        optimizer.step()
        monitor.step()
    check_part(monitor.report().parts["gradients"], [{n: [g] for n, g in grads.items()}])
    if wants:
        expected = updates_of(model, grads, before)
        for name, param in model.named_parameters():  # elements that clipping made 0 are not stuck
            if param.grad is not None:
                unmoved = param.detach() == before[name]
                stuck = (unmoved & (param.grad != 0)).double().mean().item()
                expected[name]["stuck"] = stuck
        check_updates(monitor, 0, expected)


class FreeingAdamW(fastremedy.optim.AdamW):
    """Leaves no gradients."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        result = super().step(closure)
        self.zero_grad()
        return result


@pytest.mark.parametrize("full_every", [1, 2])
@pytest.mark.parametrize("freed_by", [None, "a hook", "a hook of all", "the class"])
def test_gradients_and_weights_around_a_step(freed_by: str | None, full_every: int) -> None:
    """Gradients may be gone after a step, and weights are those before it."""
    model = make_model()
    kind = FreeingAdamW if freed_by == "the class" else fastremedy.optim.AdamW
    optimizer = kind(model.parameters(), lr=0.01)
    grads, weights = [], []
    with contextlib.ExitStack() as stack:
        if freed_by == "a hook":
            optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
        elif freed_by == "a hook of all":
            handle = register_optimizer_step_post_hook(lambda o, *_: o.zero_grad())
            stack.callback(handle.remove)
        monitor = stack.enter_context(Monitor(model, full_every=full_every))
        for step in range(2):
            backward(model, step)
            grads.append(grads_of(model))
            is_full = step % full_every == 0
            weights.append({n: [w] * is_full for n, w in copies(model).items()})
            optimizer.step()
            monitor.step()
    report = monitor.report()
    check_part(report.parts["gradients"], grads)
    check_part(report.parts["weights"], weights)


def test_clipping_of_some_and_of_strangers() -> None:
    model, stranger = make_model(), nn.Linear(3, 3)
    with Monitor(model, full_every=1) as monitor:
        backward(model, 0)
        grads = first_grads(model)
        stranger(torch.ones(3)).sum().backward()
        fastremedy.clip_(stranger.parameters(), 1e-3)
        fastremedy.clip_([*model[0].parameters(), *stranger.parameters()], 1e-3)
        monitor.step()
    report = monitor.report()
    check_part(report.parts["gradients"], [{n: [g] for n, g in grads.items()}])
    updates = report.parts["updates"]
    for name, norm in zip(updates.names, updates.by_step["grad_norm"][0], strict=True):
        if name.startswith("0."):
            assert norm.item() == pytest.approx(grads[name].double().norm().item(), rel=1e-6)
        else:
            assert norm.isnan()


def test_loss_scale_is_taken_out(backend: str, device: torch.device) -> None:
    model = make_model().to(device)
    optimizer = fastremedy.optim.AdamW(model.parameters())
    backward(model, 0, device)
    grads = first_grads(model)
    with Monitor(model) as monitor:
        for param in model.parameters():
            if param.grad is not None:
                param.grad *= 1024
        before = copies(model)
        optimizer.grad_scale = torch.tensor(1024.0, device=device)
        optimizer.found_inf = torch.tensor(0.0, device=device)
        optimizer.step()
        monitor.step()
        check_updates(monitor, 0, updates_of(model, grads, before))
        optimizer.found_inf = torch.tensor(1.0, device=device)
        optimizer.step()
        monitor.step()
    report = monitor.report()
    check_part(report.parts["gradients"], [{n: [g] for n, g in grads.items()}] * 2)
    assert all(column[1].isnan().all() for column in report.parts["updates"].by_step.values())


def test_scaler() -> None:
    model = make_model()
    optimizer = fastremedy.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    expected: list[Values] = []
    with Monitor(model, full_every=1) as monitor:
        for step in range(2):
            backward(model, step)
            expected.append(grads_of(model))
            model.zero_grad()
            scaler.scale(model(make_input(step)).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
    check_part(monitor.report().parts["gradients"], expected)


def test_weights_that_are_too_coarse_to_move(backend: str, device: torch.device) -> None:
    model = nn.Linear(6, 4, bias=False).to(device, torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    optimizer = fastremedy.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
    with Monitor(model) as monitor:
        model(torch.ones(2, 6, device=device, dtype=torch.bfloat16)).sum().backward()
        assert model.weight.grad is not None
        model.weight.grad[0] = 0
        optimizer.step()
        monitor.step()
    columns = step_of(monitor.report().parts["updates"], 0, "weight")
    assert columns["moved"] == 0
    assert columns["stuck"] == 3 / 4
    assert columns["update_norm"] == 0


def test_other_optimizers_leave_it_unknown() -> None:
    model = make_model()
    with Monitor(model, full_every=1) as monitor:
        train(model, monitor, range(2), torch.optim.SGD(model.parameters(), lr=0.1))
    report = monitor.report()
    assert set(report.parts["updates"].by_step) == set(COLUMNS["updates"])
    for column in report.parts["updates"].by_step.values():
        assert column.isnan().all()
    assert report.parts["gradients"].by_step["count"][:, 0].tolist() == [96, 96]


def test_parameters_without_gradient_are_unknown() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    optimizer = fastremedy.optim.AdamW(model.parameters())
    with Monitor(model, full_every=1) as monitor:
        train(model, monitor, range(2), optimizer)
        model.zero_grad()
        optimizer.step()
        monitor.step()
    report = monitor.report()
    norms = report.parts["updates"].by_step["update_norm"]
    assert norms[:, :2].isnan().all()
    assert (norms[:2, 2:] > 0).all()
    assert norms[2].isnan().all()
    assert report.parts["gradients"].by_step["count"][:, 0].tolist() == [0, 0, 0]
    assert report.parts["weights"].by_step["count"][:, 0].tolist() == [96, 96, 96]


def with_ours(params: Any) -> torch.optim.Optimizer:
    return fastremedy.optim.AdamW(params, lr=0.01)


def with_torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01)


@pytest.mark.parametrize("make", [with_ours, with_torchs])
def test_two_optimizers(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Each has its gradients when it steps, as in adversarial training."""
    model = make_model()
    optimizers = [make(model[0].parameters()), make(model[2:].parameters())]
    expected: Values = {}
    updates: dict[str, dict[str, float]] = {}
    with Monitor(model) as monitor:
        for i, optimizer in enumerate(optimizers):
            backward(model, i)
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            names = [name for name, p in model.named_parameters() if id(p) in mine]
            grads, before = first_grads(model), copies(model)
            expected |= {name: [grads[name]] for name in names}
            optimizer.step()
            after = updates_of(model, grads, before)
            updates |= {name: after[name] for name in names}
        monitor.step()
    check_part(monitor.report().parts["gradients"], [expected])
    if make is with_ours:
        check_updates(monitor, 0, updates)


def test_scaler_with_two_optimizers() -> None:
    """Gradients of the second are still scaled when the first steps."""
    model = make_model()
    optimizers = [with_torchs(model[0].parameters()), with_torchs(model[2].parameters())]
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    backward(model, 0)
    expected = grads_of(model)
    model.zero_grad()
    with Monitor(model, exclude="4*") as monitor:
        scaler.scale(model(make_input(0)).square().sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        monitor.step()
    check_part(monitor.report().parts["gradients"], [expected])


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("make", [with_ours, with_torchs])
def test_closure(make: Callable[[Any], torch.optim.Optimizer], as_keyword: bool) -> None:
    model = make_model()
    optimizer = make(model.parameters())
    grads: dict[str, Tensor] = {}

    def closure() -> float:
        backward(model, 0)
        grads.update(first_grads(model))
        return 1.0

    with Monitor(model) as monitor:
        before = copies(model)
        optimizer.step(**{"closure": closure}) if as_keyword else optimizer.step(closure)
        monitor.step()
    check_part(monitor.report().parts["gradients"], [{n: [g] for n, g in grads.items()}])
    if make is with_ours:
        check_updates(monitor, 0, updates_of(model, grads, before))


def test_stats_of_the_user_go_on() -> None:
    model = make_model()
    optimizer = fastremedy.optim.AdamW(model.parameters())
    optimizer.collect_stats = True
    with Monitor(model) as monitor:
        train(model, monitor, range(2), optimizer)
    assert optimizer.collect_stats
    assert optimizer.last_stats is not None
    norms = monitor.report().parts["updates"].by_step["update_norm"][1]
    assert torch.equal(optimizer.last_stats.update_norm, norms)


def test_step_that_fails_leaves_the_optimizer_as_it_was() -> None:
    model = make_model()
    optimizer = fastremedy.optim.AdamW(model.parameters(), nonfinite="error")
    with Monitor(model) as monitor:
        for _ in range(2):
            backward(model, 0)
            assert model[0].weight.grad is not None
            model[0].weight.grad[0, 0] = math.nan
            with pytest.raises(RuntimeError, match="finite"):
                optimizer.step()
        monitor.step()
    assert not optimizer.collect_stats


def test_only_the_last_rows_of_an_optimizer_are_kept() -> None:
    model = make_model()
    optimizer = fastremedy.optim.AdamW(model.parameters())
    with Monitor(model) as monitor:
        for step in range(4):
            train(model, monitor, [step], optimizer)
            optimizer.load_state_dict(optimizer.state_dict())  # its tables are built anew
            assert len(monitor._recorder._places) == 1
