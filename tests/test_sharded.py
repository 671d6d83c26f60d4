"""DTensors in real process groups: every check of :mod:`sharded_checks`."""

from __future__ import annotations

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs gloo", allow_module_level=True)

from .process_group import BACKENDS, Failures, assert_none_failed, run_checks
from .sharded_checks import CHECKS


@pytest.fixture(scope="module", params=[2, 4], ids="{}_ranks".format)
def failures(request: pytest.FixtureRequest) -> Failures:
    return run_checks("tests.sharded_checks", request.param)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("of_backend", BACKENDS)
def test_ranks(failures: Failures, of_backend: str, name: str) -> None:
    assert_none_failed(failures, of_backend, name)
