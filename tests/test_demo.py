"""``python -m fastremedy demo``, ``info`` and ``bench`` do what they say."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastremedy
from fastremedy import __main__ as command_line
from fastremedy import _native, backends, bench, demo, imbalance, info
from fastremedy.optim import AdamW

pytest.importorskip("sklearn", reason="the demo's packages are not installed")
PNG = b"\x89PNG\r\n\x1a\n"


def run_demo(tmp_path: Path, *arguments: str) -> int:
    return command_line.main(
        [
            "demo",
            "--epochs",
            "1",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "demo.png"),
            *arguments,
        ]
    )


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    build = demo.network
    monkeypatch.setattr(demo, "network", lambda: build(depth=2, channels=8))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_curves_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_network: None, backend: str
) -> None:
    if backends.available()[backend] is not None:
        pytest.skip(str(backends.available()[backend]))
    assert run_demo(tmp_path, "--backend", backend) == 0
    out = capsys.readouterr().out
    assert f"backend {backend}" in out
    for part in ("held-out accuracy", "clip + optimizer step", "largest difference", "rounding"):
        assert part in out
    assert str(tmp_path / "demo.png") in out
    assert (tmp_path / "demo.png").read_bytes().startswith(PNG)


ERRORS: dict[str, dict[str, Any]] = {
    "none": {},
    "learning rate off by a thousandth": {"lr": demo.LEARNING_RATE * 1.001},
    "no weight decay": {"weight_decay": 0.0},
    "beta2": {"betas": (0.9, 0.99)},
    "no clipping": {"max_grad_norm": None},
}


@pytest.mark.parametrize("error", ERRORS)
def test_wrong_update_is_noticed(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    small_network: None,
    error: str,
) -> None:
    def wrong_run(name: str, model: nn.Module, num_steps: int) -> demo.Run:
        right = {"lr": demo.LEARNING_RATE, "max_grad_norm": demo.MAX_GRAD_NORM}
        optimizer = AdamW(model.parameters(), **{**right, **ERRORS[error]})
        lr = optimizer.param_groups[0]["lr"]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps)
        return demo.Run(name, model, optimizer, optimizer.step, schedule)

    monkeypatch.setattr(demo, "our_run", wrong_run)
    is_wrong = error != "none"
    assert run_demo(tmp_path) == int(is_wrong)
    assert ("differ by more than rounding" in capsys.readouterr().err) == is_wrong


def make_run(losses: list[float]) -> demo.Run:
    optimizer = torch.optim.AdamW(nn.Linear(1, 1).parameters())
    schedule = demo.one_cycle(optimizer, 2)
    return demo.Run("a run", nn.Identity(), optimizer, optimizer.step, schedule, losses=losses)


@pytest.mark.parametrize(
    ("ours", "is_rounding"),
    [
        ([2.3, 0.5], True),
        ([2.3 + 2e-6, 0.5], True),  # the last digit of 2.3 is 2.4e-7
        ([2.3 + 3e-6, 0.5], False),
        ([2.3, math.nan], False),
        ([math.inf, 0.5], False),
    ],
    ids=str,
)
def test_bound(ours: list[float], is_rounding: bool) -> None:
    stock, yardstick = make_run([2.3, 0.5]), make_run([2.3, 0.5])
    assert demo.Comparison(stock, make_run(ours), yardstick).is_rounding == is_rounding


def test_bound_grows_with_the_distance_of_stock_from_stock() -> None:
    stock, yardstick = make_run([2.0, 1.0, 1.0]), make_run([2.0, 1.1, 1.0])
    comparison = demo.Comparison(stock, make_run([2.0, 1.4, 1.4]), yardstick)
    distances = [2.0**-22, 0.1, 0.1]
    assert comparison.bound == pytest.approx([demo.FACTOR * distance for distance in distances])
    assert comparison.is_rounding
    early = demo.Comparison(stock, make_run([2.1, 1.0, 1.0]), yardstick)
    assert not early.is_rounding


def test_unavailable_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if backends.available()["cuda"] is None:
        pytest.skip("the cuda backend is available")
    assert run_demo(tmp_path, "--backend", "cuda") == 2
    assert "backend 'cuda' is not available" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["sklearn", "rich", "matplotlib"])
def test_missing_extra(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] == missing:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(demo.Run, "step", fail)
    assert run_demo(tmp_path) == 2
    assert "pip install 'fastremedy[demo]'" in capsys.readouterr().err


def fail(*_: object) -> None:
    pytest.fail("it trains first")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("picture", "--out must end in .png or another of "),
        ("picture.xyz", "--out must end in .png or another of "),
        (".", "--out must end in .png or another of "),
        ("folder.png", "--out must be a file that can be written, got [Errno 21] Is a directory"),
        ("file/demo.png", "--out must be a file that can be written, got [Errno 17] File exists"),
    ],
)
@pytest.mark.parametrize("command", ["demo", "imbalance"])
def test_picture_that_cannot_be_written(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    out: str,
    message: str,
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(demo, "train", fail)
    monkeypatch.setattr(imbalance, "train", fail)
    monkeypatch.chdir(tmp_path)
    assert command_line.main([command, "--device", "cpu", "--out", out]) == 2
    assert capsys.readouterr().err.startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def run_info(**environment: str) -> str:
    command = [sys.executable, "-m", "fastremedy", "info"]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_info_tells_versions_and_backends() -> None:
    text = run_info()
    for version in (fastremedy.__version__, torch.__version__):
        assert version in text
    for stem in backends.STEMS:
        assert f"{stem} on cpu runs " in text
    assert text.count("    not ") >= 3 * len(backends.STEMS)  # every other backend


def test_info_tells_that_the_chosen_backend_cannot_run() -> None:
    text = run_info(FASTREMEDY_BACKEND="no_such_backend")
    assert "FASTREMEDY_BACKEND=no_such_backend" in text
    assert "adamw on cpu runs nothing: " in text


def test_info_tells_why_there_is_no_native_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "library", lambda: None)
    monkeypatch.setattr(_native, "error", "built for another planet")
    assert "native library: none, because built for another planet" in info.report()
    assert "adamw on cpu runs torch" in info.report()


def test_bench_prints_every_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        bench, "CPU_CASES", (bench.Case(3, 5, rounds=2), bench.Case(1, 7, rounds=2))
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    assert command_line.main(["bench", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["3x5", "1x7"]
    assert all(float(field) > 0 for line in lines[2:] for field in line.split()[1:])


def test_bench_with_a_backend_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backends, "_environment", "gpu")
    monkeypatch.setattr(torch, "set_num_threads", lambda num_threads: None)
    assert command_line.main(["bench", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("FASTREMEDY_BACKEND must be one of cuda")


def test_bench_candidates_take_turns() -> None:
    calls: list[str] = []
    candidates: bench.Candidates = {
        "ours": lambda: calls.append("ours"),
        "stock": lambda: calls.append("stock"),
    }
    side = bench.SideBySide(candidates, torch.device("cpu"), lambda: calls.append("prepare"))
    side.run(rounds=2)
    assert calls == ["prepare", "stock", "prepare", "ours"] * (bench.WARM_UP + 2)
    assert [len(ms) for ms in side.ms.values()] == [bench.WARM_UP + 2] * 2


def test_bench_adds_up_calls_together() -> None:
    side = bench.SideBySide({"ours": lambda: None}, torch.device("cpu"), together=2)
    side.ms["ours"] = [99.0] * bench.WARM_UP + [1, 2, 3, 4, 5, 6]
    assert side.quantiles()["ours"]["p50"] == 7


def test_bench_candidates_do_the_same_work() -> None:
    results = {}
    for name in (bench.OURS, bench.FUSED, bench.FOREACH):
        case = bench.Case(3, 50, rounds=1)
        params = case.params(torch.device("cpu"))
        before = [param.detach().clone() for param in params]
        bench.adamw_candidates(params, case)[name]()
        assert not any(torch.equal(a, b) for a, b in zip(params, before, strict=True))
        results[name] = params
    for name in (bench.FUSED, bench.FOREACH):
        torch.testing.assert_close(results[name], results[bench.OURS])


def test_refill_restores_gradients() -> None:
    params = bench.Case(2, 4, rounds=1).params(torch.device("cpu"))
    before = [param.grad.clone() for param in params if param.grad is not None]
    refill = bench.refill(params)
    fastremedy.clip_(params, 0.1)
    refill()
    torch.testing.assert_close([param.grad for param in params], before, rtol=0, atol=0)
