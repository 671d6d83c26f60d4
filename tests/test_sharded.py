"""DTensors in real process groups: what the ranks of a mesh do together."""

from __future__ import annotations

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("needs gloo", allow_module_level=True)

from . import sharded_checkpoint_checks, sharded_norm_checks, sharded_optimizer_checks
from .process_group import BACKENDS, Failures, assert_none_failed, run_checks

MODULES = (sharded_norm_checks, sharded_optimizer_checks, sharded_checkpoint_checks)
CHECKS = [(module.__name__, name) for module in MODULES for name in module.CHECKS]


@pytest.fixture(scope="module", params=[2, 4], ids="{}_ranks".format)
def failures(request: pytest.FixtureRequest) -> dict[str, Failures]:
    return {module.__name__: run_checks(module.__name__, request.param) for module in MODULES}


@pytest.mark.parametrize(("module", "name"), CHECKS, ids=[name for _, name in CHECKS])
@pytest.mark.parametrize("of_backend", BACKENDS)
def test_ranks(failures: dict[str, Failures], of_backend: str, module: str, name: str) -> None:
    assert_none_failed(failures[module], of_backend, name)
