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

NUM_WARPS = 4
NUM_THREADS = 32 * NUM_WARPS
NARROW_BLOCK = tl.constexpr(NUM_THREADS)  # elements of an iteration that cannot use wide accesses
# Left to itself, ptxas spills a few registers to fit one more block on a multiprocessor. The bound
# is above what any kernel needs; AMD's compiler has no such option.
LAUNCH_OPTIONS = {"num_warps": NUM_WARPS}
if torch.version.hip is None:
    LAUNCH_OPTIONS["maxnreg"] = 128

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


@triton.jit
def aligned_pointer(address, DTYPE: tl.constexpr):
    """Return a pointer that is a multiple of 16 bytes, so that accesses are 16 bytes wide.

    ``tl.multiple_of`` marks the operation that made its argument, wherever else that is used: a
    pointer without the promise must come from another conversion.
    """
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def wide_count(count, addresses, BLOCK: tl.constexpr):
    """Return how many elements full blocks with wide accesses take: none if not all aligned.

    Args:
        count: number of elements.
        addresses: bitwise or of all addresses, each a multiple of 16 where accesses can be wide.
        BLOCK: number of elements of a block.
    """
    return tl.where(addresses % 16 == 0, count // BLOCK * BLOCK, 0)


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


@triton.jit
def _store_pieces_kernel(out_ptr, pieces):
    for i in tl.static_range(len(pieces)):
        tl.store(out_ptr + i, tl.cast(pieces[i], tl.int32).to(tl.int16))


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream_id(device: torch.device) -> int:
    """Return what tells the current stream from others."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


_kept: dict[int, Tensor] = {}


def keep_for_graph(tensor: Tensor) -> None:
    """Keep memory that a captured graph reads: it may be replayed until the process ends."""
    _kept[tensor.data_ptr()] = tensor


def upload(words: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 words on the device, without waiting for it.

    Inside a graph capture the words travel as kernel arguments, so that a replay never reads host
    memory that has changed since, into memory that lives as long as the graph.
    """
    if is_capturing(device):
        return upload_as_arguments(words, device)
    if device.type == "cuda":
        _load_upload_kernel(device)
    return torch.tensor(words, dtype=torch.int64).to(device, non_blocking=True)


@functools.cache
def _load_upload_kernel(device: torch.device) -> None:
    # A kernel cannot be loaded while a stream is capturing.
    upload_as_arguments([0], device)


def upload_as_arguments(words: Sequence[int], device: torch.device) -> Tensor:
    """Return int64 words on the device, sent as arguments of kernels."""
    num_launches = triton.cdiv(len(words), _WORDS_PER_LAUNCH)
    out = torch.empty(num_launches * _WORDS_PER_LAUNCH, dtype=torch.int64, device=device)
    padded = [*words, *[0] * (out.numel() - len(words))]
    # Pieces of 16 bits as floats: Triton compiles integers again for values 1, 16, 2**32 and so on.
    pieces = struct.unpack(f"{4 * len(padded)}H", struct.pack(f"{len(padded)}q", *padded))
    target = out.view(torch.int16)
    for start in range(0, len(pieces), 4 * _WORDS_PER_LAUNCH):
        part = tuple(map(float, pieces[start : start + 4 * _WORDS_PER_LAUNCH]))
        _store_pieces_kernel[(1,)](target[start:], part, num_warps=1)
    return out[: len(words)]
