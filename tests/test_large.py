"""More than 2^31 elements: offsets are 64 bits wide everywhere.

``FASTREMEDY_LARGE=1 pytest tests/test_large.py`` in one process, with 18 GB of memory for the
largest; emulated and interpreted kernels would take hours.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastremedy
from fastremedy.functional import batch_norm_relu, focal_loss, sigmoid_focal_loss

BEYOND = 2**31
DTYPE = torch.bfloat16

pytestmark = pytest.mark.skipif(
    "FASTREMEDY_LARGE" not in os.environ, reason="FASTREMEDY_LARGE is not set"
)


@pytest.fixture
def large(backend: str, device: torch.device) -> Iterator[torch.device]:
    """Return the device of a backend that has the speed and the memory; leave none behind."""
    if backend == "torch":
        pytest.skip("plain torch makes copies in float32")
    if backend in ("cuda", "triton") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    yield device
    gc.collect()
    fastremedy.empty_cache()
    torch.cuda.empty_cache()


def zeros(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(*shape, dtype=DTYPE, device=device)


def test_clip(large: torch.device) -> None:
    grad = zeros(BEYOND + 9, device=large)
    places = [0, BEYOND - 1, BEYOND, BEYOND + 8]
    grad[places] = 2.0
    parameter = torch.nn.Parameter(torch.empty_like(grad))
    parameter.grad = grad
    norm = fastremedy.clip_(parameter, max_norm=2.0)
    assert norm.item() == 4.0
    torch.testing.assert_close(grad[places].float().cpu(), torch.ones(4))
    assert grad.count_nonzero() == 4


def test_adamw(large: torch.device) -> None:
    parameter = torch.nn.Parameter(zeros(BEYOND + 9, device=large))
    parameter.grad = zeros(BEYOND + 9, device=large)
    places = [0, BEYOND - 1, BEYOND, BEYOND + 8]
    parameter.grad[places] = 2.0
    optimizer = fastremedy.optim.AdamW([parameter], lr=0.5, state_dtype=DTYPE, max_grad_norm=2.0)
    optimizer.step()
    assert optimizer.grad_norm is not None
    assert optimizer.grad_norm.item() == 4.0
    assert (parameter.detach()[places] == -0.5).all()  # the first step is that of the sign
    assert parameter.count_nonzero() == 4


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_batch_norm_relu(large: torch.device, layout: str) -> None:
    # half of every channel is 1, the other half -1
    shape = (2, 4, BEYOND // 8 + 2)
    if layout == "contiguous":
        x = zeros(*shape, device=large).sub_(1)
        x[:, :, ::2] = 1
    else:
        x = zeros(shape[0], shape[2], 1, shape[1], device=large).sub_(1)
        x[:, ::2] = 1
        x = x.permute(0, 3, 1, 2)
    assert x.numel() > BEYOND
    x.requires_grad_()
    weight = torch.full((4,), 2.0, device=large, requires_grad=True)
    bias = torch.zeros(4, device=large, requires_grad=True)
    y = batch_norm_relu(x, None, None, weight, bias, training=True)
    ends = [*range(5), *range(shape[2] - 5, shape[2])]
    expected = torch.tensor([2.0, 0.0] * 5, dtype=DTYPE, device=large)
    assert (y.detach().flatten(2)[:, :, ends] == expected).all()
    assert y.detach().count_nonzero() == x.numel() // 2
    y.backward(torch.ones((), dtype=DTYPE, device=large).expand_as(y).contiguous())
    assert bias.grad is not None
    assert (bias.grad == x.numel() // 8).all()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, bias.grad, rtol=1e-4, atol=0)  # eps
    assert x.grad is not None
    # z is 2 x; its gradient has the mean and the direction of x taken out: nothing is left
    assert x.grad.flatten(2)[:, :, ends].abs().max() < 1e-2


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_focal_loss(large: torch.device, form: str) -> None:
    rows, classes = BEYOND // 1024 + 1, 1024
    logits = zeros(rows, classes, device=large)
    labels = torch.zeros(rows, dtype=torch.int64, device=large)
    logits[-1, :3] = torch.tensor([1.0, 2.0, 3.0])
    labels[-1] = 2
    last, label = logits[-1:].clone().requires_grad_(), labels[-1:]
    logits.requires_grad_()

    def loss_of(some: Tensor, target: Tensor) -> Tensor:
        if form == "sigmoid":
            loss: Tensor = sigmoid_focal_loss(some, target, reduction="sum")
        else:
            loss = focal_loss(some, target, reduction="sum")
        return loss

    loss = loss_of(logits, labels)
    loss.backward()
    loss_of(last, label).backward()
    assert logits.grad is not None
    assert last.grad is not None
    assert torch.equal(logits.grad[-1:], last.grad)
    assert (logits.grad[-2] == logits.grad[0]).all()
    some = loss_of(logits.detach()[:1024], labels[:1024])
    torch.testing.assert_close(
        loss.detach() / some, some.new_tensor(rows / 1024), rtol=1e-2, atol=0
    )


def test_statistics(large: torch.device) -> None:
    values = zeros(BEYOND + 9, device=large)
    values[0], values[-1], values[-2], values[-3] = -3.0, 5.0, float("nan"), float("inf")
    statistics = fastremedy.stats.Statistics(device=large)
    statistics.update(values)
    summary = statistics.compute()
    assert summary.count.item() == BEYOND + 7
    assert (summary.nan.item(), summary.positive_inf.item()) == (1, 1)
    assert (summary.min.item(), summary.max.item()) == (-3.0, 5.0)
    assert summary.zeros.item() == pytest.approx((BEYOND + 5) / (BEYOND + 7), rel=1e-12)
    assert summary.mean.item() == pytest.approx(2 / (BEYOND + 7), rel=1e-6)
