"""AdamW in Triton, on a GPU or interpreted: the update, its roundings, what travels per step."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

pytest.importorskip("triton")

from fastremedy.triton_kernels import adamw, multi_tensor  # noqa: E402

from fastremedy.ops import adamw as definition  # noqa: E402
from fastremedy.ops.adamw import Columns, Hyper, Options  # noqa: E402

from .reference import HALVES, assert_close_to_reference, assert_same_bits  # noqa: E402

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
SIZES = (0, 1, 127, 1025)  # around the narrow and the wide blocks

Steps = list[list[Tensor | None]]

HYPERS = [
    Hyper(0.1, 0.9, 0.999, 1e-8, 0.1, False, False, True),
    Hyper(0.02, 0.6, 0.4, 1e-6, 0.2, True, False, False),
]


def make_columns(
    dtype: torch.dtype,
    state: torch.dtype,
    rounding: str = "nearest",
    amsgrad: bool = False,
    sizes: Sequence[int] = SIZES,
    offset: int = 0,
) -> Columns:
    """Return fresh columns; with offset 1 the parameters are not aligned to 16 bytes."""
    buffers = [torch.randn(offset + size, device=DEVICE).to(dtype) for size in sizes]
    params = [buffer[offset:] for buffer in buffers]

    def zeros(dtype: torch.dtype = state) -> list[Tensor]:
        return [torch.zeros_like(param, dtype=dtype) for param in params]

    residuals: list[Tensor | None] = [None] * len(params)
    if rounding == "kahan":
        residuals = list(zeros(dtype))
    elif rounding == "master":
        residuals = [param.float() for param in params]
    maxima: list[Tensor | None] = list(zeros()) if amsgrad else [None] * len(params)
    steps = [torch.zeros((), device=DEVICE) for _ in params]
    rows = range(len(params))
    return Columns(
        params, zeros(), zeros(), maxima, residuals, steps, [i % 2 for i in rows], [*rows]
    )


def make_steps(columns: Columns, count: int) -> Steps:
    steps: Steps = []
    for _ in range(count):
        steps.append([torch.randn_like(p, dtype=torch.float32).to(p.dtype) for p in columns.params])
    return steps


def widened(columns: Columns, dtype: torch.dtype) -> Columns:
    """Return a copy whose parameters and moments have another dtype."""

    def wide(column: list[Tensor]) -> list[Tensor]:
        return [tensor.to(dtype, copy=True) for tensor in column]

    maxima = [None if m is None else m.to(dtype, copy=True) for m in columns.max_exp_avg_sqs]
    params, exp_avgs, exp_avg_sqs = map(
        wide, (columns.params, columns.exp_avgs, columns.exp_avg_sqs)
    )
    for param, residual in zip(params, columns.residuals, strict=True):
        if residual is not None and residual.dtype != torch.float32:
            param += residual.to(dtype)
    return Columns(
        params,
        exp_avgs,
        exp_avg_sqs,
        maxima,
        [None] * len(params),
        [step.clone() for step in columns.steps],
        columns.groups,
        columns.streams,
    )


def tensors_of(columns: Columns) -> list[Tensor]:
    columns_ = (columns.params, columns.exp_avgs, columns.exp_avg_sqs, columns.max_exp_avg_sqs)
    return [
        t
        for column in (*columns_, columns.residuals, columns.steps)
        for t in column
        if t is not None
    ]


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_update_is_the_definition(dtype: torch.dtype, offset: int, amsgrad: bool) -> None:
    columns = make_columns(dtype, dtype, amsgrad=amsgrad, offset=offset)
    reference, by_torch = widened(columns, torch.float64), copy.deepcopy(columns)
    hypers = [hyper._replace(amsgrad=amsgrad) for hyper in HYPERS]
    options = Options(max_norm=3.0, grad_scale=torch.tensor(8.0, device=DEVICE))
    kernels = adamw.AdamW(columns)
    steps = make_steps(columns, 3)
    steps[1][2] = None
    for grads in steps:
        wide = [None if grad is None else grad.double() for grad in grads]
        norm64 = definition.adamw_(reference, wide, hypers, options).total_norm
        torch_norm = definition.adamw_(by_torch, grads, hypers, options).total_norm
        outcome = kernels.step(grads, hypers, options)
        assert outcome.skipped is None
        assert_close_to_reference(outcome.total_norm, norm64, torch_norm)
    assert [step.item() for step in columns.steps] == [3, 3, 2, 3]
    for actual, expected, other in zip(
        tensors_of(columns), tensors_of(reference), tensors_of(by_torch), strict=True
    ):
        # Moments are differences of gradients, which are of the size 1 / 8.
        assert_close_to_reference(actual, expected, other, scale=1.0)


@pytest.mark.parametrize("rounding", definition.ROUNDINGS)
@pytest.mark.parametrize("state", ["half", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_is_the_float32_update_and_one_rounding(
    dtype: torch.dtype, state: str, rounding: str
) -> None:
    state_dtype = dtype if state == "half" else torch.float32
    columns = make_columns(dtype, state_dtype, rounding)
    kernels = adamw.AdamW(columns)
    options = Options(rounding=rounding, seed=2**63 + 12345)
    for grads in make_steps(columns, 3):
        exact = widened(columns, torch.float32)
        if rounding == "master":
            exact.params = [residual.clone() for residual in columns.residuals]
        adamw.AdamW(exact).step([grad.float() for grad in grads], HYPERS, Options())
        kernels.step(grads, HYPERS, options)
        for row, (param, value) in enumerate(zip(columns.params, exact.params, strict=True)):
            residual = columns.residuals[row]
            if rounding == "stochastic":
                noise = definition.noise_bits(options.seed, row, columns.steps[row], param)
                assert_same_bits(param, definition.round_stochastic(value, noise, dtype))
                assert not torch.equal(param, value.to(dtype)) or param.numel() < 127
            else:
                assert_same_bits(param, value.to(dtype))
            if rounding == "master":
                assert_same_bits(residual, value)
            elif rounding == "kahan":
                assert_same_bits(residual, (value - param.float()).to(dtype))
                assert residual.count_nonzero() > 0 or param.numel() < 127
            assert_same_bits(columns.exp_avgs[row], exact.exp_avgs[row].to(state_dtype))
            assert_same_bits(columns.exp_avg_sqs[row], exact.exp_avg_sqs[row].to(state_dtype))


def test_a_stale_master_gives_way_to_the_parameter() -> None:
    columns = make_columns(torch.bfloat16, torch.float32, "master", sizes=(3,))
    columns.params[0].copy_(torch.tensor([1.0, 2.0, math.nan]))
    columns.residuals[0].copy_(torch.tensor([1.001, 5.0, 1.0]))
    still = [hyper._replace(lr=0.0) for hyper in HYPERS]
    adamw.AdamW(columns).step(make_steps(columns, 1)[0], still, Options(rounding="master"))
    expected = torch.tensor([1.001, 2.0, math.nan], device=DEVICE)
    torch.testing.assert_close(columns.residuals[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cause", ["found_inf", "nan", "inf"])
def test_a_skipped_step_changes_nothing(cause: str) -> None:
    columns = make_columns(torch.float32, torch.bfloat16, amsgrad=True)
    kernels = adamw.AdamW(columns)
    hypers = [hyper._replace(amsgrad=True) for hyper in HYPERS]
    found_inf = torch.zeros(1, device=DEVICE)
    options = Options(skip_nonfinite=cause != "found_inf", found_inf=found_inf)
    first, second, third = make_steps(columns, 3)
    assert not kernels.step(first, hypers, options).skipped
    before = copy.deepcopy(columns)
    if cause == "found_inf":
        found_inf.fill_(2.0)  # a sum over devices
    else:
        second[3][1024] = float(cause)
    assert kernels.step(second, hypers, options).skipped
    for actual, expected in zip(tensors_of(columns), tensors_of(before), strict=True):
        assert_same_bits(actual, expected)
    found_inf.zero_()
    assert not kernels.step(third, hypers, options).skipped
    assert columns.steps[0].item() == 2


def test_gradients_of_other_dtypes_and_tensor_lr() -> None:
    columns = make_columns(torch.bfloat16, torch.float32)
    other = copy.deepcopy(columns)
    lr = torch.tensor(0.1, device=DEVICE)
    kernels, others = adamw.AdamW(columns), adamw.AdamW(other)
    tensor_lr = [HYPERS[0]._replace(lr=lr), HYPERS[1]._replace(lr=torch.tensor(0.02).double())]
    for i, grads in enumerate(make_steps(columns, 3)):
        kernels.step(
            [g.float() if (row + i) % 2 else g for row, g in enumerate(grads)], tensor_lr, Options()
        )
        # Equal to the same numbers, as the device reads them: 0.1 in float32.
        others.step(
            grads,
            [
                HYPERS[0]._replace(lr=lr.item()),
                HYPERS[1]._replace(lr=torch.tensor(0.02).double().item()),
            ],
            Options(),
        )
        lr.mul_(0.5)
    for actual, expected in zip(tensors_of(columns), tensors_of(other), strict=True):
        assert_same_bits(actual, expected)


def test_statistics_with_gradients_of_other_dtypes() -> None:
    columns = make_columns(torch.bfloat16, torch.float32, "master")
    other = copy.deepcopy(columns)
    (halves,) = make_steps(columns, 1)
    grads = [halves[0], None, halves[2], torch.randn(1025, device=DEVICE)]
    size = (len(SIZES), len(definition.UPDATE_STATS))
    stats, expected = (torch.full(size, -1.0, dtype=torch.float64, device=DEVICE) for _ in "ab")
    options = Options(rounding="master")
    adamw.AdamW(columns).step(grads, HYPERS, options, stats)
    definition.adamw_(other, grads, HYPERS, options, expected)
    # Values are float32, and their changes a few of its units off.
    torch.testing.assert_close(stats[:, :2], expected[:, :2], rtol=1e-12, atol=0)
    torch.testing.assert_close(stats[:, 2], expected[:, 2], rtol=1e-5, atol=0)
    assert torch.equal(stats[:, 3:], expected[:, 3:])


@pytest.mark.parametrize("lr", [torch.ones(2), torch.tensor(0.1, device="meta")], ids=str)
def test_rejected_lr(lr: Tensor) -> None:
    columns = make_columns(torch.float32, torch.float32)
    hypers = [hyper._replace(lr=lr) for hyper in HYPERS]
    with pytest.raises(ValueError, match="lr as a tensor must have one element"):
        adamw.AdamW(columns).step(make_steps(columns, 1)[0], hypers, Options())


def test_a_captured_step_keeps_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = make_columns(torch.float32, torch.float32)
    other = copy.deepcopy(columns)
    kernels, captured = adamw.AdamW(columns), adamw.AdamW(other)
    (grads,) = make_steps(columns, 1)
    kernels.step(grads, HYPERS, Options(max_norm=1.0))
    for module in (multi_tensor, adamw):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    captured.step(grads, HYPERS, Options(max_norm=1.0))
    for actual, expected in zip(tensors_of(other), tensors_of(columns), strict=True):
        assert_same_bits(actual, expected)
    assert captured._sent is None
    assert any(kept is captured._words for kept in multi_tensor._kept.values())


def test_no_gradient_and_no_parameter() -> None:
    columns = make_columns(torch.float32, torch.float32)
    assert adamw.AdamW(columns).step([None] * 4, HYPERS, Options()) == (None, None)
    nothing = make_columns(torch.float32, torch.float32, sizes=())
    assert adamw.AdamW(nothing).step([], HYPERS, Options()) == (None, None)


def test_only_empty_gradients_still_count_as_a_step() -> None:
    columns = make_columns(torch.float32, torch.float32, sizes=(0, 0))
    (grads,) = make_steps(columns, 1)
    outcome = adamw.AdamW(columns).step([grads[0], None], HYPERS, Options(max_norm=1.0))
    assert outcome.total_norm == 0
    assert [step.item() for step in columns.steps] == [1, 0]
