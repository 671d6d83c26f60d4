# mypy: allow-untyped-defs, allow-incomplete-defs
"""Statistics of an update: ``UpdateStats`` of ``csrc/core/adamw.h`` in Triton.

The update adds them up for each chunk while it has the elements in registers. A lane adds what its
thread has loaded, in float64: the squares of float32 gradients must not overflow, and a thread adds
so few that memory stays the bound. Everything is added in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .multi_tensor import NARROW_BLOCK

LANES = NARROW_BLOCK  # one for each thread
NUM_UPDATE_STATS = tl.constexpr(5)  # grad_sq, weight_sq, update_sq, moved, stuck
STUCK = tl.constexpr(1 << 16)  # two counts share an integer: a lane takes 128 elements of a chunk
_PADDED_STATS = tl.constexpr(8)  # blocks have sizes of powers of two


@triton.jit
def no_update_stats():
    """Return the sums of nothing."""
    square = tl.zeros((LANES,), tl.float64)
    return square, square, square, tl.zeros((LANES,), tl.int32)


@triton.jit
def _to_lanes(value):
    """Add the elements that one thread has loaded, so that accumulators take few registers."""
    return tl.sum(tl.reshape(value, (LANES, value.numel // LANES)), 1)


@triton.jit
def add_update(sums, grad, before, after, mask):
    """Add a block of elements: gradients in memory, values before and after the step."""
    grad_sq, weight_sq, update_sq, counts = sums
    if mask is not None:
        grad = tl.where(mask, grad, 0.0)
        before = tl.where(mask, before, 0.0)
        after = tl.where(mask, after, 0.0)
    stays = after == before  # NaN counts as moved
    counts += _to_lanes(tl.where(stays, tl.where(grad != 0.0, STUCK, 0), 1))
    grad = grad.to(tl.float64)
    before = before.to(tl.float64)
    change = after.to(tl.float64) - before
    grad_sq += _to_lanes(grad * grad)
    weight_sq += _to_lanes(before * before)
    update_sq += _to_lanes(change * change)
    return grad_sq, weight_sq, update_sq, counts


@triton.jit
def store_update_stats(out_ptr, sums):
    """Write the sums over all lanes."""
    grad_sq, weight_sq, update_sq, counts = sums
    moved, stuck = counts % STUCK, counts // STUCK
    stats = (grad_sq, weight_sq, update_sq, moved, stuck)
    for i in tl.static_range(NUM_UPDATE_STATS):
        tl.store(out_ptr + i, tl.sum(stats[i], 0).to(tl.float64))


@triton.jit(
    do_not_specialize_on_alignment=[
        "first_chunks_ptr",
        "sizes_ptr",
        "grads_ptr",
        "order_ptr",
        "update_stats_ptr",
    ],
)
def finish_update_stats_kernel(
    first_chunks_ptr,
    sizes_ptr,
    grads_ptr,  # addresses, 0 where there is no gradient
    order_ptr,  # the caller's number of each row
    partials_ptr,  # [num_chunks, NUM_UPDATE_STATS]
    skipped_ptr,  # None: never skip
    update_stats_ptr,  # [num_rows, NUM_UPDATE_STATS], in the caller's order
    CHUNK: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
):
    """Add the chunks of each row that has a gradient, unless the step is skipped."""
    row = tl.program_id(0)
    runs = tl.load(grads_ptr + row) != 0
    if skipped_ptr is not None:
        runs = runs & (tl.load(skipped_ptr) == 0)
    if runs:
        first_ptr = partials_ptr + tl.load(first_chunks_ptr + row) * NUM_UPDATE_STATS
        num_chunks = tl.cdiv(tl.load(sizes_ptr + row), CHUNK).to(tl.int32)
        stats = tl.arange(0, _PADDED_STATS)
        is_stat = stats < NUM_UPDATE_STATS
        total = tl.zeros((CHUNKS_BLOCK, _PADDED_STATS), tl.float64)
        for start in range(0, num_chunks, CHUNKS_BLOCK):
            chunks = start + tl.arange(0, CHUNKS_BLOCK)
            mask = (chunks < num_chunks)[:, None] & is_stat[None, :]
            elements = chunks[:, None] * NUM_UPDATE_STATS + stats[None, :]
            total += tl.load(first_ptr + elements, mask=mask, other=0.0)
        out_ptr = update_stats_ptr + tl.load(order_ptr + row) * NUM_UPDATE_STATS
        tl.store(out_ptr + stats, tl.sum(total, 0), mask=is_stat)
