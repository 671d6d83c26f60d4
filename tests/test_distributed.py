"""Data parallelism with whole parameters, and ``python -m fastremedy distributed``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fastremedy import __main__ as command_line

if not torch.distributed.is_available():
    pytest.skip("needs gloo", allow_module_level=True)

from .data_parallel_checks import CHECKS
from .process_group import BACKENDS, Failures, assert_none_failed, run_checks


@pytest.fixture(scope="module", params=[2, 4], ids="{}_ranks".format)
def failures(request: pytest.FixtureRequest) -> Failures:
    return run_checks(request.param, "tests.data_parallel_checks")


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("of_backend", BACKENDS)
def test_ranks(failures: Failures, of_backend: str, name: str) -> None:
    assert_none_failed(failures, of_backend, name)


@pytest.mark.slow
def test_example_under_torchrun() -> None:
    pytest.importorskip("sklearn", reason="the example's packages are not installed")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*launcher, "--standalone", "-m", "fastremedy", "distributed", "--epochs", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 processes, 22 steps") == 1
    for name in ("one process", "DDP", "FSDP2"):
        assert name in result.stdout


def test_example_says_how_to_start_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["distributed"]) == 2
    assert "torchrun --nproc-per-node 2 -m fastremedy distributed" in capsys.readouterr().err
