"""An optimizer over its life: groups, schedulers, hooks, copies, tensors that are swapped."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import assert_same_bits
from .training import (
    assert_like_torch,
    assert_matches_torch,
    copy_params,
    give_grads,
    make_grads,
    make_params,
    params_of,
    set_grads,
    train,
)


def test_is_a_torch_optimizer() -> None:
    params = make_params([(2,)])
    assert isinstance(fastremedy.optim.AdamW(params), torch.optim.AdamW)
    assert isinstance(fastremedy.optim.Adam(params), torch.optim.Adam)
    assert fastremedy.optim.AdamW(params).defaults == torch.optim.AdamW(params).defaults
    assert fastremedy.optim.Adam(params).defaults == torch.optim.Adam(params).defaults


def test_add_param_group_after_steps(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        for i in range(4):
            if i == 2:
                like = params_of(optimizer)[0]
                late = torch.ones(5, dtype=like.dtype, device=like.device, requires_grad=True)
                optimizer.add_param_group({"params": [late], "lr": 0.2})
            give_grads(params_of(optimizer))
            optimizer.step()

    optimizer = assert_like_torch(make_params([(3,), (2, 2)], device=device), drive)
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [4, 4, 2]


def test_freeze_and_unfreeze(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        params = params_of(optimizer)
        for i in range(6):
            give_grads(params)
            params[1].requires_grad_(i not in (2, 3))
            if not params[1].requires_grad:
                params[1].grad = None
            optimizer.step()

    assert_like_torch(make_params([(3,), (2, 2)], device=device), drive)


def test_hyper_parameters_change_between_steps(backend: str, device: torch.device) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"lr": 0.5},
        {"betas": (0.5, 0.7)},
        {"betas": [0.6, 0.8]},
        {"eps": 0.1, "weight_decay": 0.3},
        {"maximize": True},
        {"lr": 1},  # an integer
        {"weight_decay": 0},
        {"amsgrad": False},
    ]

    def drive(optimizer: torch.optim.Optimizer) -> None:
        for change in changes:
            optimizer.param_groups[0].update(change)
            give_grads(params_of(optimizer))
            optimizer.step()

    assert_like_torch(make_params([(3,), (2, 2)], device=device), drive, amsgrad=True)


def test_betas_list_changed_in_place(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        for _ in range(3):
            give_grads(params_of(optimizer))
            optimizer.step()
            optimizer.param_groups[0]["betas"][0] -= 0.2

    assert_like_torch(make_params([(3,)], device=device), drive)


def test_amsgrad_switched_on(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    grads = make_grads(params, 4)
    train(optimizer, grads[:2])
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, grads[2:])
    state = optimizer.state[params[0]]
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()
    assert (state["max_exp_avg_sq"] > 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_tensor_lr(
    backend: str, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    params = make_params([(3,), (2, 2), ()], device=device)
    expected = copy_params(params)
    lr = torch.full(shape, 0.1, dtype=dtype)
    ours, by_torch = (
        fastremedy.optim.AdamW(params, lr=lr),
        torch.optim.AdamW(expected, lr=lr.item()),
    )
    assert ours.param_groups[0]["lr"] is lr
    for grads in make_grads(params, 4):
        set_grads(params, grads)
        set_grads(expected, grads)
        ours.step()
        by_torch.step()
        lr *= 0.5  # in place: the same object
        by_torch.param_groups[0]["lr"] *= 0.5
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)  # lr is rounded to float32


def test_tensor_betas(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    betas = (torch.tensor(0.8), torch.tensor(0.9))
    optimizer = fastremedy.optim.AdamW(params, betas=betas)
    expected = fastremedy.optim.AdamW(copy_params(params), betas=tuple(b.item() for b in betas))
    grads = make_grads(params, 2)
    train(optimizer, grads)
    train(expected, grads)
    torch.testing.assert_close(params_of(optimizer), params_of(expected), rtol=0, atol=0)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]] = {
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5),
    "Lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(backend: str, device: torch.device, scheduler: str) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        schedule = SCHEDULERS[scheduler](optimizer)
        for _ in range(5):
            give_grads(params_of(optimizer))
            optimizer.step()
            schedule.step()  # warns if it has not seen a step before

    assert_like_torch(make_params([(3,), (2, 2)], device=device), drive, lr=0.1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(backend: str, device: torch.device, set_to_none: bool) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            sum(param.square().sum() for param in params_of(optimizer)).backward()
            optimizer.step()

    assert_like_torch(make_params([(3,), (2, 2)], device=device), drive, lr=0.1)


def test_closure(backend: str, device: torch.device) -> None:
    (param,) = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW([param])

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    before = param.detach().clone()
    assert optimizer.step(closure) == pytest.approx(before.square().sum().item())
    assert (param != before).all()
    assert optimizer.step() is None


@pytest.mark.parametrize("differentiable", [False, True], ids=["", "differentiable"])
def test_hooks_fire_once(backend: str, device: torch.device, differentiable: bool) -> None:
    params = make_params([(3,)], device=device)
    torch.optim.Adam(params), torch.optim.AdamW(params)  # torch patches the steps of its classes
    if differentiable:
        params = [params[0].clone()]  # torch changes no leaf that requires a gradient
    optimizer = fastremedy.optim.AdamW(params, differentiable=differentiable)
    events = []
    optimizer.register_step_pre_hook(lambda *_: events.append("pre"))
    optimizer.register_step_post_hook(lambda *_: events.append("post"))
    train(optimizer, make_grads(params, 2))
    assert events == ["pre", "post", "pre", "post"]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")  # torch 2.11
def test_profiler_shows_the_step(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, make_grads(params, 1))
    assert any(e.key == "Optimizer.step#AdamW.step" for e in profile.key_averages())


def test_execution_trace_shows_the_step(tmp_path: Path) -> None:
    params = make_params([(3,)])
    optimizer = fastremedy.optim.AdamW(params)
    observer = torch.profiler.ExecutionTraceObserver()  # no profiler, which a flag would tell of
    observer.register_callback(str(tmp_path / "trace.json"))
    observer.start()
    train(optimizer, make_grads(params, 1))
    observer.stop()
    observer.unregister_callback()
    nodes = json.loads((tmp_path / "trace.json").read_text())["nodes"]
    assert any(node["name"] == "Optimizer.step#AdamW.step" for node in nodes)


def test_step_bumps_versions(backend: str, device: torch.device) -> None:
    (param,) = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW([param])
    loss = (param * param).sum()
    param.grad = torch.ones(3, device=device)
    version = param._version
    optimizer.step()
    assert param._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("low_precision", [None, "stochastic", "kahan", "master"])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_copies_continue_equally(
    backend: str,
    device: torch.device,
    duplicate: Callable[[Any], Any],
    low_precision: str | None,
) -> None:
    dtype = torch.float32 if low_precision is None else torch.bfloat16
    params = make_params([(3,), (4, 5)], dtype, device)
    optimizer = fastremedy.optim.AdamW(
        params, lr=0.1, max_grad_norm=1.0, nonfinite="skip", low_precision=low_precision
    )
    optimizer.collect_stats = True
    grads = make_grads(params, 4)
    grads[1][0][0] = grads[3][0][0] = math.nan
    train(optimizer, grads[:2])
    twins, twin = duplicate((params, optimizer))
    assert type(twin) is fastremedy.optim.AdamW
    assert (twin.max_grad_norm, twin.collect_stats, twin.num_skipped) == (1.0, True, 1)
    train(optimizer, grads[2:])
    assert twin.num_skipped == 1  # a count of its own
    train(twin, grads[2:])
    assert twin.num_skipped == optimizer.num_skipped == 2
    for param, other in zip(params, twins, strict=True):
        assert param is not other
        assert_same_bits(param.detach(), other.detach())
        for name, value in optimizer.state[param].items():
            assert_same_bits(value, twin.state[other][name])


def test_pickle_that_is_loaded_to_another_device(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW(params, nonfinite="skip")
    train(optimizer, make_grads(params, 1))
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    buffer.seek(0)
    twin = torch.load(buffer, map_location="meta", weights_only=False)
    assert [count.device for count in twin._num_skipped.values()] == [torch.device("meta")]
    assert list(twin._num_skipped) == [torch.device("meta")]


def test_named_parameters(backend: str, device: torch.device) -> None:
    model = torch.nn.Linear(2, 3).to(device)
    optimizer = fastremedy.optim.AdamW(model.named_parameters())
    train(optimizer, make_grads(list(model.parameters()), 2))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_parameter_subclass(backend: str, device: torch.device) -> None:
    class Scale(torch.nn.Parameter):
        pass

    param = Scale(torch.ones(3, device=device))
    assert_matches_torch("AdamW", [param], make_grads([param], 2), lr=0.1)


def test_more_groups_than_a_chunk(backend: str, device: torch.device) -> None:
    params = make_params([(2,)] * 70, device=device)
    groups = [{"lr": 0.001 * (g + 1)} for g in range(35)]
    assert_matches_torch("AdamW", params, make_grads(params, 2), groups=groups, max_grad_norm=1.0)


def test_differentiable_is_torchs(backend: str, device: torch.device) -> None:
    params = [torch.zeros(3, device=device, requires_grad=True)]
    clone = params[0].clone()
    optimizer = fastremedy.optim.AdamW([clone], differentiable=True)
    clone.grad = torch.ones(3, device=device)
    optimizer.step()
    clone.sum().backward()
    assert params[0].grad is not None
    with pytest.raises(ValueError, match="differentiable=True"):
        fastremedy.optim.AdamW(params, differentiable=True, max_grad_norm=1.0)


def test_lazy_parameters(backend: str, device: torch.device) -> None:
    # Part of a model that runs later: it has no shape before.
    def drive(cls: type[torch.optim.Optimizer]) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LazyLinear(2)).to(device)
        optimizer = cls(model.parameters())
        model[0](torch.ones(1, 3, device=device)).sum().backward()
        optimizer.step()
        for _ in range(2):
            model(torch.ones(1, 3, device=device)).sum().backward()
            optimizer.step()
        return [param.detach() for param in model.parameters()]

    torch.testing.assert_close(drive(fastremedy.optim.AdamW), drive(torch.optim.AdamW))


def test_out_of_memory_in_the_first_step(
    backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params([(3,), (2, 2)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    grads = make_grads(params, 1)
    real, calls = torch.zeros_like, []

    def zeros_like(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) in (1, 5):
            raise torch.OutOfMemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            train(optimizer, grads)
    monkeypatch.undo()
    train(optimizer, grads)
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 1]
