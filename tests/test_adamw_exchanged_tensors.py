"""Tensors that are exchanged behind the optimizer's back: nothing stale is read or written."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

import fastremedy

from .reference import assert_same_bits
from .training import (
    assert_like_torch,
    give_grads,
    make_grads,
    make_params,
    params_of,
    train,
)


def test_gradients_swapped_between_parameters(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        first, second = params_of(optimizer)
        give_grads([first, second])
        optimizer.step()
        first.grad, second.grad = second.grad, first.grad
        optimizer.step()

    assert_like_torch(make_params([(3,), (3,)], device=device), drive)


class Ones(torch.nn.Parameter):
    """A parameter whose gradient is always 1."""

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        of_tensor = super(torch.nn.Parameter, cls).__torch_function__  # Parameter's is disabled
        result = of_tensor(function, types, args, kwargs or {})
        is_grad = function == torch.Tensor.grad.__get__  # type: ignore[attr-defined]
        return torch.ones(4) if is_grad and result is not None else result


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_gradient_is_what_a_subclass_says(backend: str) -> None:
    results = []
    for of_type in (Ones, torch.nn.Parameter):
        param = of_type(torch.zeros(4))
        optimizer = fastremedy.optim.AdamW([param])
        for _ in range(3):
            param.grad = torch.randn(4) if of_type is Ones else torch.ones(4)
            optimizer.step()
        results.append(param.tolist())
    assert results[0] == results[1]


class Memory(bytearray):
    """Memory that tells, by a weak reference, whether a tensor still holds it."""


def give_memory(param: torch.Tensor) -> weakref.ref[Memory]:
    memory = Memory(4 * param.numel())
    param.grad = torch.frombuffer(memory, dtype=torch.float32).view(param.shape)
    return weakref.ref(memory)


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_step_lets_go_of_gradients(backend: str) -> None:
    params = make_params([(3,), (4, 5)])
    optimizer = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
    for _ in range(3):
        memories = [give_memory(param) for param in params]
        optimizer.step()
        assert all(memory() is not None for memory in memories)
        optimizer.zero_grad()
        assert [memory() for memory in memories] == [None, None]


@pytest.mark.parametrize("backend", ["torch", "cpu"], indirect=True)
def test_gradients_set_to_none_after_a_step_has_read_them(backend: str) -> None:
    # As another thread may do it.
    params = make_params([(3,), (4, 5)])
    optimizer = fastremedy.optim.AdamW(params)
    give_grads(params)
    optimizer.step()
    memories = [give_memory(param) for param in params]
    tables = optimizer._tables.gather(optimizer.param_groups, optimizer.state, "nearest", None)
    optimizer.zero_grad()
    assert all(memory() is not None for memory in memories)
    assert len(tables) == 1


def test_parameter_data_reassigned(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        params = params_of(optimizer)
        for i in range(4):
            give_grads(params)
            optimizer.step()
            if i == 1:
                params[0].data = params[0].data * 2
            if i == 2:
                params[1].data = params[1].data.t().contiguous().t()

    assert_like_torch(make_params([(3,), (4, 5)], device=device), drive)


def test_parameter_data_transposed_in_place(backend: str, device: torch.device) -> None:
    # Same pointer and shape, other strides: state and gradients keep the meaning of their indices.
    def drive(optimizer: torch.optim.Optimizer) -> None:
        (param,) = params_of(optimizer)
        give_grads([param])
        optimizer.step()
        param.grad = None
        param.data = param.data.t()
        give_grads([param])
        optimizer.step()

    assert_like_torch(make_params([(3, 3)], device=device), drive, lr=0.1)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_data_of_a_complex_parameter_reassigned(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        (param,) = params_of(optimizer)
        for i in range(5):
            give_grads([param])
            optimizer.step()
            if i == 1:
                param.data = param.data * 2
            if i == 2:  # same pointer and shape, other strides
                param.data = param.data.t()

    assert_like_torch(make_params([(4, 4)], dtype=dtype, device=device), drive)


def test_state_tensor_replaced(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            give_grads(params_of(optimizer))
            optimizer.step()
            state = optimizer.state[params_of(optimizer)[0]]
            state["exp_avg"] = state["exp_avg"] * 2

    assert_like_torch(make_params([(3,), (2,)], device=device), drive)


@pytest.mark.parametrize("names", [("exp_avg", "exp_avg_sq"), ("step",)], ids=str)
def test_state_data_reassigned(backend: str, device: torch.device, names: tuple[str, ...]) -> None:
    # How many programs move optimizer state to the host and back.
    old_storages = []  # a stale pointer gives a wrong result, not a crash of the test run

    def drive(optimizer: torch.optim.Optimizer) -> None:
        for _ in range(3):
            give_grads(params_of(optimizer))
            optimizer.step()
            for state in optimizer.state.values():
                for name in names:
                    old_storages.append(state[name].detach())
                    state[name].data = state[name].data.clone()

    assert_like_torch(make_params([(1000,), (2,)], device=device), drive)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_step_shared_with_other_processes(backend: str, device: torch.device, which: int) -> None:
    """Sharing a step moves the vector that all steps lie in."""

    def drive(optimizer: torch.optim.Optimizer) -> None:
        params = params_of(optimizer)
        for _ in range(3):
            give_grads(params)
            optimizer.step()
            optimizer.state[params[which]]["step"].share_memory_()

    assert_like_torch(make_params([(3,), (2,), (4,)], device=device), drive)


def test_entries_of_the_state_that_belong_to_no_parameter(
    backend: str, device: torch.device
) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        for i in range(3):
            optimizer.state["rounds"] = i
            optimizer.state["history"] = torch.ones(i)
            give_grads(params_of(optimizer))
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()

    assert_like_torch(make_params([(3,)], device=device), drive)


def test_params_of_a_group_as_a_tuple(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        first, second = params_of(optimizer)
        give_grads([first, second])
        for params in ((first, second), (second,), (second, first)):
            optimizer.param_groups[0]["params"] = params
            for _ in range(2):
                optimizer.step()
        optimizer.param_groups[0]["params"] = [first, second]

    assert_like_torch(make_params([(3,), (2,)], device=device), drive)


def test_state_cleared(backend: str, device: torch.device) -> None:
    params = make_params([(3,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    grads = make_grads(params, 2)
    train(optimizer, grads)
    optimizer.state.clear()
    train(optimizer, grads[:1])
    assert optimizer.state[params[0]]["step"].item() == 1


@pytest.mark.parametrize("had_state", [True, False])
def test_parameter_exchanged_in_its_group(
    backend: str, device: torch.device, had_state: bool
) -> None:
    first, old, new = make_params([(3,), (2,), (2,)], device=device)
    optimizer = fastremedy.optim.AdamW([first, old])
    ones = torch.ones(3, device=device), torch.ones(2, device=device)
    train(optimizer, [[ones[0], ones[1] if had_state else None]])
    optimizer.param_groups[0]["params"][1] = new
    before, before_old = new.detach().clone(), old.detach().clone()
    train(optimizer, [ones])
    assert (new != before).all()
    assert_same_bits(old.detach(), before_old)


def test_parameter_removed_from_its_group(backend: str, device: torch.device) -> None:
    params = make_params([(3,), (2,), (4,)], device=device)
    optimizer = fastremedy.optim.AdamW(params)
    train(optimizer, make_grads(params, 1))
    removed = optimizer.param_groups[0]["params"].pop(0)
    before = removed.detach().clone()
    train(optimizer, make_grads(params[1:], 1))
    assert_same_bits(removed.detach(), before)
    assert [optimizer.state[p]["step"].item() for p in params] == [1, 2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_model_converted_after_steps(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    model = torch.nn.Linear(3, 2).to(device)
    optimizer = fastremedy.optim.AdamW(model.parameters(), lr=0.1)
    for convert in (model.float, lambda: model.to(dtype), model.float):
        convert()
        optimizer.zero_grad()
        kind = model.weight.dtype
        before = model.weight.detach().clone()
        model(torch.ones(4, 3, dtype=kind, device=device)).sum().backward()
        optimizer.step()
        # The gradient has one sign: each step moves by about lr. bfloat16 near 1 has 8 bits.
        torch.testing.assert_close(
            before - model.weight, torch.full_like(before, 0.1), rtol=0.05, atol=1e-2
        )
    assert optimizer.state[model.weight]["step"].item() == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (7, 5)], ids=["empty", "with gaps"])
def test_parameter_without_an_address_of_its_own_converted(
    backend: str, device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    memory = torch.randn(shape[0], 2 * shape[1], device=device)
    param = torch.nn.Parameter(memory[:, ::2])
    optimizer = fastremedy.optim.AdamW([param])
    give_grads([param])
    optimizer.step()
    param.grad = None
    param.data = param.data.to(dtype)
    copy = torch.nn.Parameter(param.detach().clone())
    expected = fastremedy.optim.AdamW([copy])
    expected.load_state_dict(optimizer.state_dict())
    expected.state[copy] = {key: value.clone() for key, value in expected.state[copy].items()}
    param.grad, copy.grad = torch.ones_like(param), torch.ones_like(copy)
    optimizer.step()
    expected.step()
    assert_same_bits(param.detach(), copy.detach())


def test_two_optimizers_on_one_parameter(backend: str, device: torch.device) -> None:
    (param,) = make_params([(3,)], device=device)
    optimizers = [fastremedy.optim.AdamW([param], lr=0.1) for _ in range(2)]
    before = param.detach().clone()
    param.grad = torch.ones(3, device=device)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(param, before * 0.999**2 - 0.2, rtol=1e-5, atol=1e-3)


def test_a_parameter_belongs_to_the_optimizer_once() -> None:
    # Within a group torch only warns, and says that it will be an error.
    (param,) = make_params([(3,)])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        fastremedy.optim.AdamW([{"params": [param]}, {"params": [param]}])
    with pytest.raises(ValueError, match=r"once, got params\[1\] again"):
        fastremedy.optim.AdamW([param, param])


def test_backend_switched_between_steps(backend: str, device: torch.device) -> None:
    def drive(optimizer: torch.optim.Optimizer) -> None:
        for i in range(6):
            give_grads(params_of(optimizer))
            with fastremedy.backends.use(backend if i % 2 else "torch"):
                optimizer.step()

    assert_like_torch(make_params([(3,), (2, 2)], device=device), drive, amsgrad=True)
