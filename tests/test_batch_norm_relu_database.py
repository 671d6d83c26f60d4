"""Every input and error input that torch keeps for its own BatchNorm modules drives ours."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastremedy

from .batch_norm_reference import is_slow, spare

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own modules
    from torch.testing._internal.common_modules import (
        ErrorModuleInput,
        ModuleErrorEnum,
        ModuleInfo,
        ModuleInput,
        module_db,
    )

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: fastremedy.nn.BatchNormReLU1d,
    nn.BatchNorm2d: fastremedy.nn.BatchNormReLU2d,
    nn.BatchNorm3d: fastremedy.nn.BatchNormReLU3d,
}
INFOS = [
    pytest.param(info, id=info.module_cls.__name__) for info in module_db if info.module_cls in OURS
]
INFO = pytest.mark.parametrize("info", INFOS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def test_torch_has_all_of_them() -> None:
    assert len(INFOS) == len(OURS)


def inputs(
    info: ModuleInfo, device: torch.device, dtype: torch.dtype, training: bool
) -> Iterator[ModuleInput]:
    yield from info.module_inputs_func(
        info, device=device, dtype=dtype, requires_grad=True, training=training
    )


def pair(
    info: ModuleInfo, case: ModuleInput, activation: str, training: bool, **options: Any
) -> tuple[Any, Any]:
    """Return torch's module of a case and ours, in the same state."""
    args, kwargs = case.constructor_input.args, case.constructor_input.kwargs
    expected = info.module_cls(*args, **kwargs, **options).train(training)
    module = OURS[info.module_cls](*args, **kwargs, **options, activation=activation)
    module.load_state_dict(expected.state_dict())
    return expected, module.train(training)


@INFO
@DTYPES
@MODES
@pytest.mark.parametrize("activation", ["identity", "relu"])
def test_inputs(
    backend: str,
    device: torch.device,
    activation: str,
    training: bool,
    dtype: torch.dtype,
    info: ModuleInfo,
) -> None:
    """Forward, backward and state, also on channels-last and discontiguous inputs."""
    spare(backend, (activation, dtype) != ("relu", torch.float32))
    for case in inputs(info, device, dtype, training):
        expected, module = pair(info, case, activation, training, device=device, dtype=dtype)
        (x,) = case.forward_input.args
        forms = [x.detach()]
        if not is_slow(backend):
            forms += [x.detach().repeat_interleave(2, -1)[..., ::2]]
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            if x.dim() in formats:
                forms.append(x.detach().contiguous(memory_format=formats[x.dim()]))
        for form in forms:
            leaves = [form.detach().requires_grad_() for _ in range(2)]
            reference = expected(leaves[0])
            if activation != "identity":
                reference = getattr(nn.functional, activation)(reference)
            actual = module(leaves[1])
            torch.testing.assert_close(actual, reference)
            grad = torch.randn_like(reference)
            reference.backward(grad)
            actual.backward(grad)
            close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad, **close)
            for own, other in zip(module.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(own.grad, other.grad, **close)
            torch.testing.assert_close(module.state_dict(), expected.state_dict())


@INFO
@MODES
def test_modules_copy_print_and_convert(
    device: torch.device, backend: str, training: bool, info: ModuleInfo
) -> None:
    """What torch's test_modules.py checks of any module: repr, deepcopy, pickle, to."""
    spare(backend, not training)
    for case in inputs(info, device, torch.float32, training):
        expected, module = pair(info, case, "relu", training, device=device)
        assert repr(expected).partition("(")[2][:-1] in repr(module)
        again = copy.deepcopy(module)
        (x,) = case.forward_input.args
        torch.testing.assert_close(again(x), module(x), rtol=0, atol=0)
        wide = module.double()
        assert wide(x.double()).dtype == torch.float64
        for value in (*wide.parameters(), *wide.buffers()):
            assert value.dtype in (torch.float64, torch.int64)


@INFO
@MODES
def test_second_derivative(
    backend: str, device: torch.device, training: bool, info: ModuleInfo
) -> None:
    spare(backend, True)
    for case in inputs(info, device, torch.float64, training):
        (x,) = case.forward_input.args
        if x.numel() == 0 or x.numel() > 80 or case.constructor_input.args[2:3] == (None,):
            continue  # an average over all batches is another function in every call
        _, module = pair(info, case, "relu", training, device=device, dtype=torch.float64)

        def function(x: Tensor, *_: Tensor, module: nn.Module = module) -> Any:
            return module(x)

        leaves = (x, *module.parameters())
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@INFO
def test_error_inputs(backend: str, device: torch.device, info: ModuleInfo) -> None:
    cases: list[ErrorModuleInput] = info.module_error_inputs_func(
        info, device=device, dtype=torch.float32, requires_grad=False, training=True
    )
    assert cases
    for case in cases:
        given = case.module_error_input
        args, kwargs = given.constructor_input.args, given.constructor_input.kwargs
        module = OURS[info.module_cls](*args, **kwargs, device=device)
        assert case.error_on == ModuleErrorEnum.FORWARD_ERROR
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*given.forward_input.args)
        torch.testing.assert_close(dict(module.state_dict()), dict(before), rtol=0, atol=0)
