"""Benchmarks take turns with stock PyTorch; ``--benchmark-json`` gets one record per comparison."""

from __future__ import annotations

import datetime
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastremedy import backends, bench, info

ROOT = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rounds", type=int, help="rounds of every comparison, for a quick look")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Train networks last: they leave a heap where a thousand small tensors lie far apart."""
    items.sort(key=lambda item: item.name.startswith("bench_monitor"))


@pytest.fixture(scope="session", autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(bench.NUM_THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """Let torch.compile know one size at a time: from the second on kernels are for any size.

    After eight forms of a function it compiles no more.
    """
    torch.compiler.reset()


@pytest.fixture(params=bench.devices(), ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Return each device of this machine."""
    chosen: torch.device = request.param
    return chosen


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., None]:
    """Return a function that times candidates side by side and records them."""

    def run(
        stem: str,
        case: Any,
        candidates: bench.Candidates,
        device: torch.device,
        *,
        prepare: Callable[[], object] = lambda: None,
        note: str = "",
        bytes_per_element: int | None = None,
        together: int = 1,
        in_a_row: int = 1,
    ) -> None:
        rounds = request.config.getoption("rounds") or case.rounds
        in_a_row = min(in_a_row, rounds)
        side = bench.SideBySide(candidates, device, prepare, together, in_a_row)
        benchmark.pedantic(
            side.take_turn,
            args=(bench.OURS,),
            setup=side.peers,
            rounds=-(-rounds * together // in_a_row),
            warmup_rounds=bench.WARM_UP,
        )
        benchmark.extra_info["record"] = {
            "stem": stem,
            "note": note,
            "case": str(case),
            "device": device.type,
            "backend": backends.active(stem, device),
            "elements": case.elements,
            "bytes_per_element": bytes_per_element,
            "target": case.target,
            "rounds": rounds,
            "ms": side.quantiles(),
        }

    return run


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Replace pytest-benchmark's file by ours: what was measured, on what, at which commit."""
    known = [entry["extra_info"] for entry in output_json["benchmarks"]]
    records = [extra["record"] for extra in known if extra]  # the last is empty if time was up
    output_json.clear()
    output_json |= {
        "machine": bench.machine(),
        "versions": info.versions(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "command": "make bench",
        "copy_gb_per_s": {device.type: bench.copy_gb_per_s(device) for device in bench.devices()},
        "results": records,
    }


def _commit() -> str:
    """Return the commit that is measured; without git FASTREMEDY_COMMIT tells."""
    told = os.environ.get("FASTREMEDY_COMMIT")
    if told:
        return told
    sources = ["csrc", "fastremedy", "setup.py", "triton_kernels"]
    commit = _git("rev-parse", "--short=12", "HEAD")
    is_changed = commit and _git("status", "--porcelain", "--", *sources)
    return (commit or "unknown") + ("-dirty" if is_changed else "")


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
