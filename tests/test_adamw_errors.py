"""Bad input: the error names what is wrong, and nothing was changed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastremedy

from .reference import assert_unchanged, everything_in
from .training import make_grads, make_params, params_of, set_grads, train


def optimizer_after_a_step(
    device: torch.device, names: bool = False, **options: Any
) -> torch.optim.Optimizer:
    """Return an optimizer with state; its third parameter is the one to spoil."""
    params = make_params([(3,), (2, 2), (4,), (5,)], device=device)
    named = [(f"layer{i}.weight", param) for i, param in enumerate(params)]
    optimizer = fastremedy.optim.AdamW(named if names else params, max_grad_norm=1.0, **options)
    train(optimizer, make_grads(params, 1))
    set_grads(params, make_grads(params, 1)[0])
    return optimizer


def assert_refused(
    optimizer: torch.optim.Optimizer,
    error: type[Exception] | tuple[type[Exception], ...],
    *texts: str,
) -> None:
    """Step twice: both times the error has these texts and everything stays as it was."""
    before = everything_in(optimizer)
    for _ in range(2):
        with pytest.raises(error) as info:
            optimizer.step()
        for text in texts:
            assert text in str(info.value)
        assert_unchanged(optimizer, before)


class UncheckedParameter(torch.nn.Parameter):
    """A parameter that takes any gradient: torch itself refuses most of what does not fit."""

    spoilt: Tensor | None = None

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        return super().grad if self.spoilt is None else self.spoilt

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        torch.Tensor.grad.__set__(self, value)  # type: ignore[attr-defined]


MISFITS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "shape": (lambda: torch.ones(3), ("(4,)", "(3,)")),
    "dimensions": (lambda: torch.ones(4, 1), ("(4,)", "(4, 1)")),
    "integers": (lambda: torch.ones(4, dtype=torch.int64), ("torch.int64",)),
    "complex": (lambda: torch.ones(4, dtype=torch.complex64), ("real", "torch.complex64")),
    "float8": (lambda: torch.ones(4).to(torch.float8_e5m2), ("real (float32", "float8_e5m2")),
    "device": (lambda: torch.ones(4, device="meta"), ("meta",)),
}


@pytest.mark.parametrize("has_state", [True, False], ids=["", "first_step"])
@pytest.mark.parametrize("misfit", MISFITS)
def test_gradient_that_does_not_fit(
    backend: str, device: torch.device, misfit: str, has_state: bool
) -> None:
    params = make_params([(3,), (2, 2)], device=device)
    bad = UncheckedParameter(torch.ones(4, device=device))
    params += [bad, *make_params([(5,)], device=device)]
    optimizer = fastremedy.optim.AdamW(
        [{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=1
    )
    if has_state:
        train(optimizer, make_grads(params, 1))
    set_grads(params, make_grads(params, 1)[0])
    make, texts = MISFITS[misfit]
    bad.spoilt = make() if misfit == "device" else make().to(device)
    assert_refused(optimizer, ValueError, "param_groups[1]['params'][1]", *texts)
    bad.spoilt = None
    optimizer.step()


@pytest.mark.parametrize("has_state", [True, False], ids=["", "first_step"])
def test_sparse_gradient_gets_torchs_message(
    backend: str, device: torch.device, has_state: bool
) -> None:
    params = make_params([(3,), (10, 3)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    by_torch = torch.optim.AdamW(params)
    if has_state:
        train(optimizer, make_grads(params, 1))
    params[0].grad = torch.ones(3, device=device)
    params[1].grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 4]], device=device),
        torch.ones(2, 3, device=device),
        (10, 3),
        check_invariants=False,
    )
    with pytest.raises(RuntimeError) as info:
        by_torch.step()
    before = {name: v for name, v in everything_in(optimizer).items() if not name.endswith("grad")}
    with pytest.raises(RuntimeError) as ours:
        optimizer.step()
    assert str(ours.value) == str(info.value)
    params[1].grad = None
    after = everything_in(optimizer)
    assert before.keys() <= after.keys() | {"groups[0].params[1].grad"}
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=0)


def test_error_names_the_parameter(backend: str, device: torch.device) -> None:
    params: list[Any] = make_params([(3,)], device=device)
    bad = UncheckedParameter(torch.ones(4, device=device))
    optimizer = fastremedy.optim.AdamW([("encoder.bias", params[0]), ("decoder.weight", bad)])
    set_grads(params_of(optimizer), make_grads(params_of(optimizer), 1)[0])
    bad.spoilt = torch.ones(3, device=device)
    assert_refused(optimizer, ValueError, "decoder.weight", "param_groups[0]['params'][1]")


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_error(backend: str, device: torch.device, value: float, names: bool) -> None:
    optimizer = optimizer_after_a_step(device, names, nonfinite="error")
    param = params_of(optimizer)[2]
    param.grad[1] = value
    name = (
        "layer2.weight (param_groups[0]['params'][2])" if names else "param_groups[0]['params'][2]"
    )
    assert_refused(optimizer, RuntimeError, name, "1 NaN or infinite of 4 elements")
    param.grad[1] = 1.0
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", torch.tensor([0.1, 0.2])),
        ("lr", "fast"),
        ("eps", "small"),
        ("weight_decay", None),
        ("betas", 0.9),
        ("betas", (0.9,)),
        ("betas", ("a", 0.9)),
        ("maximize", torch.ones(2)),
        ("amsgrad", torch.ones(2)),
    ],
    ids=str,
)
def test_bad_hyper_parameter_in_a_group(
    backend: str, device: torch.device, key: str, value: object
) -> None:
    optimizer = optimizer_after_a_step(device)
    good = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    before = everything_in(optimizer)
    for _ in range(2):
        with pytest.raises((ValueError, TypeError), match=key):
            optimizer.step()
    optimizer.param_groups[0][key] = before[f"groups[0].{key}"] = good
    assert_unchanged(optimizer, before)
    optimizer.step()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
        ("max_grad_norm", "1"),
        ("norm_type", 0),
        ("norm_type", "inf"),
        ("nonfinite", "Skip"),
        ("low_precision", "bogus"),
        ("state_dtype", torch.int32),
    ],
    ids=str,
)
def test_bad_option_set_between_steps(
    backend: str, device: torch.device, name: str, value: Any
) -> None:
    optimizer = optimizer_after_a_step(device)
    setattr(optimizer, name, value)
    assert_refused(optimizer, ValueError, name, f"got {value!r}")


def test_state_of_another_shape(backend: str, device: torch.device) -> None:
    optimizer = optimizer_after_a_step(device)
    optimizer.state[params_of(optimizer)[2]]["exp_avg"] = torch.zeros(7, device=device)
    assert_refused(optimizer, ValueError, "param_groups[0]['params'][2]", "(4,)", "(7,)")


@pytest.mark.parametrize("name", ["step", "exp_avg", "exp_avg_sq"])
def test_state_that_is_missing(backend: str, device: torch.device, name: str) -> None:
    optimizer = optimizer_after_a_step(device)
    del optimizer.state[params_of(optimizer)[2]][name]
    assert_refused(
        optimizer, ValueError, "param_groups[0]['params'][2]", f"state['{name}']", "None"
    )


def test_step_of_many_elements(backend: str, device: torch.device) -> None:
    optimizer = optimizer_after_a_step(device)
    optimizer.state[params_of(optimizer)[2]]["step"] = torch.ones(4, device=device)
    assert_refused(optimizer, ValueError, "param_groups[0]['params'][2]", "one element")


def test_expanded_parameter_is_refused(backend: str, device: torch.device) -> None:
    # Its elements share memory: torch refuses to write there.
    param = torch.ones(1, device=device).expand(4).requires_grad_()
    other = torch.ones(4, device=device, requires_grad=True)
    optimizer = fastremedy.optim.AdamW([other, param])
    for p in (param, other):
        p.grad = torch.ones(4, device=device)
    before = [p.detach().clone() for p in (param, other)]
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    torch.testing.assert_close([param.detach(), other.detach()], before, rtol=0, atol=0)


def test_parameter_dtype_without_kernel(backend: str, device: torch.device) -> None:
    if backend == "torch":
        pytest.skip("plain torch has no such limit")
    other, param = (
        torch.ones(4, device=device),
        torch.ones(4, device=device).to(torch.float8_e4m3fn),
    )
    optimizer = fastremedy.optim.AdamW([other.requires_grad_(), param.requires_grad_()])
    other.grad, param.grad = torch.ones_like(other), torch.ones_like(param)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError, TypeError, NotImplementedError)):
            optimizer.step()
        assert other.tolist() == param.float().tolist() == [1.0] * 4


def test_meta_parameters(backend: str, device: torch.device) -> None:
    param = torch.ones(4, device="meta", requires_grad=True)
    param.grad = torch.ones(4, device="meta")
    optimizer = fastremedy.optim.AdamW([param])
    if backend == "torch":
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].is_meta
    else:
        with pytest.raises(
            RuntimeError, match=f"backend '{backend}' was chosen but cannot run adamw"
        ):
            optimizer.step()


@pytest.mark.parametrize("wrapper", ["none", "hook", "scheduler", "both"])
def test_warning_of_torchs_update_names_the_caller(wrapper: str) -> None:
    param = TwoTensor(torch.ones(2), torch.ones(2)).requires_grad_()
    optimizer = fastremedy.optim.AdamW([param])
    if wrapper in ("hook", "both"):
        optimizer.register_step_post_hook(lambda *_: None)
    if wrapper in ("scheduler", "both"):
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    param.sum().backward()
    with pytest.warns(UserWarning, match="run torch's own update") as warned:
        optimizer.step()
    assert [warning.filename for warning in warned] == [__file__]


@pytest.mark.parametrize("low_precision", [None, "stochastic", "kahan", "master"])
def test_fake_parameters(low_precision: str | None) -> None:
    """As where the memory of a training step is estimated, whatever would run it."""
    with FakeTensorMode():
        params = [
            torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((4,), (2, 3))
        ]
        optimizer = fastremedy.optim.AdamW(
            params, max_grad_norm=1.0, nonfinite="skip", low_precision=low_precision
        )
        for _ in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.step()
        assert isinstance(optimizer.grad_norm, FakeTensor)
        for param in params:
            for name, value in optimizer.state[param].items():
                assert isinstance(value, FakeTensor)
                assert value.shape == (() if name == "step" else param.shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": -1.0}, "max_grad_norm must be None or a number >= 0, got -1.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be None or a number >= 0, got nan"),
        ({"norm_type": 0.0}, "norm_type must be a number > 0 or inf, got 0.0"),
        ({"norm_type": -math.inf}, "norm_type must be a number > 0 or inf, got -inf"),
        ({"norm_type": math.nan}, "norm_type must be a number > 0 or inf, got nan"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"nonfinite": None}, "nonfinite must be one of"),
        ({"low_precision": "none"}, "low_precision must be one of"),
        ({"state_dtype": torch.int8}, "state_dtype must be one of"),
        ({"state_dtype": torch.float64}, "state_dtype must be one of"),
        ({"state_dtype": "bfloat16"}, "got 'bfloat16'"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"eps": -1.0}, "Invalid epsilon value: -1.0"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"differentiable": True, "nonfinite": "skip"}, "differentiable=True"),
        ({"differentiable": True, "low_precision": "kahan"}, "differentiable=True"),
        ({"differentiable": True, "state_dtype": torch.bfloat16}, "differentiable=True"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_wrong_options(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(fastremedy.optim, name)(make_params([(2,)]), **options)


def test_wrong_parameters_as_in_torch() -> None:
    for cls in (torch.optim.AdamW, fastremedy.optim.AdamW):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            cls([])
        with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
            cls([torch.ones(2, requires_grad=True) * 2])
        with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
            cls([1.0])
        with pytest.raises(TypeError, match="iterable of Tensors"):
            cls(torch.ones(2, requires_grad=True))
