"""clip_, grad_norm and clip_value_: values, edges of the range, and what must stay untouched."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fastremedy

from .reference import (
    FLOATS,
    assert_close_to_reference,
    assert_norm_close,
    assert_same_bits,
    clip_reference,
    clip_with_torch,
    few_examples,
    grads_of,
    with_grads,
)

NORM_TYPES = (0.5, 1.0, 2.0, 3.0, math.inf, 0.0, -math.inf, -1.0)
SIZES = (0, 1, 3, 7, 8, 9, 33, 0, 1025, 0)  # empty first, between and last; vector tails
CHUNK_EDGES = (16383, 16384, 16385, 65535, 65536, 65537)  # of the CPU and of the CUDA kernels


def assert_clips(grads: list[Tensor], max_norm: float, norm_type: float) -> None:
    """Clip the gradients in place and hold norm and result to float64."""
    originals = [grad.clone() for grad in grads]
    norm = fastremedy.clip_(with_grads(grads), max_norm, norm_type)
    norm64, clipped64 = clip_reference(originals, max_norm, norm_type)
    torch_norm, torch_clipped = clip_with_torch(originals, max_norm, norm_type)
    # With norm_type 0 torch counts tensors, not elements.
    torch_norm = torch_norm if norm_type else norm64
    torch_clipped = torch_clipped if norm_type else clipped64
    assert_norm_close(norm, norm64, torch_norm, grads)
    for grad, expected, by_torch in zip(grads, clipped64, torch_clipped, strict=True):
        assert_close_to_reference(grad, expected, by_torch.to(grad.dtype))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_float64(
    backend: str, device: torch.device, dtype: torch.dtype, norm_type: float
) -> None:
    grads = [torch.randn(size, device=device).to(dtype) for size in SIZES]
    norm64, _ = clip_reference(grads, math.inf, norm_type)
    assert_clips(grads, 0.3 * norm64.item(), norm_type)


@few_examples
@given(
    shapes=st.lists(
        st.tuples(
            st.sampled_from((0, 1, 2, 3, 7, 8, 9, 15, 31, 32, 33, 255, 1023, 1024, 1025)),
            st.integers(0, 3),
            st.sampled_from(FLOATS),
        ),
        min_size=1,
        max_size=5,
    ),
    norm_type=st.sampled_from((1.0, 2.0, math.inf, 2.5)),
    ratio=st.sampled_from((0.01, 0.7, 2.0)),
)
def test_any_sizes_offsets_and_dtypes(
    backend: str,
    device: torch.device,
    shapes: list[tuple[int, int, torch.dtype]],
    norm_type: float,
    ratio: float,
) -> None:
    buffers = [torch.randn(size + 8, device=device).to(dtype) for size, _, dtype in shapes]
    befores = [buffer.clone() for buffer in buffers]
    grads = [
        buffer[offset : offset + size]
        for buffer, (size, offset, _) in zip(buffers, shapes, strict=True)
    ]
    norm64, _ = clip_reference(grads, math.inf, norm_type)
    assert_clips(grads, ratio * norm64.item(), norm_type)
    for buffer, before, (size, offset, _) in zip(buffers, befores, shapes, strict=True):
        assert_same_bits(buffer[:offset], before[:offset])
        assert_same_bits(buffer[offset + size :], before[offset + size :])


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", CHUNK_EDGES)
def test_chunk_edges(
    backend: str, device: torch.device, size: int, dtype: torch.dtype, norm_type: float
) -> None:
    grads = [torch.randn(n, device=device).to(dtype) for n in (5, size, 5)]
    grads[1][-1] = 1e3  # the norm is this element: a lost tail shows
    assert_clips(grads, 10.0, norm_type)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0, 0)], ids=str)
@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_norm_of_nothing_is_zero(
    backend: str, device: torch.device, norm_type: float, sizes: tuple[int, ...]
) -> None:
    grads = [torch.empty(size, device=device) for size in sizes]
    norm = fastremedy.clip_(with_grads(grads), 1.0, norm_type)
    assert norm.shape == ()
    assert norm.item() == 0.0


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("position", [0, 5, 512, 1023, 1024, 1026], ids=lambda i: f"at_{i}")
def test_one_nonfinite_element(
    backend: str, device: torch.device, position: int, value: float, norm_type: float
) -> None:
    grads = [torch.rand(n, device=device) + 1 for n in (3, 1027, 3)]
    grads[1][position] = value
    norm64, clipped64 = clip_reference(grads, 1.0, norm_type)
    norm = fastremedy.clip_(with_grads(grads), 1.0, norm_type)
    torch.testing.assert_close(norm.double().cpu(), norm64, equal_nan=True)
    for grad, expected in zip(grads, clipped64, strict=True):
        torch.testing.assert_close(grad.double().cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("norm_type", [math.inf, -math.inf])
@pytest.mark.parametrize("order", [(math.nan, math.inf), (math.inf, math.nan)], ids=str)
def test_nan_wins_over_infinity(
    backend: str, device: torch.device, order: tuple[float, float], norm_type: float
) -> None:
    grads = [torch.tensor([1.0, value, 1.0], device=device) for value in order]
    assert fastremedy.grad_norm(with_grads(grads), norm_type).isnan()


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 1e20),  # the square overflows
        (torch.float32, 1e-30),  # the square underflows
        (torch.float32, 1e-42),  # subnormal
        (torch.float16, 1e4),  # the norm overflows
        (torch.float16, 6e-8),  # subnormal
        (torch.bfloat16, 3e38),  # near the largest
        (torch.bfloat16, 1e-39),  # subnormal
        (torch.float64, 1e100),
    ],
    ids=str,
)
def test_no_overflow_or_underflow(
    backend: str, device: torch.device, dtype: torch.dtype, value: float
) -> None:
    grads = [torch.full((size,), value, dtype=dtype, device=device) for size in (100, 31)]
    norm64, _ = clip_reference(grads, math.inf, 2.0)
    assert_clips(grads, 0.5 * min(norm64.item(), 1e30), 2.0)


def test_float16_gradients_of_1e4_are_clipped_not_lost(backend: str, device: torch.device) -> None:
    grad = torch.full((100,), 1e4, dtype=torch.float16, device=device)
    norm = fastremedy.clip_(with_grads([grad]), 1.0)
    assert norm.dtype == torch.float32
    assert norm.item() == 1e5
    assert grad.tolist() == [torch.tensor(0.1).half().item()] * 100


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf, 3.0])
def test_untouched_within_max_norm(
    backend: str, device: torch.device, norm_type: float, dtype: torch.dtype
) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    values = torch.tensor([0.0, -0.0, smallest / 2, 1 / 3, -0.7], dtype=torch.float64)
    grad = values.to(dtype).to(device)
    before, version = grad.clone(), grad._version
    norm64, _ = clip_reference([grad], math.inf, norm_type)
    fastremedy.clip_(with_grads([grad]), norm64.item() + 2e-6, norm_type)
    assert_same_bits(grad, before)
    # A GPU does not tell the host whether it clipped, so that its version may grow.
    assert grad.is_cuda or backend != "cpu" or grad._version == version


@pytest.mark.parametrize("scale", [1.0, 1e-6])  # 1e-6 halves a gradient of norm 1e-6
def test_norm_equal_to_max_norm_is_clipped_by_torchs_formula(
    backend: str, device: torch.device, scale: float
) -> None:
    # min(1, max_norm / (norm + 1e-6)) is below 1 here.
    assert_clips([torch.tensor([0.6, 0.8], device=device) * scale], scale, 2.0)


@pytest.mark.parametrize("max_norm", [0.0, 1e-30, 1.0, 1e30, math.inf])
def test_max_norm_from_zero_to_infinity(
    backend: str, device: torch.device, max_norm: float
) -> None:
    assert_clips([torch.tensor([3.0, -4.0, -0.0], device=device)], max_norm, 2.0)


def test_infinite_max_norm_leaves_nonfinite_gradients(backend: str, device: torch.device) -> None:
    grad = torch.tensor([math.nan, math.inf, 1.0], device=device)
    before = grad.clone()
    assert fastremedy.clip_(with_grads([grad]), math.inf).isnan()
    assert_same_bits(grad, before)


def test_clipping_bumps_version(backend: str, device: torch.device) -> None:
    grads = [torch.ones(3, device=device), torch.ones(5, 2, device=device).t()]
    versions = [grad._version for grad in grads]
    fastremedy.clip_(with_grads(grads), 0.1)
    assert all(grad._version > version for grad, version in zip(grads, versions, strict=True))


def test_grad_norm_changes_nothing(backend: str, device: torch.device) -> None:
    grads = [torch.randn(9, device=device), torch.randn(3, 4, device=device)]
    before, versions = [grad.clone() for grad in grads], [grad._version for grad in grads]
    norm = fastremedy.grad_norm(with_grads(grads))
    for grad, expected in zip(grads, before, strict=True):
        assert_same_bits(grad, expected)
    assert [grad._version for grad in grads] == versions
    assert_same_bits(norm, fastremedy.clip_(with_grads(grads), 0.1))


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.float32], torch.float32),
        ([torch.float16], torch.float32),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.bfloat16, torch.float64], torch.float64),
    ],
    ids=str,
)
def test_dtype_of_the_norm(
    backend: str, device: torch.device, dtypes: list[torch.dtype], expected: torch.dtype
) -> None:
    norm = fastremedy.clip_(with_grads([torch.ones(2, device=device).to(d) for d in dtypes]), 1.0)
    assert (norm.dtype, norm.shape, norm.device.type) == (expected, (), device.type)
    assert not norm.requires_grad


def test_later_calls_leave_the_returned_norm_alone(backend: str, device: torch.device) -> None:
    norms = [
        fastremedy.clip_(with_grads([torch.full((4,), value, device=device)]), 1e-3)
        for value in (1.0, 2.0, 3.0)
    ]
    assert [norm.item() for norm in norms] == [2.0, 4.0, 6.0]


def test_tensor_list_tuple_and_generator(backend: str, device: torch.device) -> None:
    for wrap in (lambda p: p, lambda p: [p], lambda p: (p,), lambda p: (x for x in [p])):
        (param,) = with_grads([torch.tensor([3.0, 4.0], device=device)])
        assert fastremedy.clip_(wrap(param), 1.0).item() == 5.0
        torch.testing.assert_close(param.grad.cpu(), torch.tensor([0.6, 0.8]))


def test_parameters_without_gradient_are_passed_over(backend: str, device: torch.device) -> None:
    params = [torch.zeros(2, device=device, requires_grad=True) for _ in range(3)]
    assert fastremedy.clip_(params, 1.0).item() == 0.0
    assert fastremedy.grad_norm(params).item() == 0.0
    params[1].grad = torch.tensor([3.0, 4.0], device=device)
    assert fastremedy.clip_(params, 1.0).item() == 5.0
    assert params[0].grad is None


def test_empty_generator_warns_as_torch_does() -> None:
    for function in (fastremedy.clip_, torch.nn.utils.clip_grad_norm_, fastremedy.clip_value_):
        with pytest.warns(UserWarning, match="`parameters` is an empty generator") as record:
            function((p for p in ()), 1.0)
        assert record[0].filename == __file__
    assert fastremedy.clip_([], 1.0).item() == 0.0


@pytest.mark.parametrize("max_norm", [-1.0, -math.inf, math.nan])
def test_max_norm_must_not_be_negative(backend: str, device: torch.device, max_norm: float) -> None:
    grad = torch.tensor([3.0, 4.0], device=device)
    with pytest.raises(ValueError, match=f"max_norm must be a number >= 0, got {max_norm}"):
        fastremedy.clip_(with_grads([grad]), max_norm)
    with pytest.raises(ValueError, match=f"clip_value must be a number >= 0, got {max_norm}"):
        fastremedy.clip_value_(with_grads([grad]), max_norm)
    assert grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_error_if_nonfinite(
    backend: str, device: torch.device, value: float, norm_type: float
) -> None:
    grads = [torch.ones(3, device=device), torch.tensor([1.0, value], device=device)]
    before = [grad.clone() for grad in grads]
    messages = []
    for clip in (fastremedy.clip_, torch.nn.utils.clip_grad_norm_):
        with pytest.raises(RuntimeError) as info:
            clip(with_grads(grads), 1.0, norm_type, error_if_nonfinite=True)
        messages.append(str(info.value))
        for grad, expected in zip(grads, before, strict=True):
            assert_same_bits(grad, expected)
    assert messages[0] == messages[1]
    grads[1].fill_(1.0)
    fastremedy.clip_(with_grads(grads), 1.0, norm_type, error_if_nonfinite=True)


@pytest.mark.parametrize("size", [5, 16384, 65536])  # one chunk each: they run at the same time
def test_duplicates_count_twice_as_in_torch(backend: str, device: torch.device, size: int) -> None:
    original = torch.randn(size, device=device)
    (expected,) = with_grads([original.clone()])
    expected_norm = torch.nn.utils.clip_grad_norm_([expected, expected], 1.0)
    for _ in range(20 if backend == "cpu" else 2):  # a race loses a clipping now and then
        (param,) = with_grads([original.clone()])
        norm = fastremedy.clip_([param, param], 1.0)
        torch.testing.assert_close(norm, expected_norm)
        torch.testing.assert_close(param.grad, expected.grad)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
def test_same_bits_for_any_number_of_threads(
    backend: str, device: torch.device, norm_type: float, restored_threads: None
) -> None:
    sizes = (40_000, 3, 17_000) if backend in ("torch", "cpu") else (3000, 3, 5)
    originals = [torch.randn(size, device=device) for size in sizes]
    results = []
    for num_threads in (1, 2, 1, 2):
        torch.set_num_threads(num_threads)
        grads = [original.clone() for original in originals]
        norm = fastremedy.clip_(with_grads(grads), 1.0, norm_type)
        results.append([norm, *grads])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clip_value_is_torchs(backend: str, device: torch.device, foreach: bool | None) -> None:
    values = torch.tensor([-3.0, 0.5, math.inf, math.nan], device=device)
    params, expected = with_grads([values.clone()]), with_grads([values.clone()])
    fastremedy.clip_value_(params, 1.0, foreach)
    torch.nn.utils.clip_grad_value_(expected, 1.0, foreach)
    assert_same_bits(grads_of(params)[0], grads_of(expected)[0])
    fastremedy.clip_value_([torch.zeros(2)], 1.0)
    fastremedy.clip_value_(params[0], 0)
    assert params[0].grad[0].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn], ids=str)
def test_dtypes_without_norm_are_refused(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    param = torch.zeros(3, dtype=dtype, device=device)
    param.grad = torch.ones(3, device=device).to(dtype)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        torch.nn.utils.clip_grad_norm_([param], 1.0)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        fastremedy.clip_([param], 1.0)


@pytest.mark.parametrize("choice", [None, "torch"])
@pytest.mark.parametrize("without_values", [torch.device("meta"), FakeTensorMode()], ids=type)
def test_tensors_without_values(choice: str | None, without_values: Any) -> None:
    """As where the memory of a training step is estimated."""
    with fastremedy.backends.use(choice), without_values:
        params = with_grads([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
        norm = fastremedy.clip_(params, 1.0)
    assert type(norm) is type(params[0].grad)
    assert (norm.shape, norm.device) == ((), params[0].device)
