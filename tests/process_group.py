"""Starts the ranks of a process group and runs a module's checks in all of them."""

from __future__ import annotations

import datetime
import importlib
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastremedy

from .conftest import HAS_GPU, ROOT

BACKENDS = ("torch", "cpu")
PRELOADED = [f"torch.distributed.{name}" for name in ("checkpoint", "fsdp", "tensor")]
Check = Callable[[int, int], None]
Checks = dict[str, Check]
Failures = dict[str, list[str]]


def registry(checks: Checks) -> Callable[[Check], Check]:
    """Return a decorator that registers what every rank runs, with its number and theirs."""

    def check(function: Check) -> Check:
        checks[function.__name__] = function
        return function

    return check


def spawn(function: Callable[..., None], world_size: int, *args: object) -> None:
    """Call ``function(rank, world_size, *args)`` in each process of a gloo group."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)  # the ranks import the module of the function
        # All ranks of all groups are forks of one process that has imported torch: 106 instead of
        # 153 core seconds for all tests. One that has looked for a GPU must not fork.
        multiprocessing.set_forkserver_preload([__name__, *PRELOADED])
        torch.multiprocessing.start_processes(
            in_group,
            (function, world_size, folder, args),
            nprocs=world_size,
            start_method="spawn" if HAS_GPU else "forkserver",
        )


def in_group(
    rank: int, function: Callable[..., None], world_size: int, folder: str, args: Sequence[object]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    function(rank, world_size, *args)
    dist.destroy_process_group()
    # A thread of gloo that frees a Python object while the interpreter shuts down aborts the
    # process (pytorch#179291): 1 of 4 exits after DistributedDataParallel. So do not shut it down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def run_checks(world_size: int, *modules: str) -> Failures:
    """Run all checks of modules in one group of processes: starting it costs seconds."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(run_rank, world_size, modules, folder)
        failures: Failures = json.loads(Path(folder, "failures.json").read_text())
    return failures


def run_rank(rank: int, world_size: int, modules: Sequence[str], folder: str) -> None:
    """Run all checks on all backends; write what failed, by name, to ``failures.json``."""
    checks = {k: v for m in modules for k, v in importlib.import_module(m).CHECKS.items()}
    failures = {}
    for backend in BACKENDS:
        if fastremedy.backends.reason_against(backend, "cpu") is not None:
            continue
        for name, function in checks.items():
            torch.manual_seed(0)
            error = None
            try:
                with fastremedy.backends.use(backend):
                    function(rank, world_size)
            except Exception:
                error = traceback.format_exc()
            errors: list[str | None] = [None] * world_size
            dist.all_gather_object(errors, error)
            failures[f"{backend}-{name}"] = [e for e in errors if e is not None]
    if rank == 0:
        Path(folder, "failures.json").write_text(json.dumps(failures))


def assert_none_failed(failures: Failures, backend: str, name: str) -> None:
    """Fail with the traces of the ranks; skip a backend that could not run."""
    key = f"{backend}-{name}"
    if key not in failures:
        pytest.skip("the native library is missing")
    assert not failures[key], "\n".join(failures[key])
