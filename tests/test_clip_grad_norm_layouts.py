"""Gradients of any strides are clipped, and nothing beside them is."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import (
    assert_close_to_reference,
    assert_norm_close,
    assert_same_bits,
    clip_reference,
    clip_with_torch,
    grads_of,
    with_grads,
)

# A view of a buffer of 1024 elements, by what may go wrong.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous_inside": lambda b: b[5:900],
    "transposed": lambda b: b[:600].view(20, 30).t(),
    "channels_last": lambda b: b[:480].view(2, 4, 5, 12).permute(0, 3, 1, 2),
    "column": lambda b: b.view(32, 32)[:, 3],
    "columns": lambda b: b.view(32, 32)[:, 3:17],
    "every_other": lambda b: b[1::2],
    "every_other_of_transposed": lambda b: b.view(32, 32).t()[::2, 1::3],
    "diagonal": lambda b: b.view(32, 32).diagonal(),
    "zero_dim": lambda b: b[7],
    "one_element_strided": lambda b: b.view(32, 32)[3:4, 5:6],
    "empty_strided": lambda b: b.view(32, 32)[:, 3:3],
    "size_one_dims": lambda b: b[:30].view(30, 1, 1).transpose(0, 2),
}


def assert_clips_inside(
    buffer: Tensor, grad: Tensor, others: list[Tensor], norm_type: float
) -> None:
    """Clip a view of ``buffer`` together with others; everything around the view has to stay."""
    before = buffer.clone()
    inside = torch.zeros_like(buffer, dtype=torch.bool)
    torch.as_strided(inside, grad.shape, grad.stride(), grad.storage_offset()).fill_(True)
    grads = [grad, *others]
    originals = [g.clone() for g in grads]
    norm64, _ = clip_reference(grads, math.inf, norm_type)
    max_norm = 0.3 * norm64.item()
    norm = fastremedy.clip_(with_grads(grads), max_norm, norm_type)
    norm64, clipped64 = clip_reference(originals, max_norm, norm_type)
    torch_norm, torch_clipped = clip_with_torch(originals, max_norm, norm_type)
    assert_norm_close(norm, norm64, torch_norm, grads)
    # The norm is as precise as the narrowest gradient in it, and so is what it scales.
    is_mixed = any(g.dtype not in (torch.float64, torch.complex128) for g in grads)
    for actual, expected, by_torch in zip(grads, clipped64, torch_clipped, strict=True):
        narrow = is_mixed and actual.dtype == torch.float64
        assert_close_to_reference(actual.float() if narrow else actual, expected, by_torch)
    assert_same_bits(buffer[~inside], before[~inside])


@pytest.mark.parametrize("norm_type", [2.0, math.inf, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_views(
    backend: str, device: torch.device, view: str, dtype: torch.dtype, norm_type: float
) -> None:
    buffer = torch.randn(1024, device=device).to(dtype)
    others = [torch.randn(9, device=device), torch.randn(3, 5, device=device).double()]
    assert_clips_inside(buffer, VIEWS[view](buffer), others, norm_type)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("view", ["contiguous_inside", "transposed", "column", "zero_dim"])
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 0.5])
def test_complex(
    backend: str, device: torch.device, norm_type: float, view: str, dtype: torch.dtype
) -> None:
    buffer = torch.randn(1024, dtype=dtype, device=device)
    assert_clips_inside(buffer, VIEWS[view](buffer), [torch.randn(9, device=device)], norm_type)


def test_lazily_conjugated_and_negated(backend: str, device: torch.device) -> None:
    buffer = torch.randn(20, dtype=torch.complex64, device=device)
    grads = [
        buffer[:7].conj(),
        buffer[7:].conj().imag,
        torch._neg_view(torch.ones(3, device=device)),
    ]
    originals = [grad.clone() for grad in grads]
    norm = fastremedy.clip_(with_grads(grads), 1.0)
    norm64, clipped64 = clip_reference(originals, 1.0, 2.0)
    torch.testing.assert_close(norm.double().cpu(), norm64)
    for grad, expected in zip(grads, clipped64, strict=True):
        torch.testing.assert_close(
            grad.cpu(),
            expected.to(grad.dtype),
            rtol=1e-6,
            atol=1e-7,  # float32 and cancelling
        )


@pytest.mark.parametrize("shape", [(6,), (4, 6), (4, 3, 6)], ids=str)
def test_expanded_counts_every_element(
    backend: str, device: torch.device, shape: tuple[int, ...]
) -> None:
    base = torch.arange(1.0, 7.0, device=device)
    grads = [base[:1].expand(shape[0]) if len(shape) == 1 else base.expand(shape)]
    (original,) = (grad.clone() for grad in grads)
    norm = fastremedy.clip_(with_grads(grads), 1.0)
    norm64, (clipped64,) = clip_reference([original], 1.0, 2.0)
    torch_norm, (torch_clipped,) = clip_with_torch([original], 1.0, 2.0)
    assert_norm_close(norm, norm64, torch_norm, grads)
    assert_close_to_reference(grads[0], clipped64, torch_clipped)


def test_expanded_is_measured(backend: str, device: torch.device) -> None:
    grad = torch.full((1,), 3.0, device=device).expand(4, 4)
    assert fastremedy.grad_norm(with_grads([grad])).item() == 12.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [8, 9, 70])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_misaligned(
    backend: str, device: torch.device, offset: int, size: int, dtype: torch.dtype
) -> None:
    buffer = torch.randn(80, device=device).to(dtype)
    assert_clips_inside(buffer, buffer[offset : offset + size], [], 2.0)


def test_sparse_as_in_torch(backend: str, device: torch.device) -> None:
    def run(clip: Callable[..., Tensor]) -> tuple[object, list[Tensor]]:
        weight = torch.nn.Parameter(torch.ones(10, 3, device=device))
        index = torch.tensor([[1, 4, 7]], device=device)
        weight.grad = torch.sparse_coo_tensor(
            index, torch.full((3, 3), 2.0, device=device), (10, 3), check_invariants=False
        )
        try:
            return clip([weight], 1.0), [grad.to_dense() for grad in grads_of([weight])]
        except (RuntimeError, NotImplementedError) as error:
            return type(error), []

    expected_norm, expected = run(torch.nn.utils.clip_grad_norm_)
    norm, grads = run(fastremedy.clip_)
    if isinstance(expected_norm, Tensor):
        torch.testing.assert_close(norm, expected_norm)
        torch.testing.assert_close(grads, expected)
    else:
        assert isinstance(norm, type), "torch refuses, fastremedy does not"


@pytest.mark.parametrize("call", [fastremedy.grad_norm, partial(fastremedy.clip_, max_norm=1.0)])
def test_sparse_gradients_are_refused_as_in_torch(
    backend: str, device: torch.device, call: Callable[[list[Tensor]], Tensor]
) -> None:
    params = [torch.nn.Parameter(torch.ones(3, 2, device=device)) for _ in range(3)]
    params[1].grad = torch.full((3, 2), 5.0, device=device)
    params[2].grad = torch.full((3, 2), 5.0, device=device).to_sparse()
    with pytest.raises(NotImplementedError, match=r"parameters\[2\] must be strided, .*sparse_coo"):
        call(params)
    assert (params[1].grad == 5).all()
