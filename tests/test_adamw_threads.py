"""Optimizers in threads: every thread with its own, and one that all threads step."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import fastremedy

from .reference import assert_same_bits
from .training import copy_params, make_grads, make_params, set_grads


def test_threads_with_models_of_their_own(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter keeps its grid in a global variable")
    results: dict[int, list[Tensor]] = {}
    expected: dict[int, list[Tensor]] = {}
    originals = [make_params([(500,), (3, 7)], device=device) for _ in range(2)]
    grads = [make_grads(params, 5) for params in originals]

    def work(i: int, into: dict[int, list[Tensor]]) -> None:
        params = copy_params(originals[i])
        optimizer = fastremedy.optim.AdamW(params, max_grad_norm=1.0)
        for of_step in grads[i]:
            set_grads(params, of_step)
            fastremedy.clip_(params, 0.9)
            optimizer.step()
        into[i] = params

    for i in range(2):
        work(i, expected)
    threads = [threading.Thread(target=work, args=(i, results)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        for actual, wanted in zip(results[i], expected[i], strict=True):
            assert_same_bits(actual.detach(), wanted.detach())


def test_threads_that_share_an_optimizer(backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter keeps its grid in a global variable")
    params = make_params([(500,), (3, 7)], device=device)
    alone = copy_params(params)
    shared, expected = (fastremedy.optim.AdamW(p, max_grad_norm=1.0) for p in (params, alone))
    grads = make_grads(params, 1)[0]
    set_grads(params, grads)
    set_grads(alone, grads)

    def work() -> None:
        for _ in range(10):
            shared.step()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(40):
        expected.step()
    assert shared.state[params[0]]["step"].item() == 40
    for actual, wanted in zip(params, alone, strict=True):
        assert_same_bits(actual.detach(), wanted.detach())
