"""BatchNorm with residual and activation against float64: values, gradients, running statistics."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import fastremedy

from .batch_norm_reference import (
    ACTIVATIONS,
    LAYOUTS,
    assert_matches_torch,
    count,
    is_slow,
    make_tensors,
    spare,
)
from .reference import FLOATS, HALVES, UNIT_ROUNDOFF, assert_same_bits, few_examples

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@MODES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_activations(
    backend: str, device: torch.device, dtype: torch.dtype, activation: str, training: bool
) -> None:
    cases = [(r, layout) for r in (False, True) for layout in ("contiguous", "last")]
    if is_slow(backend):  # each of the four is met by every activation and by every dtype
        place = ACTIVATIONS.index(activation) + FLOATS.index(dtype) + 2 * training
        cases = cases[place % 4 :][:1]
    for residual, layout in cases:
        tensors = make_tensors((3, 9, 2, 7), dtype, device, residual, layout)
        assert_matches_torch(tensors, training=training, activation=activation)


EXTREMES = [0.0, 1e-30, 1e-3, 1.0, 20.0, 86.0, 88.0, 89.0, 104.0, 1e4, 1e30, 3e38, float("inf")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(backend: str, device: torch.device, activation: str) -> None:
    values = torch.tensor([*EXTREMES, *(-x for x in EXTREMES)])[:, None]
    eps = 2.0**-10  # torch 2.11 refuses 0
    mean, var = torch.zeros(1, device=device), torch.full((1,), 1 - eps, device=device)
    results = []
    for x in (values.to(device), values.double()):
        x = x.clone().requires_grad_()
        if x.dtype == torch.float32:
            y = fastremedy.functional.batch_norm_relu(x, mean, var, eps=eps, activation=activation)
        else:
            y = getattr(torch.nn.functional, activation)(x) if activation != "identity" else x * 1
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        results += [y.detach().double().cpu(), x.grad.double().cpu()]
    for ours, exact in zip(results[:2], results[2:], strict=True):
        # The exponential is off by 4 unit roundoffs at most, and 0 below exp(-87) = 1.6e-38.
        bound = 6 * UNIT_ROUNDOFF[torch.float32]
        torch.testing.assert_close(ours, exact, rtol=bound, atol=104 * 2e-38, equal_nan=True)


# The edges of vectors, of rows of the mask and of blocks of threads.
SHAPES = [
    (2, 1), (2, 2), (1, 1, 2), (1, 2, 2), (2, 1, 1), (3, 3), (7, 8), (8, 7), (9, 9, 1), (1, 3, 7),
    (2, 3, 8), (1, 8, 9), (15, 16), (17, 15), (2, 17, 16), (1, 65, 3), (2, 3, 4, 5), (3, 2, 1, 17),
    (2, 5, 3, 1, 2), (1, 4, 2, 3, 5), (3, 1000), (2, 1, 1023), (1, 1, 1025), (1025, 1),
]  # fmt: skip
LARGE_SHAPES = [
    (1024, 3), (1023, 1), (2, 1025, 2), (2, 4099), (3, 65, 33, 31), (2, 3, 1024), (5, 7, 4099),
    (2, 1024, 7, 7), (33, 129, 4), (2, 2, 130, 129),
]  # fmt: skip


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(backend: str, device: torch.device, shape: tuple[int, ...], layout: str) -> None:
    spare(backend, backend == "triton" and max(shape) > 500 and layout == "last")
    residual = layout == "last" or not is_slow(backend)
    assert_matches_torch(make_tensors(shape, torch.float32, device, residual, layout))
    if not is_slow(backend):
        for dtype in HALVES:
            assert_matches_torch(make_tensors(shape, dtype, device, False, layout))


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("shape", LARGE_SHAPES, ids=str)
def test_large_sizes(
    backend: str, device: torch.device, shape: tuple[int, ...], layout: str
) -> None:
    spare(backend, torch.Size(shape).numel() > 10_000 or (backend == "triton" and shape[1] > 1000))
    residual = sum(shape) % 2 == 1
    assert_matches_torch(make_tensors(shape, torch.float32, device, residual, layout))


@few_examples
@hypothesis.given(
    shape=st.lists(st.integers(1, 11), min_size=2, max_size=5)
    .map(tuple)
    .filter(lambda shape: count(shape) > 1),
    layout=st.sampled_from(sorted(LAYOUTS)),
    dtype=st.sampled_from(FLOATS),
    activation=st.sampled_from(ACTIVATIONS),
    residual=st.booleans(),
    training=st.booleans(),
)
def test_any_shape(
    backend: str,
    device: torch.device,
    shape: tuple[int, ...],
    layout: str,
    dtype: torch.dtype,
    activation: str,
    residual: bool,
    training: bool,
) -> None:
    hypothesis.assume(not is_slow(backend) or torch.Size(shape).numel() < 2000)
    torch.manual_seed(0)
    tensors = make_tensors(shape, dtype, device, residual, layout)
    assert_matches_torch(tensors, training=training, activation=activation)


@MODES
@pytest.mark.parametrize("missing", ["weight", "bias", "weight bias"])
def test_without_weight_or_bias(
    backend: str, device: torch.device, missing: str, training: bool
) -> None:
    for residual in (False, True):
        tensors = make_tensors((4, 5, 6), torch.float32, device, residual)
        tensors = tensors._replace(**dict.fromkeys(missing.split()))
        assert_matches_torch(tensors, training=training)


def test_without_running_statistics(backend: str, device: torch.device) -> None:
    tensors = make_tensors((4, 5, 6), torch.float32, device, True)
    assert_matches_torch(tensors._replace(running_mean=None, running_var=None))


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_momentum_and_eps(backend: str, device: torch.device, eps: float, momentum: float) -> None:
    spare(backend, eps != 1e-5 and momentum != 0.1)
    for training in (True, False):
        tensors = make_tensors((3, 4, 5), torch.float32, device)
        assert_matches_torch(tensors, training=training, eps=eps, momentum=momentum)


@MODES
@pytest.mark.parametrize("vectors", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes_of_vectors(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    vectors: torch.dtype,
    training: bool,
) -> None:
    spare(backend, not training or dtype == torch.float64)
    if backend == "torch" and vectors not in (dtype, torch.float32 if dtype in HALVES else dtype):
        pytest.skip("torch has no such operator")
    tensors = make_tensors((4, 5, 6), dtype, device, True).with_vectors(vectors)
    results = assert_matches_torch(tensors, training=training)
    assert results["weight.grad"].dtype == vectors
    assert results["running_var"].dtype == vectors


def test_vectors_of_different_dtypes(backend: str, device: torch.device) -> None:
    if backend == "torch":
        pytest.skip("torch has no such operator")
    tensors = make_tensors((4, 5, 6), torch.bfloat16, device, True)
    assert tensors.weight is not None
    assert tensors.bias is not None
    tensors = tensors._replace(weight=tensors.weight.half(), bias=tensors.bias.double())
    assert_matches_torch(tensors)


@MODES
def test_evaluation_leaves_running_statistics_alone(
    backend: str, device: torch.device, training: bool
) -> None:
    tensors = make_tensors((4, 5, 6), torch.float32, device)
    assert tensors.running_mean is not None
    assert tensors.running_var is not None
    mean, var = tensors.running_mean.clone(), tensors.running_var.clone()
    counter = torch.tensor(3, device=device)
    fastremedy.functional.batch_norm_relu(
        tensors.input, mean, var, training=training, num_batches_tracked=counter
    )
    assert counter.item() == 3 + training
    if training:
        assert (mean != tensors.running_mean).all()
    else:
        assert_same_bits(mean, tensors.running_mean)
        assert_same_bits(var, tensors.running_var)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_average_over_all_batches(backend: str, device: torch.device, layout: str) -> None:
    wide_mean, wide_var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    running_mean, running_var = torch.zeros(3, device=device), torch.ones(3, device=device)
    counter = torch.tensor(0, device=device)
    for step in range(1, 6):
        input = LAYOUTS[layout](step * torch.randn(4, 3, 5, device=device) + step)
        fastremedy.functional.batch_norm_relu(
            input, running_mean, running_var, None, None, True, None, num_batches_tracked=counter
        )
        wide = input.cpu().double()
        torch.nn.functional.batch_norm(wide, wide_mean, wide_var, None, None, True, 1 / step)
        assert counter.item() == step
    torch.testing.assert_close(running_mean.cpu().double(), wide_mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(running_var.cpu().double(), wide_var, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@MODES
def test_empty_batch(
    backend: str, device: torch.device, training: bool, layout: str, shape: tuple[int, ...]
) -> None:
    for residual in (False, True):
        tensors = make_tensors(shape, torch.float32, device, residual, layout)
        results = assert_matches_torch(tensors, training=training)
        assert_same_bits(results["weight.grad"], torch.zeros(3, device=device))
        assert_same_bits(results["bias.grad"], torch.zeros(3, device=device))


def test_defaults_are_those_of_torch(backend: str, device: torch.device) -> None:
    x, _, _, _, mean, var = make_tensors((4, 3, 5), torch.float32, device)
    actual = fastremedy.functional.batch_norm_relu(x, mean, var)
    expected = torch.nn.functional.batch_norm(x, mean, var).relu()
    torch.testing.assert_close(actual, expected)
    for momentum in ({}, {"momentum": 0.1}):
        means = [torch.zeros(3, device=device) for _ in range(2)]
        ones = torch.ones(3, device=device)
        fastremedy.functional.batch_norm_relu(x, means[0], ones, training=True)
        torch.nn.functional.batch_norm(x, means[1], ones.clone(), training=True, **momentum)
        torch.testing.assert_close(means[0], means[1])
