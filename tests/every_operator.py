"""Run every operator once, as a user would: ``python -I tests/every_operator.py [BACKEND]``.

It imports the fastremedy that is installed, prints where that is and says so if another backend
than the given one runs.
"""

from __future__ import annotations

import math
import sys

import torch

import fastremedy
from fastremedy import backends


def check_backends(expected: str | None) -> None:
    for stem in backends.STEMS:
        backend = fastremedy.warmup(stem, "cpu")[stem].backend
        assert expected in (None, backend), f"{stem} runs {backend}, expected {expected}"


def train() -> None:
    """Take steps in which every module, the optimizer, the scaler and a monitor have their part."""
    torch.manual_seed(0)
    norm = fastremedy.nn.BatchNormReLU2d(8)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4)
    )
    optimizer = fastremedy.optim.AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    scaler = fastremedy.amp.GradScaler("cpu", init_scale=256.0)
    softmax, sigmoid = fastremedy.nn.FocalLoss(), fastremedy.nn.SigmoidFocalLoss(reduction="mean")
    images, labels = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))
    losses = []
    with fastremedy.stats.Monitor(model, every=2) as monitor:
        for _ in range(6):
            logits = model(images)
            loss = softmax(logits, labels) + sigmoid(logits, labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    assert optimizer.num_skipped == 0
    assert monitor.to_dict()["steps"] == [0, 2, 4]


def clip() -> None:
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert math.isclose(fastremedy.clip_(param, 1.0).item(), 5.0, rel_tol=1e-5)
    assert math.isclose(param.grad.norm().item(), 1.0, rel_tol=1e-5)


def count() -> None:
    statistics = fastremedy.stats.Statistics()
    statistics.update(torch.tensor([1.0, 2.0, 3.0, math.nan]))
    summary = statistics.compute()
    assert (summary.mean.item(), summary.nan.item()) == (2.0, 1)


def main() -> None:
    check_backends(sys.argv[1] if len(sys.argv) > 1 else None)
    train()
    clip()
    count()
    print(fastremedy.__file__)


main()
