"""AdamW and Adam compute what torch's do, with clipping inside the step."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

import fastremedy

from .reference import (
    FLOATS,
    assert_close_to_reference,
    assert_same_bits,
    clip_reference,
    clip_with_torch,
    few_examples,
)
from .training import assert_matches_torch, make_grads, make_params, params_of, set_grads, train

SHAPES = ((7, 5), (), (0,), (1,), (129,), (0, 3))

HYPERS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "no_decay": {"weight_decay": 0.0},
    "strong_decay": {"weight_decay": 0.5, "lr": 0.1},
    "beta1_0": {"betas": (0.0, 0.99)},
    "beta2_0": {"betas": (0.9, 0.0)},
    "betas_0": {"betas": (0.0, 0.0)},
    "betas_below_half": {"betas": (0.4, 0.3)},
    "large_eps": {"eps": 10.0},
    "eps_0": {"eps": 0.0},
    "lr_0": {"lr": 0.0, "weight_decay": 0.5},
    "everything": {
        "lr": 0.05,
        "betas": (0.8, 0.95),
        "eps": 1e-3,
        "weight_decay": 0.2,
        "amsgrad": True,
        "maximize": True,
    },
}


@pytest.mark.parametrize("hyper", HYPERS)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_hyper_parameters(backend: str, device: torch.device, name: str, hyper: str) -> None:
    params = make_params(SHAPES, device=device)
    options = {"lr": 0.01, **HYPERS[hyper]}
    assert_matches_torch(name, params, make_grads(params, 4), **options)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(
    backend: str, device: torch.device, dtype: torch.dtype, name: str, amsgrad: bool
) -> None:
    params = make_params(SHAPES, dtype, device)
    assert_matches_torch(
        name, params, make_grads(params, 4), lr=0.01, eps=1e-3, weight_decay=0.1, amsgrad=amsgrad
    )


def test_mixed_dtypes_and_clipping(backend: str, device: torch.device) -> None:
    params = [p for dtype in FLOATS for p in make_params(((9,), (3, 4)), dtype, device)]
    assert_matches_torch(
        "AdamW", params, make_grads(params, 3), max_grad_norm=1.0, lr=0.01, eps=1e-3
    )


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 2.5, math.inf])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.1, 3.0, 1e6, math.inf])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_clipping_inside_the_step(
    backend: str, device: torch.device, name: str, max_grad_norm: float, norm_type: float
) -> None:
    params = make_params(SHAPES, device=device)
    grads = make_grads(params, 3)
    optimizer = assert_matches_torch(
        name, params, grads, max_grad_norm=max_grad_norm, norm_type=norm_type, maximize=True
    )
    last = [grad for grad in grads[-1] if grad is not None]
    norm64, _ = clip_reference(last, max_grad_norm, norm_type)
    torch_norm, _ = clip_with_torch(last, max_grad_norm, norm_type)
    assert optimizer.grad_norm.shape == ()
    assert_close_to_reference(optimizer.grad_norm, norm64, torch_norm)


def test_clip_then_step_gives_the_same(backend: str, device: torch.device) -> None:
    inside, outside = make_params(SHAPES, device=device), make_params(SHAPES, device=device)
    for a, b in zip(inside, outside, strict=True):
        b.data.copy_(a.data)
    first = fastremedy.optim.AdamW(inside, lr=0.1, max_grad_norm=0.5)
    second = fastremedy.optim.AdamW(outside, lr=0.1)
    for grads in make_grads(inside, 3):
        set_grads(inside, grads)
        set_grads(outside, grads)
        first.step()
        norm = fastremedy.clip_(outside, 0.5)
        second.step()
        assert_same_bits(first.grad_norm, norm)
    for a, b in zip(inside, outside, strict=True):
        # The gradient is rounded after clipping here and not there: a few units of the update.
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0.1 * 3 * 1e-6)


def test_gradients_are_read_only(backend: str, device: torch.device) -> None:
    params = make_params(SHAPES, device=device)
    optimizer = fastremedy.optim.AdamW(params, max_grad_norm=0.01, nonfinite="skip")
    (of_step,) = make_grads(params, 1)
    set_grads(params, of_step)
    grads = [param.grad for param in params]
    befores = [(grad.clone(), grad.data_ptr(), grad._version) for grad in grads]
    for _ in range(2):
        optimizer.step()
    for param, grad, (before, pointer, version) in zip(params, grads, befores, strict=True):
        assert param.grad is grad
        assert (grad.data_ptr(), grad._version) == (pointer, version)
        assert_same_bits(grad, before)


def test_grad_norm_is_of_the_last_step(backend: str, device: torch.device) -> None:
    (param,) = make_params([(2,)], device=device)
    optimizer = fastremedy.optim.AdamW([param], max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    norms = []
    for values in ([3.0, 4.0], [6.0, 8.0]):
        param.grad = torch.tensor(values, device=device)
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert [norm.item() for norm in norms] == [5.0, 10.0]
    assert norms[0].device.type == device.type
    optimizer.max_grad_norm = None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_no_norm_without_need(backend: str, device: torch.device) -> None:
    params = make_params([(2,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    train(optimizer, make_grads(params, 1))
    assert optimizer.grad_norm is None


def test_param_groups_with_their_own_hyper_parameters(backend: str, device: torch.device) -> None:
    params = make_params([(5,), (3, 3), (), (17,), (2,)], device=device)
    groups: list[dict[str, Any]] = [
        {"lr": 0.1, "weight_decay": 0.0},
        {"betas": (0.5, 0.6), "amsgrad": True},
        {"maximize": True, "eps": 0.1},
    ]
    assert_matches_torch(
        "AdamW", params, make_grads(params, 4), groups=groups, max_grad_norm=1.0, lr=0.01
    )


@pytest.mark.parametrize("name", ["eps", "weight_decay"])
def test_param_groups_that_share_all_but_one(backend: str, device: torch.device, name: str) -> None:
    params = make_params([(3,), (5,), (7,), (9,)], device=device)
    groups = [{name: 0.5}, {name: 0.1}]
    assert_matches_torch("AdamW", params, make_grads(params, 2), groups=groups, lr=0.01)


@few_examples
@given(
    presence=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6),
    num_groups=st.integers(1, 3),
    max_grad_norm=st.sampled_from([None, 0.5]),
)
def test_gradients_come_and_go(
    backend: str,
    device: torch.device,
    presence: list[list[bool]],
    num_groups: int,
    max_grad_norm: float | None,
) -> None:
    params = make_params([(3,), (2, 5), (), (9,)], device=device)
    grads = [
        [grad if is_there else None for grad, is_there in zip(of_step, there, strict=True)]
        for of_step, there in zip(make_grads(params, len(presence)), presence, strict=True)
    ]
    if max_grad_norm is not None:  # torch's reference needs something to clip
        grads = [of_step for of_step in grads if any(g is not None for g in of_step)]
    groups = [{"lr": 0.01 * (g + 1)} for g in range(num_groups)]
    optimizer = assert_matches_torch(
        "AdamW", params, grads, groups=groups, max_grad_norm=max_grad_norm
    )
    for i, param in enumerate(params_of(optimizer)):
        updates = sum(of_step[i] is not None for of_step in grads)
        assert optimizer.state[param].get("step", 0) == updates


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_no_gradients_at_all(
    backend: str, device: torch.device, max_grad_norm: float | None
) -> None:
    params = make_params([(3,), (2,)], device=device)
    before = [param.detach().clone() for param in params]
    optimizer = fastremedy.optim.AdamW(params, max_grad_norm=max_grad_norm)
    optimizer.step()
    assert not optimizer.state_dict()["state"]
    train(optimizer, [[None, None], [torch.ones(3, device=device), None], [None, None]])
    assert optimizer.state[params[0]]["step"].item() == 1
    assert params[1] not in optimizer.state or not optimizer.state[params[1]]
    assert_same_bits(params[1].detach(), before[1])


@few_examples
@given(
    sizes=st.lists(
        st.sampled_from((0, 1, 2, 3, 7, 8, 9, 31, 33, 255, 1023, 1025)), min_size=1, max_size=6
    ),
    dtype=st.sampled_from(FLOATS),
    offset=st.integers(0, 3),
)
def test_any_sizes_and_offsets(
    backend: str, device: torch.device, sizes: list[int], dtype: torch.dtype, offset: int
) -> None:
    buffers = [torch.randn(size + 8, device=device).to(dtype) for size in sizes]
    befores = [buffer.clone() for buffer in buffers]
    ends = [offset + size for size in sizes]
    params = [b[offset:end].requires_grad_() for b, end in zip(buffers, ends, strict=True)]
    assert_matches_torch("AdamW", params, make_grads(params, 2), eps=1e-3, max_grad_norm=2.0)
    for buffer, before, end in zip(buffers, befores, ends, strict=True):
        assert_same_bits(buffer[:offset], before[:offset])
        assert_same_bits(buffer[end:], before[end:])


@pytest.mark.parametrize("size", [16383, 16384, 16385, 65535, 65536, 65537])
def test_chunk_edges(backend: str, device: torch.device, size: int) -> None:
    params = make_params([(3,), (size,), (5,)], device=device)
    grads = make_grads(params, 1)
    grads[0][1][-1] = 1e3  # decides the norm: a lost tail shows in every parameter
    assert_matches_torch("AdamW", params, grads, max_grad_norm=1.0)


@pytest.mark.parametrize("value", [1e-30, 1e-42, 1e15, 1e20], ids=str)
def test_extreme_gradients(backend: str, device: torch.device, value: float) -> None:
    params = make_params([(9,)], device=device)
    grads: list[list[Tensor | None]] = [[torch.full((9,), value, device=device)]] * 2
    assert_matches_torch("AdamW", params, grads, max_grad_norm=1.0)
    if value < 1e19:  # unclipped, the square of 1e20 overflows in float32 as in torch
        assert_matches_torch("AdamW", make_params([(9,)], device=device), grads)


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_nonfinite_gradients_propagate_as_in_torch(
    backend: str, device: torch.device, value: float
) -> None:
    params = make_params([(5,)], device=device)
    copy = params[0].detach().clone().requires_grad_()
    grads = make_grads(params, 3)
    grads[1][0][2] = value
    optimizer = fastremedy.optim.AdamW(params)
    expected = torch.optim.AdamW([copy])
    train(optimizer, grads)
    train(expected, grads)
    torch.testing.assert_close(params[0], copy, equal_nan=True)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            optimizer.state[params[0]][key], expected.state[copy][key], equal_nan=True
        )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_infinite_parameters_stay_infinite_as_in_torch(
    backend: str, device: torch.device, weight_decay: float
) -> None:
    params = [torch.tensor([-math.inf, math.inf, 1.0], device=device, requires_grad=True)]
    grads: list[list[Tensor | None]] = [[torch.tensor([0.0, 1.0, 1.0], device=device)]] * 2
    assert_matches_torch("AdamW", params, grads, weight_decay=weight_decay)


def test_step_counts_beyond_a_half(backend: str, device: torch.device) -> None:
    (param,) = make_params([(2,)], torch.bfloat16, device)
    optimizer = fastremedy.optim.AdamW([param])
    grads: list[list[Tensor | None]] = [[torch.ones(2, device=device)]]
    train(optimizer, grads)
    optimizer.state[param]["step"].fill_(2**20)
    train(optimizer, grads)
    assert optimizer.state[param]["step"].dtype == torch.float32
    assert optimizer.state[param]["step"].item() == 2**20 + 1


def test_step_is_float32_under_any_default_dtype(backend: str, device: torch.device) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        params = make_params([(2,)], torch.float64, device)
        optimizer = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
        train(optimizer, make_grads(params, 2))
        assert optimizer.state[params[0]]["step"].dtype == torch.float32
        assert optimizer.state[params[0]]["step"].item() == 2
    finally:
        torch.set_default_dtype(torch.float32)


def test_same_bits_for_any_number_of_threads(backend: str, device: torch.device) -> None:
    sizes = [(40_000,), (3,), (20_000,)] if backend in ("torch", "cpu") else [(3000,), (5,)]
    originals = make_params(sizes, device=device)
    grads = make_grads(originals, 2)
    threads, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 2):
            torch.set_num_threads(num_threads)
            params = [param.detach().clone().requires_grad_() for param in originals]
            train(fastremedy.optim.AdamW(params, max_grad_norm=1.0), grads)
            results.append(params)
    finally:
        torch.set_num_threads(threads)
    for params in results[1:]:
        for actual, expected in zip(params, results[0], strict=True):
            assert_same_bits(actual, expected)
