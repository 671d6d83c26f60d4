"""Every input and error input that torch keeps for its own AdamW and Adam drives ours."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import fastremedy

from .training import make_grads, params_of, train

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own modules
    from torch.testing._internal.common_optimizers import (
        ErrorOptimizerInput,
        OptimizerErrorEnum,
        OptimizerInput,
        optim_error_inputs_func_adam,
        optim_error_inputs_func_adamw,
        optim_inputs_func_adam,
        optim_inputs_func_adamw,
    )

INPUTS = {"Adam": optim_inputs_func_adam, "AdamW": optim_inputs_func_adamw}
ERROR_INPUTS = {"Adam": optim_error_inputs_func_adam, "AdamW": optim_error_inputs_func_adamw}

# What torch lists for CPUs and, for capturable and tensor hyper-parameters, for GPUs.
CASES = [
    pytest.param(name, case, id=f"{name}-{case.desc}")
    for name, inputs in INPUTS.items()
    for case in {c.desc: c for kind in ("cpu", "mps", "cuda") for c in inputs(kind)}.values()
]
ERROR_CASES = [
    pytest.param(name, case, id=f"{name}-{i}-{case.optimizer_error_input.desc}")
    for name, inputs in ERROR_INPUTS.items()
    for i, case in enumerate(inputs("cpu", torch.float32))
]


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_inputs(
    backend: str, device: torch.device, dtype: torch.dtype, name: str, case: OptimizerInput
) -> None:
    torch_options: dict[str, Any] = dict(case.kwargs)
    if device.type == "cpu":
        torch_options["capturable"] = False  # torch steps so on GPUs only
    runs = []
    for cls, options in (
        (getattr(fastremedy.optim, name), case.kwargs),
        (getattr(torch.optim, name), {**torch_options, "foreach": False}),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        model.to(device, dtype)
        params = case.params or list(model.parameters())
        optimizer = cls(params, **options)
        torch.manual_seed(1)
        train(optimizer, make_grads(params_of(optimizer), 5))
        runs.append(optimizer)
    ours, by_torch = runs
    # Five updates in this dtype; in torch tensor hyper-parameters and capturable steps are float32.
    is_float32 = any(torch.is_tensor(value) for value in torch_options.values())
    is_float32 = is_float32 or torch_options.get("capturable", False)
    rounding = torch.finfo(torch.float32 if is_float32 else dtype).eps
    for param, expected in zip(params_of(ours), params_of(by_torch), strict=True):
        torch.testing.assert_close(param, expected, rtol=32 * rounding, atol=32 * rounding)
        for key, value in by_torch.state[expected].items():
            torch.testing.assert_close(
                ours.state[param][key].to(value),  # torch has steps on the CPU
                value,
                rtol=32 * rounding,
                atol=32 * rounding,
            )


@pytest.mark.parametrize(("name", "case"), ERROR_CASES)
def test_error_inputs(name: str, case: ErrorOptimizerInput) -> None:
    given = case.optimizer_error_input
    assert case.error_on == OptimizerErrorEnum.CONSTRUCTION_ERROR
    params = given.params if given.params is not None else [torch.zeros(1, requires_grad=True)]
    if issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            getattr(torch.optim, name)(params, **given.kwargs)
        # It warns of a future error, which fastremedy raises already.
        with pytest.raises(ValueError, match="a parameter must be in a group once"):
            getattr(fastremedy.optim, name)(params, **given.kwargs)
    else:
        for module in (torch.optim, fastremedy.optim):
            with pytest.raises(case.error_type, match=case.error_regex):
                getattr(module, name)(params, **given.kwargs)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("fused", [None, True, False])
@pytest.mark.parametrize("foreach", [None, True, False])
def test_flags_without_effect(
    backend: str, device: torch.device, foreach: bool | None, fused: bool | None, name: str
) -> None:
    params = [torch.ones(3, device=device, requires_grad=True)]
    if foreach and fused:
        with pytest.raises(RuntimeError, match="cannot be `True` together"):
            getattr(fastremedy.optim, name)(params, foreach=True, fused=True)
        return
    optimizer = getattr(fastremedy.optim, name)(
        params, lr=0.1, weight_decay=0.0, foreach=foreach, fused=fused
    )
    train(optimizer, [[torch.ones(3, device=device)]])
    torch.testing.assert_close(params[0], torch.full_like(params[0], 0.9))
