"""DTensors in real process groups: what the ranks of a mesh do together."""

from __future__ import annotations

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs gloo", allow_module_level=True)

from . import sharded_checkpoint_checks, sharded_norm_checks, sharded_optimizer_checks
from .process_group import BACKENDS, Failures, assert_none_failed, run_checks

MODULES = (sharded_norm_checks, sharded_optimizer_checks, sharded_checkpoint_checks)
NAMES = [name for module in MODULES for name in module.CHECKS]


@pytest.fixture(scope="module", params=[2, 4], ids="{}_ranks".format)
def failures(request: pytest.FixtureRequest) -> Failures:
    return run_checks(request.param, *(module.__name__ for module in MODULES))


def test_names_differ() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of_backend", BACKENDS)
def test_ranks(failures: Failures, of_backend: str, name: str) -> None:
    assert_none_failed(failures, of_backend, name)
