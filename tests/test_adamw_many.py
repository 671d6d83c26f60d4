"""Optimizers of so many parameters that on a CPU the thread pool helps the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import assert_same_bits
from .training import assert_like_torch, copy_params, give_grads, make_params, params_of

MANY = 600  # parameters, with three tensors each: more than one thread looks at alone
BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def double_param(param: Tensor, _: dict[str, Tensor]) -> None:
    param.data = param.data * 2


def transpose_param(param: Tensor, _: dict[str, Tensor]) -> None:
    param.data = param.data.t()


def double_moment_in_place(_: Tensor, state: dict[str, Tensor]) -> None:
    state["exp_avg_sq"].data = state["exp_avg_sq"].data * 2


def double_moment(_: Tensor, state: dict[str, Tensor]) -> None:
    state["exp_avg"] = state["exp_avg"] * 2


@pytest.mark.parametrize("which", [0, MANY - 1])
@pytest.mark.parametrize(
    "exchange", [double_param, transpose_param, double_moment_in_place, double_moment]
)
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_one_tensor_exchanged(
    backend: str, exchange: Callable[[Tensor, dict[str, Tensor]], None], which: int
) -> None:
    kept = []  # a stale pointer gives a wrong result, not a crash of the test run

    def drive(optimizer: torch.optim.Optimizer) -> None:
        params = params_of(optimizer)
        for _ in range(3):
            for param in params:
                param.grad = None
            give_grads(params)
            optimizer.step()
            state = optimizer.state[params[which]]
            kept.extend([params[which].detach(), *(t.detach() for t in state.values())])
            exchange(params[which], state)

    assert_like_torch(make_params([(2, 2)] * MANY), drive, lr=0.1)


class Marked(Tensor):
    """A gradient of a class of its own."""


def sliced(grad: Tensor) -> Tensor:
    return torch.stack([grad, grad], dim=-1)[..., 0]


GRADIENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda grad: grad.t().contiguous().t(),
    "sliced": sliced,
    "expanded": lambda grad: grad[:1].expand(grad.shape),
    "a subclass": lambda grad: grad.as_subclass(Marked),
    "a parameter": torch.nn.Parameter,
    "infinite": lambda grad: grad.clone().fill_(torch.inf),
    "of one element": lambda grad: torch.complex(grad, grad).conj().imag,
}


@BACKENDS
@pytest.mark.parametrize("which", [0, 63, 64, MANY - 1])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_one_gradient_of_another_kind(backend: str, kind: str, which: int) -> None:
    shapes = [(3, 3)] * MANY
    if kind == "of one element":
        shapes[which] = (1, 1)

    def drive(optimizer: torch.optim.Optimizer) -> None:
        params = params_of(optimizer)
        for i in range(4):
            give_grads(params)
            if i % 2:
                grad = params[which].grad
                assert grad is not None
                params[which].grad = GRADIENTS[kind](grad)
            optimizer.step()

    assert_like_torch(make_params(shapes), drive)


@BACKENDS
@pytest.mark.parametrize("which", [0, 63, 64, MANY - 1])
def test_one_gradient_without_memory(backend: str, which: int) -> None:
    params = make_params([(3, 3)] * MANY)
    optimizer = fastremedy.optim.AdamW(params)
    give_grads(params)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    params[which].grad = torch.ones(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert_same_bits(param.detach(), value)


@BACKENDS
@pytest.mark.parametrize("size", [2, 300])
def test_norm_of_gradients_that_change(backend: str, size: int) -> None:
    """The norm of a step is begun as the last step took it."""
    params = make_params([(size, 2)] * MANY)
    optimizer = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
    for norm_type in (2.0, 2.0, 1.0, float("inf"), 2.0, 2.0):
        give_grads(params)
        grad = params[7].grad
        assert grad is not None
        params[7].grad = sliced(1000 * grad)
        params[8].grad = None
        optimizer.norm_type = norm_type
        optimizer.step()
        expected = fastremedy.grad_norm(params, norm_type)
        assert optimizer.grad_norm is not None
        assert_same_bits(optimizer.grad_norm, expected)
        optimizer.max_grad_norm = None
        optimizer.step()
        assert optimizer.grad_norm is None
        optimizer.max_grad_norm = 1.0
        optimizer.step()
        assert_same_bits(optimizer.grad_norm, expected)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_with_the_pool_or_alone(backend: str) -> None:
    """Which way is quicker is tried in the first steps."""
    params = make_params([(5,)] * MANY)
    shared = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
    others = copy_params(params)
    alone = fastremedy.optim.AdamW(others, max_grad_norm=1.0)
    ways = set()
    for _ in range(20):
        give_grads(params)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad
        shared.step()
        (_, table), *_ = shared._tables._tables
        ways.add(table._table.is_alone)
        torch.set_num_threads(1)
        alone.step()
        torch.set_num_threads(3)
        for param, other in zip(params, others, strict=True):
            assert_same_bits(param.detach(), other.detach())
            assert param._version == other._version
    assert ways == {False, True}


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_gradients_are_read_by_all_threads(backend: str) -> None:
    """Which takes a place in torch's objects: if it is not found any more, steps are slower."""
    params = make_params([(3,)] * MANY)
    give_grads(params)
    optimizer = fastremedy.optim.AdamW(params)
    optimizer.step()
    (_, table), *_ = optimizer._tables._tables
    assert table._table.has_handles
    for _ in range(20):
        assert table.gather(optimizer.param_groups, optimizer.state) == []


class Asks(torch.nn.Parameter):
    """A parameter whose gradient is what a function returns."""

    ask: Callable[[], Tensor]

    @property
    def grad(self) -> Tensor:  # type: ignore[override]
        return self.ask()


@BACKENDS
def test_gradient_that_cannot_be_read(backend: str) -> None:
    params = make_params([(3,)] * MANY)
    special = Asks(torch.ones(3))
    special.ask = lambda: torch.ones(3)
    optimizer = fastremedy.optim.AdamW([*params, special])
    give_grads(params)
    optimizer.step()
    before = [param.detach().clone() for param in (*params, special)]

    def fail() -> Tensor:
        raise LookupError("no gradient today")

    special.ask = fail
    with pytest.raises(LookupError, match="no gradient today"):
        optimizer.step()
    for param, value in zip((*params, special), before, strict=True):
        assert_same_bits(param.detach(), value)
    assert optimizer.state[special]["step"].item() == 1
    special.ask = lambda: torch.ones(3)
    optimizer.step()
    assert optimizer.state[special]["step"].item() == 2


@BACKENDS
def test_gradient_that_steps_another_optimizer(backend: str) -> None:
    """The pool is in use already when the inner step asks for it."""
    inner = make_params([(100,)] * MANY)
    expected = copy_params(inner)
    give_grads(inner)
    for param, other in zip(inner, expected, strict=True):
        other.grad = param.grad
    inner_optimizer, alone = fastremedy.optim.AdamW(inner), fastremedy.optim.AdamW(expected)
    outer = make_params([(3,)] * MANY)
    give_grads(outer)
    special = Asks(torch.ones(3))
    special.ask = lambda: torch.ones(3)
    optimizer = fastremedy.optim.AdamW([*outer, special])
    optimizer.step()
    num_asked = 0

    def step_another() -> Tensor:
        nonlocal num_asked
        num_asked += 1
        inner_optimizer.step()
        return torch.ones(3)

    special.ask = step_another
    for _ in range(3):
        optimizer.step()
    assert optimizer.state[special]["step"].item() == 4
    for _ in range(num_asked):
        alone.step()
    for param, other in zip(inner, expected, strict=True):
        assert param._version == other._version
        assert_same_bits(param.detach(), other.detach())


@BACKENDS
def test_skipped_step_leaves_versions_alone(backend: str) -> None:
    params = make_params([(64,)] * MANY)
    give_grads(params)
    optimizer = fastremedy.optim.AdamW(params, nonfinite="skip")
    optimizer.step()
    assert params[-1].grad is not None
    params[-1].grad[5] = torch.nan
    versions = [param._version for param in params]
    optimizer.step()
    assert optimizer.num_skipped == 1
    if backend == "cpu":  # torch's operators count what they write back
        assert [param._version for param in params] == versions
    params[-1].grad[5] = 0
    optimizer.step()
    assert all(param._version > v for param, v in zip(params, versions, strict=True))
