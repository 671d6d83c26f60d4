"""What training needs is there after ``warmup``, and importing fastremedy costs little."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastremedy
from fastremedy import backends
from fastremedy.compilation import Loaded

HERE = Path(__file__).parent


def run_python(*arguments: str, **variables: str) -> str:
    """Run Python where Triton compiles and does not interpret."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= variables
    command = [sys.executable, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("stem", backends.STEMS)
def test_named_operator_is_loaded(stem: str) -> None:
    expected = {stem: Loaded(backends.active(stem, "cpu"), 0)}
    assert fastremedy.warmup(stem, "cpu") == expected
    assert fastremedy.warmup(iter([stem]), torch.device("cpu")) == expected


def test_all_operators_are_the_default() -> None:
    assert tuple(fastremedy.warmup()) == backends.STEMS


def test_interpreted_kernels_do_not_compile(backend: str, device: torch.device) -> None:
    if device.type == "cuda" and backend == "triton":
        pytest.skip("a GPU compiles")
    loaded = fastremedy.warmup(["clip_grad_norm"], device)
    assert loaded == {"clip_grad_norm": Loaded(backend, 0)}


@pytest.mark.parametrize(
    ("model", "stems"),
    [
        (torch.nn.ReLU(), []),
        (torch.nn.Linear(2, 2), ["clip_grad_norm", "adamw"]),
        (torch.nn.Linear(2, 2).requires_grad_(False), []),
        (fastremedy.nn.BatchNormReLU2d(2, affine=False), ["batch_norm_relu"]),
        (fastremedy.nn.SyncBatchNormReLU(2, affine=False), ["batch_norm_relu"]),
        (torch.nn.Sequential(torch.nn.ReLU(), fastremedy.nn.FocalLoss()), ["focal_loss"]),
        (
            torch.nn.ModuleList(
                [fastremedy.nn.SigmoidFocalLoss(), fastremedy.nn.BatchNormReLU1d(2)]
            ),
            ["clip_grad_norm", "adamw", "batch_norm_relu", "focal_loss"],
        ),
    ],
    ids=["none", "trained", "frozen", "norm", "sync-norm", "loss", "all"],
)
def test_model_needs_the_operators_of_its_modules(model: torch.nn.Module, stems: list[str]) -> None:
    assert list(fastremedy.warmup(model, "cpu")) == stems


def test_device_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = fastremedy.warmup(torch.nn.Linear(2, 2))
    assert loaded["adamw"].backend == backends.active("adamw", "cpu")


def test_chosen_backend_that_cannot_run_is_refused() -> None:
    with backends.use("torch"):
        assert fastremedy.warmup("adamw", "meta") == {"adamw": Loaded("torch", 0)}
    reason = backends.available()["cpu"]
    if reason is not None:
        pytest.skip(reason)
    with backends.use("cpu"), pytest.raises(RuntimeError, match="'cpu' was chosen but cannot run"):
        fastremedy.warmup("adamw", "meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("adam", "cpu"), ValueError, "model_or_stems must be .* stems of clip.*, got 'adam'"),
        ((["adamw", 3], "cpu"), ValueError, "model_or_stems must be .*, got 3"),
        ((3, "cpu"), TypeError, "model_or_stems must be a module or stems, got int"),
        ((None, "gpu"), ValueError, "device must be a device of torch, got 'gpu'"),
        ((None, "cuda:99"), ValueError, "device must be among the .* CUDA devices .*, got cuda:99"),
    ],
    ids=["stem", "stem-type", "type", "device", "index"],
)
def test_errors_name_the_argument(
    arguments: tuple[object, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastremedy.warmup(*arguments)  # type: ignore[arg-type]


@pytest.mark.slow
def test_step_compiles_nothing_after_warmup(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    variables = {"FASTREMEDY_BACKEND": "triton", "TRITON_CACHE_DIR": str(tmp_path)}
    output = run_python(str(HERE / "warmup_launches.py"), **variables)
    loaded, again, num_compiled, compiled_later = json.loads(output)
    assert compiled_later == []
    assert loaded == again
    assert sum(num for _, num in loaded.values()) >= num_compiled > 0
    assert list(tmp_path.iterdir())  # where the next process finds them


IMPORT = """
import sys, time, torch
before = set(sys.modules)
begin = time.process_time()
import fastremedy
print(time.process_time() - begin, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_import_is_cheap() -> None:
    runs = [run_python("-c", IMPORT).split() for _ in range(3)]
    # 0.1 s is the goal; three times as much only fails where something heavy is imported
    assert min(float(seconds) for seconds, *_ in runs) < 0.3
    heavy = {"triton", "rich", "matplotlib", "tensorboard", "sklearn"}
    assert not heavy & set(runs[0][1:])
