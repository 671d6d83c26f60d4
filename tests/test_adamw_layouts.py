"""Parameters and gradients of any strides: the right elements meet, and no neighbour is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import assert_same_bits
from .training import assert_matches_torch, make_grads, set_grads, train

# Arrangements of the elements of a (4, 3, 5, 6) tensor; the values stay.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "permuted": lambda t: t.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "sliced": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "column": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}
SHAPE = (4, 3, 5, 6)


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_param_and_gradient_in_different_layouts(
    backend: str, device: torch.device, param_layout: str, grad_layout: str
) -> None:
    values = torch.randn(SHAPE, device=device)
    grads = [torch.randn(SHAPE, device=device) for _ in range(2)]
    params = [LAYOUTS[param_layout](values).requires_grad_(), torch.randn(7, device=device)]
    expected = [values.clone().requires_grad_(), params[1].clone().requires_grad_()]
    params[1].requires_grad_()
    optimizer = fastremedy.optim.AdamW(params, lr=0.1, max_grad_norm=1.0)
    contiguous = fastremedy.optim.AdamW(expected, lr=0.1, max_grad_norm=1.0)
    for grad in grads:
        params[0].grad = LAYOUTS[grad_layout](grad)
        expected[0].grad = grad
        params[1].grad = expected[1].grad = torch.ones(7, device=device)
        optimizer.step()
        contiguous.step()
    # The norm adds up in memory order, which differs: the last bit of the clip coefficient.
    torch.testing.assert_close(params, expected, rtol=1e-6, atol=1e-7)
    for key in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(
            optimizer.state[params[0]][key],
            contiguous.state[expected[0]][key],
            rtol=1e-6,
            atol=1e-8,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_match_torch(backend: str, device: torch.device, layout: str) -> None:
    params = [LAYOUTS[layout](torch.randn(SHAPE, device=device)).requires_grad_()]
    grads = make_grads(params, 3)
    assert_matches_torch("AdamW", params, grads, lr=0.1, amsgrad=True, max_grad_norm=1.0)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "column": lambda b: b[:, 0],
    "columns": lambda b: b[:, 2:5],
    "row": lambda b: b[3],
    "rows": lambda b: b[1:3],
    "every_other": lambda b: b[::2, 1::3],
    "transposed_slice": lambda b: b[1:5, 2:4].t(),
    "diagonal": lambda b: b.diagonal(),
    "zero_dim": lambda b: b[2, 3],
    "empty": lambda b: b[:, 3:3],
}


@pytest.mark.parametrize("low_precision", [None, "stochastic", "kahan", "master"])
@pytest.mark.parametrize("view", VIEWS)
def test_views_leave_their_neighbours_alone(
    backend: str, device: torch.device, view: str, low_precision: str | None
) -> None:
    dtype = torch.float32 if low_precision is None else torch.bfloat16
    base = torch.randn(12, 10, device=device).to(dtype)
    before = base.clone()
    inside = torch.zeros(12, 10, dtype=torch.bool, device=device)
    VIEWS[view](inside).fill_(True)
    param = VIEWS[view](base).requires_grad_()
    pointer, strides = param.data_ptr(), param.stride()
    optimizer = fastremedy.optim.AdamW([param], lr=0.5, low_precision=low_precision)
    train(optimizer, make_grads([param], 2))
    assert (param.data_ptr(), param.stride()) == (pointer, strides)
    assert_same_bits(base[~inside], before[~inside])
    assert (base[inside] != before[inside]).all()


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "empty"])
def test_views_match_torch(backend: str, device: torch.device, view: str) -> None:
    params = [
        VIEWS[view](torch.randn(12, 10, device=device)).requires_grad_(),
        torch.randn(12, 10, device=device).requires_grad_(),
    ]
    assert_matches_torch("AdamW", params, make_grads(params, 3), max_grad_norm=1.0)


def test_two_columns_of_one_matrix(backend: str, device: torch.device) -> None:
    base = torch.randn(20, 2, device=device)
    columns = [base[:, 0].requires_grad_(), base[:, 1].requires_grad_()]
    expected = [column.detach().clone().requires_grad_() for column in columns]
    grads = make_grads(columns, 3)
    train(fastremedy.optim.AdamW(columns, lr=0.1), grads)
    train(fastremedy.optim.AdamW(expected, lr=0.1), grads)
    torch.testing.assert_close(columns, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(6,), (4, 6)], ids=str)
def test_expanded_gradient(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    params = [torch.randn(shape, device=device).requires_grad_() for _ in range(2)]
    params[1].data.copy_(params[0].data)
    optimizer = fastremedy.optim.AdamW(params, lr=0.1, max_grad_norm=1.0)
    params[0].grad = torch.full((1,), 2.0, device=device).expand(shape)
    params[1].grad = params[0].grad.clone()
    optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (9,)], ids=str)  # one element is dense at any stride
def test_negated_gradient(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    params = [torch.ones(shape, device=device, requires_grad=True) for _ in range(2)]
    optimizer = fastremedy.optim.AdamW(params, lr=0.1)
    grad = torch.randn(shape, dtype=torch.complex64, device=device)
    params[0].grad = grad.conj().imag  # carries torch's lazy minus sign
    params[1].grad = -grad.imag
    optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (9,)], ids=str)
def test_negated_parameter(backend: str, device: torch.device, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, dtype=torch.complex64, device=device)
    params = [values.conj().imag, -values.imag]
    optimizer = fastremedy.optim.AdamW(params, lr=0.1)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones(shape, device=device)
        optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=0)


def test_layout_of_the_gradient_changes_between_steps(backend: str, device: torch.device) -> None:
    values = torch.randn(SHAPE, device=device)
    param, expected = values.clone().requires_grad_(), values.clone().requires_grad_()
    optimizer, contiguous = fastremedy.optim.AdamW([param]), fastremedy.optim.AdamW([expected])
    for layout in ("contiguous", "channels_last", "sliced", "contiguous", "permuted"):
        expected.grad = torch.randn(SHAPE, device=device)
        param.grad = LAYOUTS[layout](expected.grad)
        optimizer.step()
        contiguous.step()
    torch.testing.assert_close(param, expected, rtol=0, atol=0)


def test_channels_last_model(backend: str, device: torch.device) -> None:
    def make_model() -> torch.nn.Module:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 1, 1))
        return model.to(device, memory_format=torch.channels_last)

    def train_model(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
        for _ in range(3):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
        return list(model.parameters())

    images = torch.randn(2, 3, 6, 6, device=device).to(memory_format=torch.channels_last)
    ours, by_torch = make_model(), make_model()
    actual = train_model(ours, fastremedy.optim.AdamW(ours.parameters(), lr=0.01))
    expected = train_model(by_torch, torch.optim.AdamW(by_torch.parameters(), lr=0.01))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # three training steps


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "misaligned"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
def test_complex_parameters_match_foreach(
    backend: str,
    device: torch.device,
    amsgrad: bool,
    layout: str,
    name: str,
    dtype: torch.dtype,
) -> None:
    values = torch.randn(SHAPE, dtype=dtype, device=device)
    params: list[Any] = [LAYOUTS[layout](values).requires_grad_()]
    params.append(torch.randn(5, device=device, requires_grad=True))
    options = {"lr": 0.1, "weight_decay": 0.1, "amsgrad": amsgrad}
    assert_matches_torch(name, params, make_grads(params, 3), max_grad_norm=3.0, **options)


def test_conjugated_gradient(backend: str, device: torch.device) -> None:
    params = [torch.ones(9, dtype=torch.complex64, device=device) for _ in range(2)]
    optimizer = fastremedy.optim.AdamW([param.requires_grad_() for param in params], lr=0.1)
    grad = torch.randn(9, dtype=torch.complex64, device=device)
    params[0].grad, params[1].grad = grad.conj(), grad.conj().resolve_conj()
    optimizer.step()
    torch.testing.assert_close(params[0], params[1], rtol=0, atol=0)


def test_zero_dim_and_one_element(backend: str, device: torch.device) -> None:
    params = [torch.randn(shape, device=device).requires_grad_() for shape in ((), (1,), (1, 1, 1))]
    (of_step,) = make_grads(params, 1)
    set_grads(params, of_step)
    params[2].grad = torch.ones(1, 1, 1, device=device).as_strided((1, 1, 1), (7, 3, 5))
    assert_matches_torch("AdamW", params, make_grads(params, 3), max_grad_norm=1.0)


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parameters_offloaded_to_the_cpu(gpu: torch.device, dtype: torch.dtype) -> None:
    """Gradients that arrive from a GPU in pinned memory give what others give."""
    values, grad = torch.randn(2, 50, 33).to(dtype)
    params = [values.clone() for _ in range(2)]
    pinned = torch.empty_like(grad, pin_memory=True)
    pinned.copy_(grad.to(gpu), non_blocking=True)
    torch.cuda.synchronize()
    for param, of_param in zip(params, (grad, pinned), strict=True):
        param.grad = of_param
        fastremedy.optim.AdamW([param], lr=0.1, max_grad_norm=1.0).step()
    assert_same_bits(*params)
