"""float16 and bfloat16 parameters that keep small updates; dtypes of the moments."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy
from fastremedy.ops.adamw import round_stochastic

from .reference import HALVES, UNIT_ROUNDOFF, assert_same_bits
from .training import copy_params, make_grads, make_params, params_of, train

# With these the update is lr * sign(gradient), exactly.
EXACT: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}


def step_by(params: list[Tensor], lr: float, **options: Any) -> torch.optim.Optimizer:
    """Subtract lr from every element, exactly up to the rounding of the parameter."""
    optimizer = fastremedy.optim.AdamW(params, lr=lr, **EXACT, **options)
    train(optimizer, [[torch.ones_like(param) for param in params]])
    return optimizer


# --- stochastic rounding ---


@pytest.mark.parametrize("fraction", [1 / 16, 0.5, 0.75])
@pytest.mark.parametrize("sign", [1, -1], ids=["", "negative"])
@pytest.mark.parametrize(
    ("dtype", "base"),
    [
        (torch.bfloat16, 1.0),
        (torch.float16, 1.0),
        (torch.float16, 2.0**-20),  # subnormal: multiples of 2^-24
        (torch.bfloat16, 2.0**-130),  # subnormal: multiples of 2^-133
    ],
    ids=str,
)
def test_stochastic_rounding_is_unbiased(
    backend: str, device: torch.device, dtype: torch.dtype, base: float, sign: int, fraction: float
) -> None:
    count = 20_000 if backend in ("torch", "cpu") else 4096
    low = torch.tensor(base, dtype=dtype)
    gap = (torch.nextafter(low, torch.tensor(2 * base, dtype=dtype)) - low).item()
    param = torch.full((count,), sign * base, dtype=dtype, device=device, requires_grad=True)
    optimizer = fastremedy.optim.AdamW(
        [param], lr=fraction * gap, low_precision="stochastic", **EXACT
    )
    # The larger magnitude is away from zero; weights move against the gradient.
    train(optimizer, [[torch.full_like(param, -sign)]])
    moved = (param.detach().double().abs() - base) / gap
    assert set(moved.unique().tolist()) <= {0.0, 1.0}
    # Five standard errors of a binomial mean; the noise has 13 bits at least.
    allowed = 5 * math.sqrt(fraction * (1 - fraction) / count) + 2.0**-13
    assert abs(moved.mean().item() - fraction) <= allowed


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_keeps_what_is_exact(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([0.0, -0.0, 1.0, -0.5, largest, -largest])
    param = values.to(device, dtype).requires_grad_()
    optimizer = fastremedy.optim.AdamW([param], lr=0.0, low_precision="stochastic", **EXACT)
    train(optimizer, [[torch.ones_like(param)]] * 3)
    assert param.tolist() == values.to(dtype).tolist()


def test_stochastic_noise_is_the_definitions(backend: str, device: torch.device) -> None:
    layouts = [(5,), (33, 7), (0,), (), (1025,)]
    params = [p for dtype in HALVES for p in make_params(layouts, dtype, device)] + [
        torch.randn(6, 4, device=device).bfloat16().t().requires_grad_()
    ]
    params.append(torch.randn(6, 4, device=device).bfloat16()[:, 1:3].requires_grad_())
    expected = copy_params(params)
    for other, param in zip(expected, params, strict=True):
        other.data = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype).copy_(
            param
        )
    torch.manual_seed(7)
    optimizer = step_by(params, 2.0**-9, low_precision="stochastic")
    with fastremedy.backends.use("torch"):
        torch.manual_seed(7)
        definition = step_by(expected, 2.0**-9, low_precision="stochastic")
        train(definition, [[torch.ones_like(p) for p in expected]])
    train(optimizer, [[torch.ones_like(p) for p in params]])
    assert optimizer.param_groups[0]["noise_seed"] == definition.param_groups[0]["noise_seed"]
    for param, other in zip(params, expected, strict=True):
        assert_same_bits(param.detach(), other.detach())


def test_noise_differs_by_step_parameter_and_seed(backend: str, device: torch.device) -> None:
    def rounded(seed: int) -> list[list[float]]:
        params = [torch.ones(64, device=device).bfloat16().requires_grad_() for _ in range(2)]
        torch.manual_seed(seed)
        # Half a step up and back: each time another half of the elements moves.
        optimizer = step_by(params, 2.0**-9, low_precision="stochastic")
        first = [param.tolist() for param in params]
        for param in params:
            param.data.fill_(1.0)
        train(optimizer, [[torch.ones_like(param) for param in params]])
        return first + [param.tolist() for param in params]

    outcomes = rounded(0) + rounded(1)
    assert rounded(0) == outcomes[:4]
    for i, outcome in enumerate(outcomes):
        assert (
            10 < sum(value != 1.0 for value in outcome) < 54
        )  # 5.5 standard deviations of 64 coins
        assert all(outcome != other for other in outcomes[:i])


def test_noise_seed_is_kept_by_the_state_dict(backend: str, device: torch.device) -> None:
    params = make_params([(40,), (3, 5)], torch.bfloat16, device)
    grads = make_grads(params, 4)
    optimizer = fastremedy.optim.AdamW(params, lr=1e-3, low_precision="stochastic")
    train(optimizer, grads[:2])
    resumed_params = copy_params(params)
    resumed = fastremedy.optim.AdamW(resumed_params, lr=1e-3, low_precision="stochastic")
    assert resumed.param_groups[0]["noise_seed"] != optimizer.param_groups[0]["noise_seed"]
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, grads[2:])
    train(resumed, grads[2:])
    for param, other in zip(params, resumed_params, strict=True):
        assert_same_bits(param.detach(), other.detach())


def test_seed_is_drawn_only_for_stochastic_rounding() -> None:
    params = make_params([(2,)])
    before = torch.get_rng_state()
    fastremedy.optim.AdamW(params, low_precision="kahan")
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_seed_is_the_same_under_any_default_device() -> None:
    seeds = []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        with torch.device(default):
            optimizer = fastremedy.optim.AdamW(make_params([(2,)]), low_precision="stochastic")
        seeds.append(optimizer.param_groups[0]["noise_seed"])
    assert seeds[0] == seeds[1]


def test_group_added_later_shares_the_seed(backend: str, device: torch.device) -> None:
    params = make_params([(4,), (4,)], torch.bfloat16, device)
    optimizer = fastremedy.optim.AdamW(params[:1], low_precision="stochastic")
    optimizer.add_param_group({"params": params[1:]})
    first, second = optimizer.param_groups
    assert first["noise_seed"] == second["noise_seed"]
    train(optimizer, make_grads(params, 1))


# --- Kahan compensation ---


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("low_precision", ["kahan", "master"])
def test_drift_is_bounded(
    backend: str, device: torch.device, dtype: torch.dtype, low_precision: str
) -> None:
    steps, lr = (500, 2.0**-12) if backend in ("torch", "cpu") else (60, 2.0**-12)
    param = torch.full((9,), 1.0, dtype=dtype, device=device, requires_grad=True)
    optimizer = fastremedy.optim.AdamW([param], lr=lr, low_precision=low_precision, **EXACT)
    train(optimizer, [[torch.ones_like(param)]] * steps)
    exact = 1.0 - steps * lr
    # The parameter is within one rounding of the value. The value itself: float32 adds 2^-24 a
    # step; the compensation, below u, is rounded to u of itself, so u^2 a step.
    unit = UNIT_ROUNDOFF[dtype]
    per_step = unit**2 + 2.0**-24 if low_precision == "kahan" else 2.0**-24
    drift = (param.detach().double() - exact).abs().max().item()
    assert drift <= unit + steps * per_step
    plain = torch.full((9,), 1.0, dtype=dtype, device=device, requires_grad=True)
    train(fastremedy.optim.AdamW([plain], lr=lr, **EXACT), [[torch.ones_like(plain)]] * steps)
    if dtype == torch.bfloat16:
        assert plain.tolist() == [1.0] * 9  # nearest loses every update


@pytest.mark.parametrize("low_precision", ["stochastic", "kahan", "master"])
def test_weight_decay_of_bfloat16_arrives(
    backend: str, device: torch.device, low_precision: str
) -> None:
    steps = 1000 if backend in ("torch", "cpu") else 50
    decay = 0.1 * 1e-3
    size = 512 if low_precision == "stochastic" else 8
    param = torch.ones(size, dtype=torch.bfloat16, device=device, requires_grad=True)
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "low_precision": low_precision}
    train(fastremedy.optim.AdamW([param], **options), [[torch.zeros_like(param)]] * steps)
    expected = (1 - decay) ** steps  # 0.905 after 1000 steps
    if low_precision == "stochastic":
        # Each step moves an element by a last bit (2^-8 below 1) with probability decay / 2^-8:
        # variance 2^-16 * steps * that, five standard errors of the mean.
        error = 5 * math.sqrt(steps * decay * 2.0**-8 / size)
        assert abs(param.detach().double().mean().item() - expected) <= error
    else:
        unit = UNIT_ROUNDOFF[torch.bfloat16]
        drift = (param.detach().double() - expected).abs().max().item()
        assert drift <= unit + steps * (unit**2 * (low_precision == "kahan") + 2.0**-24)


@pytest.mark.parametrize("low_precision", ["kahan", "master", "stochastic"])
def test_overflow_of_a_half_recovers_or_stays_infinite(
    backend: str, device: torch.device, low_precision: str
) -> None:
    param = torch.full((3,), 60000.0, dtype=torch.float16, device=device, requires_grad=True)
    optimizer = fastremedy.optim.AdamW([param], lr=10000.0, low_precision=low_precision, **EXACT)
    train(optimizer, [[-torch.ones_like(param)]])
    expected = 65504.0 if low_precision == "stochastic" else math.inf  # a finite value stays finite
    assert param.tolist() == [expected] * 3
    train(optimizer, [[-torch.ones_like(param)]])
    assert not param.isnan().any()


# --- float32 master copy ---


def test_master_is_a_float32_run(backend: str, device: torch.device) -> None:
    params = make_params([(40,), (3, 5)], torch.bfloat16, device)
    floats = [param.detach().float().requires_grad_() for param in params]
    grads = make_grads(params, 4)
    optimizer = fastremedy.optim.AdamW(params, lr=0.01, low_precision="master", max_grad_norm=1.0)
    expected = fastremedy.optim.AdamW(floats, lr=0.01, max_grad_norm=1.0)
    train(optimizer, grads)
    train(expected, grads)
    for param, other in zip(params, floats, strict=True):
        assert_same_bits(optimizer.state[param]["master_param"], other.detach())
        assert_same_bits(optimizer.state[param]["exp_avg"], expected.state[other]["exp_avg"])
        assert_same_bits(param.detach(), other.detach().bfloat16())


def test_master_follows_a_parameter_set_from_outside(backend: str, device: torch.device) -> None:
    param = torch.ones(4, device=device).bfloat16().requires_grad_()
    optimizer = step_by([param], 2.0**-12, low_precision="master")
    assert optimizer.state[param]["master_param"].tolist() == [1 - 2.0**-12] * 4
    with torch.no_grad():
        param[1] = 5.0
        param[2] = 1.0  # what it is already: its master stays
    train(optimizer, [[torch.ones_like(param)]])
    masters = [1 - 2.0**-11, 5 - 2.0**-12, 1 - 2.0**-11, 1 - 2.0**-11]
    assert optimizer.state[param]["master_param"].tolist() == masters


@pytest.mark.parametrize("low_precision", ["stochastic", "kahan", "master"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wide_parameters_have_no_need(
    backend: str, device: torch.device, dtype: torch.dtype, low_precision: str
) -> None:
    params = make_params([(40,)], dtype, device)
    expected = copy_params(params)
    grads = make_grads(params, 3)
    optimizer = fastremedy.optim.AdamW(params, low_precision=low_precision)
    train(optimizer, grads)
    train(fastremedy.optim.AdamW(expected), grads)
    assert_same_bits(params[0].detach(), expected[0].detach())
    assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("low_precision", [None, "stochastic", "kahan", "master"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_matches_the_definition(
    backend: str, device: torch.device, name: str, amsgrad: bool, low_precision: str | None
) -> None:
    shapes = ((7, 5), (0,), (), (1025,))
    params = [p for dtype in HALVES for p in make_params(shapes, dtype, device)]
    expected = copy_params(params)
    grads = make_grads(params, 3)
    cls = getattr(fastremedy.optim, name)
    options: dict[str, Any] = {
        "lr": 0.01, "eps": 1e-3, "weight_decay": 0.1, "amsgrad": amsgrad,
        "low_precision": low_precision, "max_grad_norm": 1.0,
    }  # fmt: skip
    torch.manual_seed(5)
    optimizer = cls(params, **options)
    train(optimizer, grads)
    torch.manual_seed(5)
    with fastremedy.backends.use("torch"):
        definition = cls(expected, **options)
        train(definition, grads)
    for param, other in zip(params, expected, strict=True):
        # The last bit of float32 may differ and now and then turn a rounding of the half.
        unit = 2 * UNIT_ROUNDOFF[param.dtype]
        torch.testing.assert_close(param, other, rtol=unit, atol=unit / 64)
        assert (param != other).sum() <= 1 + param.numel() // 50
        if "master_param" in optimizer.state[param]:
            torch.testing.assert_close(
                optimizer.state[param]["master_param"],
                definition.state[other]["master_param"],
                rtol=1e-6,
                atol=1e-7,
            )


# --- dtype of the moments ---


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dtype(
    backend: str, device: torch.device, dtype: torch.dtype, state_dtype: torch.dtype
) -> None:
    params = make_params([(40,), (3, 5)], dtype, device)
    expected = copy_params(params)
    grads = make_grads(params, 4)
    lr = 0.01
    optimizer = fastremedy.optim.AdamW(params, lr=lr, state_dtype=state_dtype, amsgrad=True)
    train(optimizer, grads)
    with fastremedy.backends.use("torch"):
        definition = fastremedy.optim.AdamW(expected, lr=lr, state_dtype=state_dtype, amsgrad=True)
        train(definition, grads)
    for param, other in zip(params, expected, strict=True):
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert optimizer.state[param][key].dtype == state_dtype
            unit = 2 * torch.finfo(state_dtype).eps  # one rounding that turned the other way
            torch.testing.assert_close(
                optimizer.state[param][key],
                definition.state[other][key],
                rtol=max(unit, 1e-6),
                atol=1e-7,
            )
        torch.testing.assert_close(param, other, rtol=2 * torch.finfo(dtype).eps, atol=lr * 0.02)


def test_low_precision_of_each_group_and_mixed_dtypes(backend: str, device: torch.device) -> None:
    params = [
        p for d in (torch.float32, *HALVES, torch.float64) for p in make_params([(5,)], d, device)
    ]
    optimizer = fastremedy.optim.AdamW(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], low_precision="kahan"
    )
    train(optimizer, make_grads(params, 2))
    has_residual = ["compensation" in optimizer.state[p] for p in params_of(optimizer)]
    assert has_residual == [False, True, True, False]


@pytest.mark.parametrize("new", [None, "stochastic", "kahan", "master"])
@pytest.mark.parametrize("old", [None, "stochastic", "kahan", "master"])
def test_mode_set_between_steps(
    backend: str, device: torch.device, old: str | None, new: str | None
) -> None:
    """It is as if the state had been loaded into an optimizer of the new mode."""
    param = torch.nn.Parameter(torch.linspace(-1, 1, 65, device=device, dtype=torch.bfloat16))
    optimizer = fastremedy.optim.AdamW([param], low_precision=old)
    param.grad = torch.ones_like(param)
    optimizer.step()
    loaded = torch.nn.Parameter(param.detach().clone())
    expected = fastremedy.optim.AdamW([loaded], low_precision=new)
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.low_precision = new
    for group in optimizer.param_groups + expected.param_groups:
        group["noise_seed"] = 0
    loaded.grad = torch.ones_like(loaded)
    for _ in range(3):
        optimizer.step()
        expected.step()
    assert torch.equal(param, loaded)
    for key, value in expected.state[loaded].items():
        assert torch.equal(optimizer.state[param][key], value)


def test_definition_of_stochastic_rounding_at_every_noise() -> None:
    """All 2^13 (2^16) noises: rounding up happens exactly as often as the fraction says."""
    for dtype, bits in ((torch.float16, 13), (torch.bfloat16, 16)):
        noise = torch.arange(2**bits)
        for value in (1 / 3, -5e-6, 3e-7, 0.0999, -1e3 / 7):
            rounded = round_stochastic(torch.full((2**bits,), value), noise, dtype).double()
            exact = torch.tensor(value).double().item()
            gap = (rounded.max() - rounded.min()).item()
            assert abs(rounded.mean().item() - exact) <= gap * 2.0**-bits
