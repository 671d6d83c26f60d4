"""The Triton kernels themselves, on a GPU or interpreted: rounding, chunks and norms."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from fastremedy.triton_kernels import clip_grad_norm, multi_tensor, rounding  # noqa: E402

from fastremedy.ops import adamw as definition  # noqa: E402

from .reference import (  # noqa: E402
    FLOATS,
    HALVES,
    UNIT_ROUNDOFF,
    assert_close_to_reference,
    assert_same_bits,
    clip_reference,
    clip_with_torch,
)

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SIZES = (0, 1, 7, 127, 129, 1023, 1024, 1025)  # around the narrow and the wide blocks
NORM_TYPES = (2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, 0.5, -1.0)


def make_views(sizes: Sequence[int], dtype: torch.dtype, offset: int) -> list[Tensor]:
    """Return views of larger buffers; those with offset 1 are not aligned to 16 bytes."""
    buffers = [torch.randn(offset + size, device=DEVICE).to(dtype) for size in sizes]
    return [buffer[offset:] for buffer in buffers]


# --- rounding ---


@triton.jit
def _round_kernel(
    value_ptr, noise_ptr, nearest_ptr, stochastic_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(value_ptr + offsets)
    noise = tl.load(noise_ptr + offsets).to(tl.uint32)
    tl.store(nearest_ptr + offsets, rounding.round_nearest(value, DTYPE))
    tl.store(stochastic_ptr + offsets, rounding.round_stochastic(value, noise, DTYPE))


@triton.jit
def _noise_kernel(out_ptr, words_ptr, stream, step, BLOCK: tl.constexpr):
    seed = tl.load(words_ptr)
    key = rounding.noise_key(seed, stream.to(tl.uint32), step.to(tl.uint32))
    offsets = tl.arange(0, BLOCK)
    noise = rounding.noise_bits(key, tl.load(words_ptr + 1), offsets)
    tl.store(out_ptr + offsets, noise.to(tl.int64))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_to_a_half_has_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, limits.max, -limits.max, limits.max * 1.001, limits.tiny, limits.tiny / 3]
    special += [math.inf, -math.inf, math.nan, 65519.99, 65520.0, 3.4028234e38, 1e-45, 2.0**-25]
    bits = torch.randint(-(2**31), 2**31, (2**16,), dtype=torch.int64).to(torch.int32)
    near_one = torch.randn(2**14)
    subnormal = torch.randn(2**14) * 2.0**-16  # of float16
    value = torch.cat([torch.tensor(special), bits.view(torch.float32), near_one, subnormal])
    value = value[: value.numel() // 1024 * 1024].to(DEVICE)
    noise = torch.randint(0, 2**32, value.shape, dtype=torch.int64).to(DEVICE)
    noise[::3] = 0xFFFFFFFF  # the carry that reaches furthest
    nearest, stochastic = (torch.empty_like(value, dtype=dtype) for _ in range(2))
    _round_kernel[(value.numel() // 1024,)](
        value, noise, nearest, stochastic, DTYPE=multi_tensor.TRITON_DTYPES[dtype], BLOCK=1024
    )
    numbers = ~value.isnan()
    assert_same_bits(nearest[numbers], value.to(dtype)[numbers])
    expected = definition.round_stochastic(value, noise, dtype)
    assert_same_bits(stochastic[numbers], expected[numbers])
    assert nearest[~numbers].isnan().all()
    assert stochastic[~numbers].isnan().all()


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize(("stream", "step"), [(0, 1), (7, 2), (2**31 - 1, 2**24)])
@pytest.mark.parametrize("begin", [0, 512, 2**32 - 512, 2**32, 5 * 2**32 + 1024])
def test_noise_has_the_bits_of_the_definition(
    seed: int, stream: int, step: int, begin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = torch.empty(512, dtype=torch.int64, device=DEVICE)
    words = torch.tensor([seed - 2**64 if seed >= 2**63 else seed, begin], device=DEVICE)
    _noise_kernel[(1,)](out, words, stream, step, BLOCK=512)
    elements = torch.arange(begin, begin + 512, device=DEVICE)
    monkeypatch.setattr(definition, "element_index", lambda like: elements)
    count = torch.tensor(float(step), device=DEVICE)
    assert torch.equal(out, definition.noise_bits(seed, stream, count, out))


# --- chunks and words ---


@triton.jit
def _locate_kernel(starts_ptr, sizes_ptr, out_ptr, first_row, end_row, CHUNK: tl.constexpr):
    chunk = tl.program_id(0)
    row, begin, count = multi_tensor.locate_chunk(
        starts_ptr, sizes_ptr, chunk, first_row, end_row, CHUNK
    )
    tl.store(out_ptr + 3 * chunk, row)
    tl.store(out_ptr + 3 * chunk + 1, begin)
    tl.store(out_ptr + 3 * chunk + 2, count)


@pytest.mark.parametrize(
    "sizes", [[1], [0, 0, 5], [4, 0, 0, 9, 0], [3, 4, 5, 8, 1], [0, 17, 0]], ids=str
)
def test_every_chunk_finds_its_tensor(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_tensor, "CHUNK", 4)
    starts = multi_tensor.first_chunks(sizes)
    out = torch.empty(starts[-1], 3, dtype=torch.int64, device=DEVICE)
    _locate_kernel[(starts[-1],)](
        torch.tensor(starts, device=DEVICE),
        torch.tensor(sizes, device=DEVICE),
        out,
        0,
        len(sizes),
        CHUNK=4,
    )
    expected = [
        [row, begin, min(4, size - begin)]
        for row, size in enumerate(sizes)
        for begin in range(0, size, 4)
    ]
    assert out.tolist() == expected


@triton.jit
def _wide_count_kernel(out_ptr, addresses_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0)
    tl.store(out_ptr + i, multi_tensor.wide_count(count, tl.load(addresses_ptr + i), BLOCK))


def test_only_aligned_blocks_are_wide() -> None:
    addresses = torch.tensor([0, 16, 2**40, 2, 4, 8, 2**40 + 8, 24], device=DEVICE)
    out = torch.empty_like(addresses)
    _wide_count_kernel[(8,)](out, addresses, 100, BLOCK=32)
    assert out.tolist() == [96, 96, 96, 0, 0, 0, 0, 0]


def test_runs_cover_the_rows_of_each_key() -> None:
    chunk = multi_tensor.CHUNK
    starts = multi_tensor.first_chunks([1, chunk, 0, chunk + 1, 0])
    assert starts == [0, 1, 2, 2, 4, 4]
    runs = multi_tensor.split_runs(["a", "a", "b", "c", "c"], starts)
    assert runs == [("a", (0, 2, 0, 2)), ("c", (3, 5, 2, 2))]


def test_words_travel_as_arguments() -> None:
    words = [random.Random(0).randrange(-(2**63), 2**63) for _ in range(150)]
    words += [0, 1, -1, 16, 2**63 - 1, -(2**63), *multi_tensor.float_words(math.nan, -0.0)]
    assert multi_tensor.upload_as_arguments(words, DEVICE).tolist() == words


# --- norm and clipping ---


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_clip(dtype: torch.dtype, norm_type: float, offset: int) -> None:
    grads = make_views(SIZES, dtype, offset)
    copies = [grad.clone() for grad in grads]
    norm64, clipped64 = clip_reference(grads, 0.25, norm_type)
    torch_norm, torch_clipped = clip_with_torch(grads, 0.25, norm_type)
    norm = clip_grad_norm.grad_norm(grads, norm_type)
    assert_close_to_reference(norm, norm64, torch_norm)
    for grad, before in zip(grads, copies, strict=True):
        assert_same_bits(grad, before)
    assert_same_bits(clip_grad_norm.clip_grad_norm_(grads, 0.25, norm_type), norm)
    for grad, reference, by_torch in zip(grads, clipped64, torch_clipped, strict=True):
        assert_close_to_reference(grad, reference, by_torch)


def test_clip_writes_inside_its_views_only() -> None:
    buffer = torch.ones(4096 + 9, device=DEVICE)
    clip_grad_norm.clip_grad_norm_([buffer[3:-5], buffer[-4:-2]], 1.0, 2.0)
    touched = buffer != 1
    assert touched[3:-5].all()
    assert touched[-4:-2].all()
    assert not touched[[0, 1, 2, -5, -2, -1]].any()


def test_mixed_dtypes_and_several_chunks() -> None:
    chunk = multi_tensor.CHUNK
    sizes = (5, chunk - 1, chunk, 0, chunk + 1, 2 * chunk + 3)
    dtypes = [*FLOATS, torch.float32, torch.bfloat16]
    grads = [make_views((n,), dtype, 0)[0] for n, dtype in zip(sizes, dtypes, strict=True)]
    copies = [grad.to(torch.float64, copy=True) for grad in grads]
    norm64, _ = clip_reference(grads, 1.0, 2.0)
    norm = clip_grad_norm.clip_grad_norm_(grads, 1.0, 2.0)
    assert norm.dtype == torch.float64
    # A lane adds a few squares in float32; over all lanes their errors cancel.
    torch.testing.assert_close(norm.cpu(), norm64, rtol=UNIT_ROUNDOFF[torch.float32], atol=0)
    for grad, before in zip(grads, copies, strict=True):
        clipped64 = before / (norm + 1e-6)
        assert_close_to_reference(grad, clipped64, clipped64.to(grad.dtype))


@pytest.mark.parametrize("norm_type", [1.0, 2.0])
@pytest.mark.parametrize("count", [3, 5000])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((torch.float32, v) for v in (1e20, 3e38, 1e-20, 1e-30, 1e-45)),
        *((torch.bfloat16, v) for v in (1e20, 3e38, 1e-30)),
        *((torch.float16, v) for v in (6e4, 6e-8)),
        (torch.float64, 1e100),
    ],
    ids=str,
)
def test_sums_do_not_overflow_or_underflow(
    dtype: torch.dtype, value: float, count: int, norm_type: float
) -> None:
    grad = torch.full((count,), value, dtype=dtype, device=DEVICE)
    norm64 = grad[0].double().cpu() * count ** (1 / norm_type)
    norm = clip_grad_norm.grad_norm([grad], norm_type)
    assert_close_to_reference(norm, norm64, norm64.to(norm.dtype))


@pytest.mark.parametrize("position", [0, 1500, 4999], ids=["first", "inside", "tail"])
@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_nan_and_infinity_pass(dtype: torch.dtype, norm_type: float, position: int) -> None:
    for values in ([math.nan], [math.inf], [-math.inf], [math.nan, math.inf]):
        grad = torch.ones(5000, device=DEVICE).to(dtype)
        for i, value in enumerate(values):
            grad[(position + 17 * i) % 5000] = value
        norm64, _ = clip_reference([grad], math.inf, norm_type)
        norm = clip_grad_norm.grad_norm([torch.ones_like(grad), grad], norm_type)
        if norm64.isfinite():
            assert norm.isfinite()
        else:
            torch.testing.assert_close(norm.cpu().double(), norm64, equal_nan=True)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_nothing_has_norm_zero(norm_type: float) -> None:
    empty = torch.empty(0, 3, device=DEVICE)
    assert clip_grad_norm.clip_grad_norm_([empty, empty], 1.0, norm_type).item() == 0
