# mypy: allow-untyped-defs, allow-incomplete-defs
"""Many tensors in one launch: rows of addresses and sizes, and how they reach the device.

The elements of each tensor are cut into chunks. One program takes one chunk, and finds its tensor
by binary search in the numbers of the tensors' first chunks.
"""

from __future__ import annotations

import functools
import itertools
import struct
from collections.abc import Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

# One program reads 64 KiB of a float32 tensor: enough to hide the search for it, little enough to
# spread 10 M elements over all multiprocessors several times.
CHUNK = 16384

TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

Key = TypeVar("Key", bound=Hashable)


@triton.jit
def locate_chunk(first_chunks_ptr, sizes_ptr, chunk, first_row, end_row, CHUNK: tl.constexpr):
    """Return the row of a chunk, the chunk's first element and its number of elements.

    It is the last row whose first chunk is not after this one: an empty tensor has the number of
    its successor.
    """
    row = first_row
    end = end_row
    while end - row > 1:
        middle = (row + end) // 2
        is_before = tl.load(first_chunks_ptr + middle) <= chunk
        row = tl.where(is_before, middle, row)
        end = tl.where(is_before, end, middle)
    begin = (chunk - tl.load(first_chunks_ptr + row)).to(tl.int64) * CHUNK
    count = tl.minimum(tl.load(sizes_ptr + row) - begin, CHUNK).to(tl.int32)
    return row, begin, count


class Run(NamedTuple):
    """Consecutive rows that one launch takes."""

    first_row: int
    end_row: int
    first_chunk: int
    num_chunks: int


def first_chunks(sizes: Sequence[int]) -> list[int]:
    """Return the number of each tensor's first chunk, and last how many chunks there are."""
    return list(itertools.accumulate((triton.cdiv(size, CHUNK) for size in sizes), initial=0))


def split_runs(keys: Sequence[Key], starts: Sequence[int]) -> list[tuple[Key, Run]]:
    """Cut rows where the key changes; ``starts`` comes from :func:`first_chunks`."""
    runs = []
    row = 0
    for key, group in itertools.groupby(keys):
        end = row + len(list(group))
        if starts[end] > starts[row]:
            runs.append((key, Run(row, end, starts[row], starts[end] - starts[row])))
        row = end
    return runs


# --- 64-bit words from the host to the device ---

_WORDS_PER_LAUNCH = 64


def float_words(*values: float) -> list[int]:
    """Return the bits of float64 values."""
    return list(struct.unpack(f"{len(values)}q", struct.pack(f"{len(values)}d", *values)))


@triton.jit(do_not_specialize=["words"])
def _store_words_kernel(out_ptr, words):
    for i in tl.static_range(len(words)):
        tl.store(out_ptr + i, words[i])


def upload(words: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 words on the device, without waiting for it.

    Inside a graph capture the words travel as kernel arguments, so that a replay never reads host
    memory that has changed since, into memory that lives as long as the graph.
    """
    if torch.cuda.is_current_stream_capturing():
        return _upload_as_arguments(words, device)
    if device.type == "cuda":
        _load_upload_kernel(device)
    return torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)


@functools.cache
def _load_upload_kernel(device: torch.device) -> None:
    # A kernel cannot be loaded while a stream is capturing.
    _upload_as_arguments([0], device)


def _upload_as_arguments(words: Sequence[int], device: torch.device) -> Tensor:
    num_launches = triton.cdiv(len(words), _WORDS_PER_LAUNCH)
    out = torch.empty(num_launches * _WORDS_PER_LAUNCH, dtype=torch.int64, device=device)
    padded = [*words, *[0] * (out.numel() - len(words))]
    # As int32 halves, since Triton would compile a kernel for every pattern of int32 and int64.
    halves = struct.unpack(f"{2 * len(padded)}i", struct.pack(f"{len(padded)}q", *padded))
    target = out.view(torch.int32)
    for start in range(0, len(halves), 2 * _WORDS_PER_LAUNCH):
        part = halves[start : start + 2 * _WORDS_PER_LAUNCH]
        _store_words_kernel[(1,)](target[start:], part, num_warps=1)
    return out[: len(words)]
