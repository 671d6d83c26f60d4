"""SyncBatchNormReLU in real process groups: every check of :mod:`sync_batch_norm_checks`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastremedy
from fastremedy.nn import BatchNormReLU2d, SyncBatchNormReLU

from .process_group import BACKENDS, Failures, assert_none_failed, run_checks
from .reference import assert_same_bits
from .sync_batch_norm_checks import CHECKS

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs gloo")


@pytest.fixture(scope="module", params=[2, 3], ids="{}_ranks".format)
def failures(request: pytest.FixtureRequest) -> Failures:
    return run_checks(request.param, "tests.sync_batch_norm_checks")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("of_backend", BACKENDS)
def test_ranks(failures: Failures, of_backend: str, name: str) -> None:
    assert_none_failed(failures, of_backend, name)


def test_alone_it_is_a_plain_layer(backend: str, device: torch.device) -> None:
    """Without a process group nothing is synchronised, as in torch."""
    results = []
    for cls in (BatchNormReLU2d, SyncBatchNormReLU):
        torch.manual_seed(0)
        norm = cls(3).to(device)
        x = torch.randn(2, 3, 4, 5, device=device, requires_grad=True)
        output = norm(x, x)
        output.square().sum().backward()
        results.append([output, x.grad, *norm.parameters(), *norm.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert actual is not None
        assert expected is not None
        assert_same_bits(actual, expected)


def test_state_dict_is_torchs() -> None:
    ours, by_torch = SyncBatchNormReLU(3), nn.SyncBatchNorm(3)
    assert list(ours.state_dict()) == list(by_torch.state_dict())
    by_torch.load_state_dict(ours.state_dict())
    ours.load_state_dict(by_torch.state_dict())


def test_conversion_without_a_group() -> None:
    norm = BatchNormReLU2d(3, eps=0.1, momentum=0.2, activation="leaky_relu", negative_slope=0.3)
    norm.collect_stats = True
    group = object()
    converted = SyncBatchNormReLU.convert_sync_batchnorm(norm.eval(), group)
    assert isinstance(converted, SyncBatchNormReLU)
    assert not converted.training
    assert converted.process_group is group
    assert converted.collect_stats
    assert converted.weight is norm.weight
    assert converted.running_mean is norm.running_mean
    assert (converted.eps, converted.momentum, converted.negative_slope) == (0.1, 0.2, 0.3)
    linear = nn.Linear(2, 2)
    assert SyncBatchNormReLU.convert_sync_batchnorm(linear) is linear


def test_conversion_of_a_layer_without_bias() -> None:
    norm = fastremedy.nn.BatchNormReLU1d(3, bias=False)
    converted = SyncBatchNormReLU.convert_sync_batchnorm(norm)
    assert converted.bias is None
    assert list(converted.state_dict()) == list(norm.state_dict())


def test_shape_errors() -> None:
    with pytest.raises(ValueError, match="at least 2D"):
        SyncBatchNormReLU(3)(torch.randn(3))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        SyncBatchNormReLU(0)(torch.randn(2, 0, 3))
