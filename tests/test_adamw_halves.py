"""float16 and bfloat16 on their way to float and back, in registers and in blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import HALVES
from .training import train

# Around vectors of 8, 16 and 32, around blocks, and around the chunks of the CPU kernels.
SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 1023, 1024, 1025, 16383, 16385)


def _params(dtype: torch.dtype, offset: int, device: torch.device) -> list[Tensor]:
    """Return views that begin ``offset`` elements into their memory."""
    generator = torch.Generator().manual_seed(3)
    memory = [torch.randn(n + offset, generator=generator).to(device, dtype) for n in SIZES]
    return [values[offset:].requires_grad_() for values in memory]


def _grads(params: list[Tensor], offset: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    grads = []
    for param in params:
        values = torch.randn(len(param) + offset, generator=generator)
        values[offset::7] *= 1e-5
        values[offset + 5 :: 500] = torch.inf
        values[offset + 6 :: 600] = torch.nan
        grads.append(values.to(param.device, param.dtype)[offset:])
    return grads


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_change_no_bit(
    backend: str, device: torch.device, dtype: torch.dtype, offset: int
) -> None:
    """With them the CPU goes through blocks, without them it updates where elements lie."""
    trained = []
    for collects in (False, True):
        params = _params(dtype, offset, device)
        optimizer = fastremedy.optim.AdamW(params, lr=0.01)
        optimizer.collect_stats = collects
        train(optimizer, [_grads(params, offset)] * 2)
        states = [optimizer.state[param] for param in params]
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        trained.append([param.detach() for param in params] + moments)
    for plain, measured in zip(*trained, strict=True):
        torch.testing.assert_close(plain, measured, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_read_and_written_as_it_is(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    for moments in (dtype, torch.float32):
        param = values.to(device, copy=True).requires_grad_()
        optimizer = fastremedy.optim.AdamW([param], lr=0.0, state_dtype=moments)
        train(optimizer, [[torch.ones_like(param)]])
        read = param.detach().cpu()
        torch.testing.assert_close(read, values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floats_are_rounded_as_torch_does(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    bits = torch.randint(-(2**31), 2**31, (2**16 + 3,), generator=torch.Generator().manual_seed(5))
    ties = torch.arange(2**16, dtype=torch.int64) << 13  # halfway between float16, all exponents
    values = torch.cat([bits, ties, ties << 2]).to(torch.int32).view(torch.float32)
    param = values.to(device, dtype).requires_grad_()
    optimizer = fastremedy.optim.AdamW([param], lr=0.0, weight_decay=0.0, low_precision="master")
    train(optimizer, [[torch.ones_like(param)]])
    master = optimizer.state[param]["master_param"]
    # A master that rounds to the parameter is believed.
    near = torch.where(values.to(dtype).isfinite(), values, 0.0).to(device)
    param.data.copy_(near)
    master.copy_(near)
    train(optimizer, [[torch.ones_like(param)]])
    assert torch.equal(master, near)
    assert torch.equal(param.detach(), near.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_nan_stays_nan_whatever_its_bits(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Rounded as a number, one of all ones would carry into the sign."""
    for bits in (2**31 - 1, -1, 0x7F800001):
        param = torch.zeros(33, device=device, dtype=dtype).requires_grad_()
        optimizer = fastremedy.optim.AdamW([param], state_dtype=torch.float32)
        grads = [torch.ones_like(param)]
        train(optimizer, [grads])
        optimizer.state[param]["exp_avg"].view(torch.int32).fill_(bits)
        train(optimizer, [grads])
        assert param.isnan().all()
