"""State dicts: torch's own key for key, loadable both ways, dtypes kept."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import fastremedy

from .reference import assert_same_bits
from .training import copy_params, make_grads, make_params, train

# Ways to construct torch's AdamW; capturable needs a GPU to step.
FLAVOURS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for_loop": {"foreach": False},
}
NAMES = ["AdamW", "Adam"]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("named", [False, True], ids=["", "named"])
@pytest.mark.parametrize("name", NAMES)
def test_keys_are_torchs(
    backend: str, device: torch.device, name: str, named: bool, amsgrad: bool
) -> None:
    dicts = []
    for module in (fastremedy.optim, torch.optim):
        torch.manual_seed(0)
        params = make_params([(3,), (2, 2), (4,)], device=device)
        of_optimizer = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
        optimizer = getattr(module, name)(of_optimizer, amsgrad=amsgrad)
        grads = make_grads(params, 1)
        grads[0][1] = None
        train(optimizer, grads)
        dicts.append(optimizer.state_dict())
    ours, by_torch = dicts
    assert ours.keys() == by_torch.keys()
    assert [list(g.items()) for g in ours["param_groups"]] == [
        list(g.items()) for g in by_torch["param_groups"]
    ]
    assert ours["state"].keys() == by_torch["state"].keys() == {0, 2}
    for i, state in by_torch["state"].items():
        assert list(ours["state"][i]) == list(state)
        for key, value in state.items():
            assert ours["state"][i][key].shape == value.shape
            assert ours["state"][i][key].dtype == value.dtype


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["from_torch", "to_torch"])
def test_exchange_with_torch(
    backend: str, device: torch.device, direction: str, name: str, flavour: str
) -> None:
    torch_cls, our_cls = getattr(torch.optim, name), getattr(fastremedy.optim, name)
    params = make_params([(3,), (2, 2)], device=device)
    grads = make_grads(params, 5)
    grads[1][1] = None  # steps differ between the parameters
    expected = copy_params(params)
    uninterrupted = torch_cls(expected, lr=0.1, amsgrad=True)
    train(uninterrupted, grads)
    ours = our_cls(params, lr=0.1, amsgrad=True)
    by_torch = torch_cls(params, lr=0.5, amsgrad=True, **FLAVOURS[flavour])
    if direction == "from_torch":
        by_torch.param_groups[0]["lr"] = 0.1
        ours.param_groups[0]["lr"] = 0.5
        first, second = by_torch, ours
    else:
        first, second = ours, by_torch
    train(first, grads[:3])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["lr"] == 0.1
    train(second, grads[3:])
    torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-6)  # five updates of 0.1
    steps = [second.state[param]["step"].item() for param in params]
    assert steps == [5, 4]


@pytest.mark.parametrize("backend_after", ["torch", "cpu"])
def test_exchange_between_backends(backend: str, backend_after: str) -> None:
    if backend == backend_after or (torch.cuda.is_available() and backend in ("cuda", "triton")):
        pytest.skip("the same backend or another device")
    params = make_params([(3,), (2, 2)])
    grads = make_grads(params, 4)
    expected = copy_params(params)
    train(fastremedy.optim.AdamW(expected, lr=0.1), grads)
    first = fastremedy.optim.AdamW(params, lr=0.1)
    train(first, grads[:2])
    with fastremedy.backends.use(backend_after):
        second = fastremedy.optim.AdamW(params)
        second.load_state_dict(first.state_dict())
        train(second, grads[2:])
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("low_precision", [None, "stochastic", "kahan", "master"])
@pytest.mark.parametrize("weights_only", [True, False])
def test_save_and_load(
    backend: str, device: torch.device, weights_only: bool, low_precision: str | None
) -> None:
    params = make_params([(3,), (4, 5)], torch.bfloat16, device)
    options: dict[str, Any] = {
        "lr": 0.01, "amsgrad": True, "low_precision": low_precision, "max_grad_norm": 1.0,
    }  # fmt: skip
    optimizer = fastremedy.optim.AdamW(params, **options)
    grads = make_grads(params, 4)
    train(optimizer, grads[:2])
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=weights_only)
    resumed_params = [param.detach().requires_grad_() for param in saved["params"]]
    resumed = fastremedy.optim.AdamW(resumed_params, **options)
    resumed.load_state_dict(saved["optimizer"])
    train(optimizer, grads[2:])
    train(resumed, grads[2:])
    for param, other in zip(params, resumed_params, strict=True):
        assert_same_bits(param.detach(), other.detach())
        assert optimizer.state[param].keys() == resumed.state[other].keys()
        for key, value in optimizer.state[param].items():
            assert_same_bits(value, resumed.state[other][key])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.float16])
def test_loading_keeps_state_dtypes(
    backend: str, device: torch.device, state_dtype: torch.dtype
) -> None:
    # torch would cast all of it to bfloat16.
    params = make_params([(3,)], torch.bfloat16, device)
    optimizer = fastremedy.optim.AdamW(params, state_dtype=state_dtype)
    train(optimizer, make_grads(params, 1))
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = fastremedy.optim.AdamW(params, state_dtype=state_dtype)
    resumed.load_state_dict(saved)
    for key in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(resumed.state[params[0]][key], saved["state"][0][key])
    train(resumed, make_grads(params, 1))
    assert resumed.state[params[0]]["exp_avg"].dtype == state_dtype


def test_loading_keeps_the_flags_of_the_optimizer(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    by_torch = torch.optim.AdamW(params, lr=0.3, fused=True)
    train(by_torch, make_grads(params, 1))
    optimizer = fastremedy.optim.AdamW(params, max_grad_norm=2.0, nonfinite="skip")
    optimizer.load_state_dict(by_torch.state_dict())
    group = optimizer.param_groups[0]
    flags = {k: group[k] for k in ("foreach", "fused", "capturable", "differentiable", "lr")}
    assert flags == {
        "foreach": None, "fused": None, "capturable": False, "differentiable": False, "lr": 0.3,
    }  # fmt: skip
    assert (optimizer.max_grad_norm, optimizer.nonfinite) == (2.0, "skip")


def test_loading_in_the_middle_of_a_run(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (2, 2)], device=device)
    start = [param.detach().clone() for param in params]
    optimizer = fastremedy.optim.AdamW(params, lr=0.1)
    grads = make_grads(params, 4)
    train(optimizer, grads[:1])
    saved = copy.deepcopy(optimizer.state_dict())
    saved_params = [param.detach().clone() for param in params]
    train(optimizer, grads[1:])
    results = [param.detach().clone() for param in params]
    for param, value in zip(params, saved_params, strict=True):
        param.data.copy_(value)
    optimizer.load_state_dict(saved)
    train(optimizer, grads[1:])
    for param, result, before in zip(params, results, start, strict=True):
        assert_same_bits(param.detach(), result)
        assert (param != before).any()


def test_loading_before_the_first_step(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    optimizer.load_state_dict(fastremedy.optim.AdamW(params).state_dict())
    train(optimizer, make_grads(params, 1))
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.float64)])
def test_steps_of_other_kinds(backend: str, device: torch.device, step: Any) -> None:
    # Python numbers come from torch before 1.12, integer tensors from other libraries.
    params = make_params([(3,), (2,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    train(optimizer, make_grads(params, 1))
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = step
    optimizer.load_state_dict(saved)
    train(optimizer, make_grads(params, 1))
    assert [optimizer.state[param]["step"].item() for param in params] == [4, 4]


def test_state_without_residual_gets_one(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], torch.bfloat16, device)
    by_torch = torch.optim.AdamW(params)
    train(by_torch, make_grads(params, 1))
    for low_precision, key in (("kahan", "compensation"), ("master", "master_param")):
        optimizer = fastremedy.optim.AdamW(params, low_precision=low_precision)
        optimizer.load_state_dict(copy.deepcopy(by_torch.state_dict()))
        train(optimizer, make_grads(params, 1))
        assert key in optimizer.state[params[0]]


def test_state_of_another_optimizers_extras_is_kept(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    train(optimizer, make_grads(params, 1))
    optimizer.state[params[0]]["note"] = torch.ones(2)
    train(optimizer, make_grads(params, 1))
    assert optimizer.state_dict()["state"][0]["note"].tolist() == [1.0, 1.0]


def test_load_hooks_have_the_last_word(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], torch.bfloat16, device)
    optimizer = fastremedy.optim.AdamW(params, state_dtype=torch.float32)
    train(optimizer, make_grads(params, 1))
    saved = copy.deepcopy(optimizer.state_dict())

    def double(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        doubled = copy.deepcopy(state_dict)
        doubled["state"][0]["exp_avg"] *= 2
        return doubled

    optimizer.register_load_state_dict_pre_hook(double)
    optimizer.load_state_dict(saved)
    assert_same_bits(optimizer.state[params[0]]["exp_avg"], saved["state"][0]["exp_avg"] * 2)


def test_wrong_state_dicts_as_in_torch(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (2,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(
            torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}]).state_dict()
        )
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(torch.optim.AdamW(params[:1]).state_dict())


def test_layout_of_loaded_state_is_adapted(backend: str, device: torch.device) -> None:
    param = torch.randn(2, 3, 4, 4, device=device).requires_grad_()
    optimizer = fastremedy.optim.AdamW([param], lr=0.1)
    train(optimizer, make_grads([param], 1))
    other = param.detach().to(memory_format=torch.channels_last).requires_grad_()
    twin = fastremedy.optim.AdamW([other], lr=0.1)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    grads = make_grads([param], 2)
    train(optimizer, grads)
    train(twin, grads)
    torch.testing.assert_close(param, other, rtol=0, atol=0)
