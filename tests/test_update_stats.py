"""What an update did to each parameter, and the norm of each gradient, from every backend."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastremedy
from fastremedy.ops import dispatch
from fastremedy.ops.adamw import ROUNDINGS, UPDATE_STATS, Options
from fastremedy.ops.table import make_table
from fastremedy.optim.rows import RESIDUAL_KEYS, init_state, make_rows

from .reference import (
    FLOATS,
    HALVES,
    assert_norm_close,
    assert_same_bits,
    clip_reference,
    clip_with_torch,
    everything_in,
    with_grads,
)
from .training import copy_params, params_of

SIZES = (0, 1, 127, 1025)  # around the blocks of all kernels
FORMS = [
    *((dtype, "nearest") for dtype in (torch.float32, torch.float64)),
    *((dtype, rounding) for dtype in HALVES for rounding in ROUNDINGS),
]

# With these the update is lr * sign(gradient), and nothing where the gradient is zero.
EXACT: dict[str, Any] = {"betas": (0.0, 0.0), "eps": 1e-30, "weight_decay": 0.0}


def chunk_size(backend: str) -> int:
    """Return how many elements the kernels of a backend add before they combine partials."""
    return 65536 if backend == "cuda" else 16384


def make_views(
    sizes: Sequence[int], dtype: torch.dtype, device: torch.device, offset: int = 0
) -> list[Tensor]:
    """Return random views of larger buffers; those with offset 1 are not aligned to 16 bytes."""
    buffers = [torch.randn(offset + size, device=device).to(dtype) for size in sizes]
    return [buffer[offset:] for buffer in buffers]


def make_optimizer(params: Sequence[Any], rounding: str, **options: Any) -> torch.optim.Optimizer:
    """Return an optimizer whose parameters all have state, with or without gradient."""
    optimizer = fastremedy.optim.AdamW(params, **options)
    pairs = [(p, g["amsgrad"]) for g in optimizer.param_groups for p in g["params"]]
    init_state(pairs, optimizer.state, torch.float32 if rounding == "master" else None)
    return optimizer


def step(
    optimizer: torch.optim.Optimizer,
    grads: Sequence[Tensor | None],
    options: Options,
    measures: bool = True,
) -> Tensor:
    """Step once; return the statistics on the CPU, NaN in rows that were not written."""
    params = params_of(optimizer)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    device = params[0].device
    backend = fastremedy.backends.active("adamw", device)
    rows = make_rows(optimizer.param_groups, optimizer.state, device, options.rounding)
    table = make_table(backend, rows, optimizer.param_groups, optimizer.state)
    assert table.gather(optimizer.param_groups, optimizer.state) == []
    size = (len(params), len(UPDATE_STATS))
    stats = torch.full(size, math.nan, dtype=torch.float64, device=device)
    num_skipped = torch.zeros((), dtype=torch.int64, device=device)
    with torch.no_grad():
        table.step(options, num_skipped, stats if measures else None)
    return stats.cpu()


def values_of(optimizer: torch.optim.Optimizer, rounding: str) -> list[Tensor]:
    """Return in float64 what the next step would read of the parameters."""
    values = []
    for param in params_of(optimizer):
        stored = param.detach().cpu()
        value = stored.to(torch.float64, copy=True)
        if rounding in RESIDUAL_KEYS and stored.dtype in HALVES:
            residual = optimizer.state[param].get(RESIDUAL_KEYS[rounding])
            if residual is not None and rounding == "kahan":
                value = (stored.float() + residual.cpu().float()).double()
            elif residual is not None:
                assert_same_bits(residual.cpu().to(stored.dtype), stored)  # never stale here
                value = residual.cpu().double()
        values.append(value)
    return values


def sums_of(grad: Tensor, before: Tensor, after: Tensor) -> tuple[list[float], list[int]]:
    """Return the sums of squares and the counts of one parameter."""
    grad = grad.detach().cpu().double()
    moved = ~(after == before)
    squares = [(values * values).sum().item() for values in (grad, before, after - before)]
    return squares, [int(moved.sum()), int((~moved & ~(grad == 0)).sum())]


def assert_step_is_measured(
    optimizer: torch.optim.Optimizer, grads: Sequence[Tensor | None], options: Options
) -> Tensor:
    """Step once and hold the statistics to the values before and after; return them."""
    copies = [None if grad is None else grad.clone() for grad in grads]
    before = values_of(optimizer, options.rounding)
    stats = step(optimizer, grads, options)
    after = values_of(optimizer, options.rounding)
    for row, grad, *values in zip(stats, copies, before, after, strict=True):
        if grad is None:
            assert row.isnan().all()
            assert torch.equal(*values)
            continue
        squares, counts = sums_of(grad, *values)
        # Positive terms: n roundings of the sum and three of a term, here and in the reference.
        rtol = 2 * (grad.numel() + 3) * 2.0**-53
        expected = torch.tensor(squares, dtype=torch.float64)
        torch.testing.assert_close(row[:3], expected, rtol=rtol, atol=0, equal_nan=True)
        assert row[3:].tolist() == counts
    return stats


# --- statistics of an update ---


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize(("dtype", "rounding"), FORMS, ids=str)
def test_sums_are_those_of_the_values(
    backend: str, device: torch.device, dtype: torch.dtype, rounding: str, offset: int
) -> None:
    params = [p.requires_grad_() for p in make_views(SIZES, dtype, device, offset)]
    optimizer = make_optimizer(params, rounding, lr=1e-3, weight_decay=0.01)
    for _ in range(2):
        grads = make_views(SIZES, dtype, device, offset)
        for grad in grads:
            grad[::3] = 0
        stats = assert_step_is_measured(optimizer, grads, Options(rounding=rounding, seed=7))
        assert stats[0].tolist() == [0, 0, 0, 0, 0]


def test_chunks(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        from fastremedy.triton_kernels import adamw

        monkeypatch.setattr(adamw, "CHUNKS_BLOCK", 2)  # chunks that are added at a time
    chunk = chunk_size(backend)
    sizes = (chunk - 1, 5, chunk, chunk + 1, 0, 2 * chunk + 3)
    params = [p.requires_grad_() for p in make_views(sizes, torch.float32, device)]
    optimizer = make_optimizer(params, "nearest")
    assert_step_is_measured(optimizer, make_views(sizes, torch.float32, device), Options())


def test_rows_of_every_dtype_and_without_gradient(backend: str, device: torch.device) -> None:
    dtypes = [*FLOATS, *reversed(FLOATS)]
    params = [
        make_views([3 + 40 * i], dtype, device)[0].requires_grad_()
        for i, dtype in enumerate(dtypes)
    ]
    optimizer = make_optimizer(params, "nearest", amsgrad=True)
    grads: list[Tensor | None] = [torch.randn_like(p) for p in params]
    grads[1] = grads[4] = None
    stats = assert_step_is_measured(optimizer, grads, Options())
    assert stats[:, 3].isnan().tolist() == [grad is None for grad in grads]
    assert step(optimizer, [None] * len(grads), Options()).isnan().all()


def test_strides_do_not_matter(backend: str, device: torch.device) -> None:
    param = torch.randn(6, 9, device=device).t().requires_grad_()
    grad = torch.randn(6, 9, device=device).t()
    assert_step_is_measured(make_optimizer([param], "nearest"), [grad], Options())


def test_groups(backend: str, device: torch.device) -> None:
    params = [torch.full((n,), 8.0, device=device, requires_grad=True) for n in (64, 100)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(params, (0.5, 0.25), strict=True)]
    optimizer = make_optimizer(groups, "nearest", **EXACT)
    grads = [torch.full_like(p, 2.0) for p in params]
    grads[1][:40] = 0
    stats = assert_step_is_measured(optimizer, grads, Options())
    assert stats.tolist() == [
        [64 * 4.0, 64 * 64.0, 64 * 0.25, 64, 0],
        [60 * 4.0, 100 * 64.0, 60 * 0.0625, 60, 0],
    ]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stuck(backend: str, device: torch.device, dtype: torch.dtype, rounding: str) -> None:
    count, lr = 1025, 1e-5  # far below the distance from 1 to the next number
    param = torch.ones(count, dtype=dtype, device=device, requires_grad=True)
    optimizer = make_optimizer([param], rounding, lr=lr, **EXACT)
    grad = torch.ones_like(param)
    grad[:25] = 0
    stats = assert_step_is_measured(optimizer, [grad], Options(rounding=rounding))
    moved, stuck = stats[0, 3:].tolist()
    if rounding == "nearest":
        assert (moved, stuck) == (0, 1000)
        assert stats[0, 2] == 0
    elif rounding == "stochastic":
        assert moved + stuck == 1000
    else:
        assert (moved, stuck) == (1000, 0)
        # The master is rounded to float32, the compensation to a half: relative to 1 and to lr.
        assert stats[0, 2].sqrt().item() == pytest.approx(lr * math.sqrt(1000), rel=2.0**-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20, 3e38, 1e-30, 1e-45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_extreme_gradients(
    backend: str, device: torch.device, dtype: torch.dtype, value: float
) -> None:
    param = torch.randn(1025, device=device).to(dtype).requires_grad_()
    grad = torch.randn_like(param)
    grad[::2] = value
    stats = assert_step_is_measured(make_optimizer([param], "nearest"), [grad], Options())
    if math.isnan(value):
        assert stats[0, [0, 2]].isnan().all()  # NaN counts as moved
        assert stats[0, 3] >= 513
    elif abs(value) < math.inf:
        assert stats[0, :3].isfinite().all()


def test_extreme_parameters(backend: str, device: torch.device) -> None:
    param = torch.tensor([math.inf, -math.inf, math.nan, 3e38, 1.0], device=device)
    grad = torch.ones_like(param)
    optimizer = make_optimizer([param.requires_grad_()], "nearest", lr=0.1, weight_decay=0.0)
    stats = assert_step_is_measured(optimizer, [grad], Options())
    assert stats[0, 3:].tolist() == [2, 3]  # NaN and 1 moved; infinity and 3e38 stay


def test_gradients_are_measured_as_they_are_in_memory(backend: str, device: torch.device) -> None:
    param = torch.ones(100, device=device, requires_grad=True)
    optimizer = make_optimizer([param], "nearest", maximize=True)
    scale = torch.tensor(1024.0, device=device)
    options = Options(max_norm=0.1, grad_scale=scale)
    stats = assert_step_is_measured(optimizer, [torch.full_like(param, 3.0)], options)
    assert stats[0, 0] == 900


@pytest.mark.parametrize("cause", ["nan", "inf", "found_inf"])
def test_a_skipped_step_writes_nothing(backend: str, device: torch.device, cause: str) -> None:
    sizes = (0, 5, 1025)
    params = [p.requires_grad_() for p in make_views(sizes, torch.float32, device)]
    optimizer = make_optimizer(params, "nearest")
    found_inf = torch.zeros((), device=device)
    options = Options(skip_nonfinite=cause != "found_inf", found_inf=found_inf)
    assert_step_is_measured(optimizer, make_views(sizes, torch.float32, device), options)
    grads = make_views(sizes, torch.float32, device)
    if cause == "found_inf":
        found_inf.fill_(2.0)  # a sum over devices
    else:
        grads[2][1024] = float(cause)
    assert step(optimizer, grads, options).isnan().all()


@pytest.mark.parametrize(("dtype", "rounding"), FORMS, ids=str)
def test_the_same_bits_with_and_without_and_again(
    backend: str, device: torch.device, dtype: torch.dtype, rounding: str
) -> None:
    sizes = (1025, 127, 2050)
    params = [p.requires_grad_() for p in make_views(sizes, dtype, device)]
    grads = [make_views(sizes, dtype, device) for _ in range(2)]
    options = Options(max_norm=0.5, rounding=rounding, seed=11)
    runs = []
    for measures in (True, True, False):
        optimizer = make_optimizer(copy_params(params), rounding, lr=0.01, amsgrad=True)
        stats = [step(optimizer, copy.deepcopy(g), options, measures) for g in grads]
        runs.append((stats, everything_in(optimizer)))
    (stats, after), (stats_again, _), (_, after_unmeasured) = runs
    for first, second in zip(stats, stats_again, strict=True):
        assert_same_bits(first, second)
    assert after.keys() == after_unmeasured.keys()
    for name, value in after.items():
        other = after_unmeasured[name]
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            assert_same_bits(value, other)


# --- norms of gradients ---


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Let torch fill new memory with NaN: what nobody writes is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def clip_observed(
    tensors: list[Tensor], max_norm: float, norm_type: float, from_grad: bool = False
) -> tuple[Tensor, Tensor]:
    """Clip; return the norm of all gradients and those of each."""
    seen: list[Tensor] = []
    total = dispatch.clip_grad_norm_(
        tensors, max_norm, norm_type, from_grad=from_grad, observe=seen.append
    )
    (norms,) = seen
    assert norms.dtype == torch.float64
    return total, norms


def assert_norms(norms: Tensor, grads: Sequence[Tensor], norm_type: float) -> None:
    """Hold each norm to that of its gradient."""
    assert norms.shape == (len(grads),)
    for norm, grad in zip(norms, grads, strict=True):
        if grad.numel() == 0:
            assert norm.item() == 0
            continue
        norm64, _ = clip_reference([grad], math.inf, norm_type)
        if norm_type == 2.0:  # torch's own is off by 69 rounding units for 65535 elements
            norm64 = grad.abs().cpu().double().square().sum().sqrt()
        torch_norm, _ = clip_with_torch([grad], math.inf, norm_type)
        assert_norm_close(norm, norm64, torch_norm, [grad])


@pytest.mark.parametrize("max_norm", [0.25, 1e6, math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, -math.inf, 0.0, 3.0, -1.0])
def test_norms_of_every_dtype(
    backend: str, device: torch.device, poisoned_memory: None, norm_type: float, max_norm: float
) -> None:
    sizes = (0, 1, 129, 1025)
    grads: list[Tensor] = []
    plain: list[Tensor] = []  # the same values at the same offsets
    for i, dtype in enumerate([*FLOATS, *FLOATS]):
        for column in (grads, plain):
            torch.manual_seed(i)
            column += make_views(sizes[i % 2 :: 2], dtype, device, offset=i // 4)
    copies = [grad.clone() for grad in grads]
    total, norms = clip_observed(grads, max_norm, norm_type)
    assert_norms(norms, copies, norm_type)  # before clipping
    assert_same_bits(total, dispatch.clip_grad_norm_(plain, max_norm, norm_type, from_grad=False))
    for grad, expected in zip(grads, plain, strict=True):
        assert_same_bits(grad, expected)


def test_norms_of_several_chunks(backend: str, device: torch.device) -> None:
    chunk = chunk_size(backend)
    sizes = (5, chunk - 1, chunk, 0, chunk + 1, 2 * chunk + 3)
    dtypes = [*FLOATS, torch.float32, torch.bfloat16]
    grads = [make_views([n], dtype, device)[0] for n, dtype in zip(sizes, dtypes, strict=True)]
    _, norms = clip_observed(grads, math.inf, 2.0)
    assert_norms(norms, grads, 2.0)
    _, again = clip_observed(grads, math.inf, 2.0)
    assert_same_bits(norms, again)


def test_norms_of_those_that_have_a_gradient(backend: str, device: torch.device) -> None:
    grads = make_views((7, 0, 130), torch.float32, device)
    params = with_grads(grads)
    params[1:1] = [torch.ones(3, device=device, requires_grad=True)]
    _, norms = clip_observed(params, math.inf, 2.0, from_grad=True)
    assert_norms(norms, grads, 2.0)
    _, norms = clip_observed(params[2:3], 1.0, 2.0, from_grad=True)
    assert norms.tolist() == [0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20, 3e38, 1e-30])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_norms_of_extreme_gradients(
    backend: str, device: torch.device, norm_type: float, value: float
) -> None:
    grads = make_views((5, 1025, 9), torch.float32, device)
    grads[1].fill_(value)
    _, norms = clip_observed(grads, math.inf, norm_type)
    assert_norms(norms[::2], grads[::2], norm_type)
    expected = value * math.sqrt(1025) if norm_type == 2.0 else value
    # 2^-20: float32 squares of a few hundred elements, each rounded once.
    torch.testing.assert_close(norms[1].item(), expected, rtol=2.0**-20, atol=0, equal_nan=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda b: b.view(6, 20).t(),
    "column": lambda b: b.view(6, 20)[:, 3],
    "complex": lambda b: torch.view_as_complex(b.view(60, 2)),
    "negated": lambda b: torch._neg_view(b),
    "the_same_memory": lambda b: b,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_of_layouts(backend: str, device: torch.device, layout: str) -> None:
    buffer = torch.randn(120, device=device)
    grads = [LAYOUTS[layout](buffer), torch.randn(33, device=device)]
    if layout == "the_same_memory":
        grads.append(buffer)
    copies = [grad.clone() for grad in grads]
    _, norms = clip_observed(grads, 0.5, 2.0)
    assert_norms(norms, copies, 2.0)
