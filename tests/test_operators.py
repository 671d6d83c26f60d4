"""torch.ops.fastremedy.*: schemas and fakes that torch.compile can trust, same results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import HALVES, assert_same_bits, with_grads

OPS = torch.ops.fastremedy

GRADS: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {
    "one": [((5,), torch.float32)],
    "mixed": [((5,), torch.float32), ((3, 4), torch.bfloat16), ((), torch.float64)],
    "with_empty": [((0,), torch.float32), ((7,), torch.float16)],
    "all_empty": [((0,), torch.float32)],
    "complex": [((3,), torch.complex64)],
}


def make_tensors(device: torch.device, name: str) -> list[Tensor]:
    return [torch.randn(s, device=device).to(dtype) for s, dtype in GRADS[name]]


@pytest.mark.parametrize("grads", GRADS)
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_opcheck_norm_operators(
    backend: str, device: torch.device, norm_type: float, grads: str
) -> None:
    tensors = make_tensors(device, grads)
    torch.library.opcheck(OPS.grad_norm.default, (tensors, norm_type))
    torch.library.opcheck(OPS.clip_grad_norm_.default, (tensors, 0.1, norm_type))


@pytest.mark.parametrize("grads", GRADS)
def test_norm_operators_equal_the_functions(backend: str, device: torch.device, grads: str) -> None:
    by_operator = make_tensors(device, grads)
    by_function = [tensor.clone() for tensor in by_operator]
    assert_same_bits(OPS.grad_norm(by_operator), fastremedy.grad_norm(with_grads(by_function)))
    norm = OPS.clip_grad_norm_(by_operator, 0.1)
    assert_same_bits(norm, fastremedy.clip_(with_grads(by_function), 0.1))
    for tensor, expected in zip(by_operator, by_function, strict=True):
        assert_same_bits(tensor, expected)


def test_norm_operators_of_nothing() -> None:
    assert OPS.grad_norm([]).item() == 0.0
    assert OPS.clip_grad_norm_([], 1.0).item() == 0.0


def adamw_arguments(
    device: torch.device, dtype: torch.dtype, amsgrad: bool, rounding: str
) -> tuple[list[Any], dict[str, Any]]:
    params = [torch.randn(s, device=device).to(dtype) for s in ((5,), (3, 4), (0,), ())]
    residuals: list[Tensor] = []
    if rounding == "kahan":
        residuals = [torch.zeros_like(p) for p in params]
    if rounding == "master":
        residuals = [p.float() for p in params]
    return [
        params,
        [torch.randn_like(p) for p in params],
        [torch.randn_like(p) for p in params],
        [torch.rand_like(p) for p in params],
        [torch.rand_like(p) for p in params] if amsgrad else [],
        residuals,
        [torch.tensor(3.0, device=device) for _ in params],
    ], {
        "lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "weight_decay": 0.1,
        "rounding": rounding, "seed": 5,
    }  # fmt: skip


CASES = [
    (torch.float32, False, "nearest"),
    (torch.float64, True, "nearest"),
    *(
        (dtype, False, rounding)
        for dtype in HALVES
        for rounding in ("stochastic", "kahan", "master")
    ),
]


@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize(("dtype", "amsgrad", "rounding"), CASES, ids=str)
def test_opcheck_adamw(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    amsgrad: bool,
    rounding: str,
    max_norm: float | None,
) -> None:
    args, kwargs = adamw_arguments(device, dtype, amsgrad, rounding)
    torch.library.opcheck(OPS.adamw_.default, tuple(args), {**kwargs, "max_norm": max_norm})


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("max_norm", [None, 0.1])
@pytest.mark.parametrize(("dtype", "amsgrad", "rounding"), CASES, ids=str)
def test_adamw_equals_the_optimizer(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    amsgrad: bool,
    rounding: str,
    max_norm: float | None,
    decoupled: bool,
) -> None:
    args, kwargs = adamw_arguments(device, dtype, amsgrad, rounding)
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, residuals, steps = args
    leaves = [p.clone().requires_grad_() for p in params]
    cls = fastremedy.optim.AdamW if decoupled else fastremedy.optim.Adam
    optimizer = cls(
        leaves, lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1, amsgrad=amsgrad,
        max_grad_norm=max_norm, low_precision=None if rounding == "nearest" else rounding,
    )  # fmt: skip
    for i, leaf in enumerate(leaves):
        state = {"step": steps[i], "exp_avg": exp_avgs[i], "exp_avg_sq": exp_avg_sqs[i]}
        if amsgrad:
            state["max_exp_avg_sq"] = max_exp_avg_sqs[i]
        if residuals:
            state["compensation" if rounding == "kahan" else "master_param"] = residuals[i]
        optimizer.state[leaf] = {name: value.clone() for name, value in state.items()}
        leaf.grad = grads[i].clone()
    if rounding == "stochastic":
        optimizer.param_groups[0]["noise_seed"] = 5
    optimizer.step()
    norm = OPS.adamw_(*args, **kwargs, max_norm=max_norm, decoupled_weight_decay=decoupled)
    if optimizer.grad_norm is None:
        assert norm.item() == 0.0
    else:
        assert_same_bits(norm, optimizer.grad_norm)
    for i, leaf in enumerate(leaves):
        assert_same_bits(params[i], leaf.detach())
        assert_same_bits(exp_avgs[i], optimizer.state[leaf]["exp_avg"])
        assert_same_bits(exp_avg_sqs[i], optimizer.state[leaf]["exp_avg_sq"])
        assert_same_bits(steps[i], optimizer.state[leaf]["step"])


def test_adamw_skips(backend: str, device: torch.device) -> None:
    args, kwargs = adamw_arguments(device, torch.float32, False, "nearest")
    args[1][1][0, 0] = float("nan")
    before = [[tensor.clone() for tensor in column] for column in args]
    OPS.adamw_(*args, **kwargs, skip_nonfinite=True)
    for column, expected in zip(args, before, strict=True):
        for tensor, value in zip(column, expected, strict=True):
            assert_same_bits(tensor, value)


@pytest.mark.parametrize("misfit", ["shape", "integers"])
def test_adamw_refuses_what_does_not_fit(backend: str, device: torch.device, misfit: str) -> None:
    args, kwargs = adamw_arguments(device, torch.float32, False, "nearest")
    args[1][1] = args[1][1][:2] if misfit == "shape" else args[1][1].to(torch.int64)
    before = [tensor.clone() for tensor in args[0]]
    with pytest.raises((ValueError, RuntimeError)):
        OPS.adamw_(*args, **kwargs)
    torch.testing.assert_close(args[0], before, rtol=0, atol=0)


def test_adamw_never_mixes_up_strides(backend: str, device: torch.device) -> None:
    args, kwargs = adamw_arguments(device, torch.float32, False, "nearest")
    with fastremedy.backends.use("torch"):
        expected = [[tensor.clone() for tensor in column] for column in args]
        OPS.adamw_(*expected, **kwargs)
    args[1][1] = args[1][1].t().contiguous().t()
    before = args[0][1].clone()
    try:
        OPS.adamw_(*args, **kwargs)
    except (ValueError, RuntimeError):
        assert_same_bits(args[0][1], before)
    else:
        torch.testing.assert_close(args[0][1], expected[0][1], rtol=1e-6, atol=1e-7)
