"""Memory of large results: reused, never shared, never more than was once in use."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastremedy
from fastremedy import _native
from fastremedy.ops import memory
from fastremedy.ops.memory import BLOCK_BYTES, empty_like

MB = 1 << 20


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setattr(memory, "BLOCK_BYTES", BLOCK_BYTES)
    library = _native.library()
    if library is None:
        pytest.skip("needs the native library")
    fastremedy.empty_cache()
    yield library
    fastremedy.empty_cache()


def floats(megabytes: float) -> Tensor:
    return torch.empty(int(megabytes * MB) // 4)


def test_released_memory_is_used_again() -> None:
    like = floats(4)
    first = empty_like(like)
    address = first.data_ptr()
    second = empty_like(like)
    assert second.data_ptr() != address
    del first
    assert empty_like(like).data_ptr() == address


@pytest.mark.parametrize(("next_mb", "is_reused"), [(8, True), (6.5, True), (6, False), (9, False)])
def test_a_block_serves_a_little_less_than_its_size(next_mb: float, is_reused: bool) -> None:
    empty_like(floats(8)).fill_(7)
    tensor = empty_like(floats(next_mb))  # the operating system clears what it maps
    assert (tensor[0] == 7) == is_reused


def test_the_smallest_block_that_fits_is_taken() -> None:
    tensors = {size: empty_like(floats(size)) for size in (10, 8, 9)}
    addresses = {size: tensor.data_ptr() for size, tensor in tensors.items()}
    tensors.clear()
    assert empty_like(floats(8)).data_ptr() == addresses[8]
    assert empty_like(floats(8.5)).data_ptr() == addresses[9]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(2, 40)), max_size=60))
def test_never_more_than_once_in_use(calls: list[tuple[bool, int]]) -> None:
    native = _native.library()
    assert native is not None
    native.empty_cache()
    live: list[tuple[Tensor, int]] = []
    peak = 0
    for allocates, size in calls:
        if allocates:
            live.append((empty_like(floats(size)), size * MB))
        elif live:
            live.pop(size % len(live))
        used = sum(num_bytes for _, num_bytes in live)
        peak = max(peak, used)
        # A block may be a quarter larger than the tensor that lies in it.
        assert used + native.cached_bytes() <= peak * 1.25
    live.clear()
    native.empty_cache()
    assert native.cached_bytes() == 0


def test_a_view_keeps_the_memory() -> None:
    like = floats(4)
    result = empty_like(like).fill_(1)
    view = result[5:9]
    del result
    others = [empty_like(like).fill_(2) for _ in range(3)]
    assert view.tolist() == [1] * 4
    assert len({t.untyped_storage().data_ptr() for t in (view, *others)}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_a_tensor_like_any_other(dtype: torch.dtype, layout: torch.memory_format) -> None:
    like = torch.empty(3, 8, 300, 301, dtype=dtype).contiguous(memory_format=layout)
    result = empty_like(like)
    assert (result.shape, result.stride(), result.dtype) == (like.shape, like.stride(), dtype)
    assert not result.requires_grad
    assert result.data_ptr() % BLOCK_BYTES == 0
    result.fill_(3)
    assert (pickle.loads(pickle.dumps(result)) == 3).all()
    assert (result.share_memory_() == 3).all()
    with torch.inference_mode():
        assert empty_like(like).is_inference()


@pytest.mark.parametrize("view", ["sliced", "expanded", "transposed"])
def test_views_have_results_without_gaps(view: str) -> None:
    like = torch.empty(2000, 1000)
    like = {
        "sliced": like[:, :700],
        "expanded": like[:1].expand(2000, 1000),
        "transposed": like.t(),
    }[view]
    result = empty_like(like)
    assert result.stride() == torch.empty_like(like).stride()
    assert result.untyped_storage().nbytes() == like.numel() * 4
    result.fill_(1)


def test_small_ones_are_torchs_own() -> None:
    assert empty_like(floats(1)).untyped_storage().resizable()
    assert not empty_like(floats(2)).untyped_storage().resizable()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "library", lambda: None)
    assert empty_like(floats(4)).untyped_storage().resizable()
    fastremedy.empty_cache()


def test_training_steps_use_the_memory_of_the_step_before(native: ModuleType) -> None:
    norm = fastremedy.nn.BatchNormReLU2d(16)
    x = torch.randn(8, 16, 80, 80, requires_grad=True)

    def step() -> tuple[int, int]:
        x.grad = None
        output = norm(x)
        output.backward(torch.ones_like(output))
        assert x.grad is not None
        return output.data_ptr(), x.grad.data_ptr()

    step()
    held = native.cached_bytes()  # of the output; the gradient is in use
    assert held == x.nbytes
    addresses = set(step())
    for _ in range(3):
        assert set(step()) == addresses
    assert native.cached_bytes() == held


def test_results_that_are_kept_stay_as_they_are() -> None:
    norm = fastremedy.nn.BatchNormReLU2d(16).eval()
    inputs = [torch.full((8, 16, 80, 80), float(i)) for i in range(4)]
    with torch.no_grad():
        outputs = [norm(x) for x in inputs]
    for i, output in enumerate(outputs):
        torch.testing.assert_close(output, inputs[i] / (1 + norm.eps) ** 0.5)


def test_threads() -> None:
    failures: list[str] = []
    like = torch.empty(BLOCK_BYTES // 4)

    def work(number: int) -> None:
        weight = torch.ones(1, requires_grad=True)
        for i in range(200):
            weight.grad = None
            # The engine lets go of the factors without holding Python's lock.
            factors = [empty_like(like)[:1].fill_(number) for _ in range(40)]
            products = torch.stack([weight * factor for factor in factors])
            factors.clear()
            products.sum().backward()
            assert weight.grad is not None
            if weight.grad.item() != 40 * number:
                failures.append(f"thread {number}, round {i}: {weight.grad.item()}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


FORK = """
import os, sys, threading, torch, fastremedy
from fastremedy.ops.memory import empty_like
torch.set_num_threads(1)
like = torch.empty(1 << 20)
stop = threading.Event()
def hammer():
    while not stop.is_set():
        empty_like(like)
threads = [threading.Thread(target=hammer) for _ in range(2)]
for thread in threads: thread.start()
for _ in range(40):
    child = os.fork()
    if child == 0:
        ok = all(bool((empty_like(like).fill_(i)[::512] == i).all()) for i in range(3))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads: thread.join()
"""


def test_a_fork_while_others_allocate() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], check=True, timeout=100)


NO_MEMORY = """
import re, resource, torch
from fastremedy.ops.memory import empty_like
like = torch.empty(64 << 20)
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) << 10
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
try:
    empty_like(like)
except RuntimeError as error:
    assert "allocate" in str(error), error
else:
    raise AssertionError("there was memory")
assert empty_like(like[: 1 << 20]).fill_(3)[-1] == 3
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux' /proc")
def test_no_memory_left_is_torchs_error() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", NO_MEMORY], check=True, timeout=100)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux' /proc")
def test_what_waits_long_is_the_systems_to_take() -> None:
    def lazily_free() -> int:
        text = Path(f"/proc/{os.getpid()}/smaps").read_text()
        return sum(map(int, re.findall(r"LazyFree: +(\d+) kB", text))) << 10

    before = lazily_free()
    old = empty_like(floats(8)).fill_(1)
    address = old.data_ptr()
    newer = [empty_like(floats(64)) for _ in range(17)]  # more than kHeldBytes; never touched
    del old
    assert lazily_free() == before
    newer.clear()
    assert lazily_free() - before >= 8 * MB
    again = empty_like(floats(8)).fill_(2)
    assert again.data_ptr() == address
    assert (again == 2).all()
