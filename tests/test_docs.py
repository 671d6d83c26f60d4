"""What the documentation says runs, and its numbers are those of the result files."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastremedy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = code_blocks(README, "python")
    assert blocks
    namespace: dict[str, Any] = {}
    for block in blocks:  # one after the other, as they are read
        exec(compile(block, "README.md", "exec"), namespace)
    assert "tensor(" in capsys.readouterr().out


def test_before_and_after_of_the_readme_train_alike() -> None:
    (diff,) = code_blocks(README, "diff")
    assert len(diff.splitlines()) == 5
    results = []
    for mark in "-+":
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 4)
        namespace = {
            "torch": torch,
            "fastremedy": fastremedy,
            "model": model,
            "loss_function": torch.nn.functional.mse_loss,
        }
        lines = [line[1:] for line in diff.splitlines() if line[0] in (mark, " ")]
        exec(lines[0], namespace)
        for scale in (30.0, 0.1, 3.0):  # some gradients are clipped, some are not
            namespace["inputs"] = scale * torch.randn(16, 8)
            namespace["targets"] = scale * torch.randn(16, 4)
            model.zero_grad()
            exec("\n".join(lines[1:]), namespace)
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results)


MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(fastremedy.__path__, "fastremedy.")
    if not name.startswith(("fastremedy._", "fastremedy.triton_kernels"))
]


@pytest.mark.parametrize("name", ["fastremedy", *MODULES])
def test_examples_in_docstrings(name: str) -> None:
    torch.manual_seed(0)
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


PUBLIC = [
    "clip_",
    "grad_norm",
    "clip_value_",
    "optim.Adam",
    "optim.AdamW",
    "functional.batch_norm_relu",
    "nn.BatchNormReLU1d",
    "nn.BatchNormReLU2d",
    "nn.BatchNormReLU3d",
    "nn.SyncBatchNormReLU",
    "nn.fuse_",
    "functional.sigmoid_focal_loss",
    "functional.focal_loss",
    "nn.SigmoidFocalLoss",
    "nn.FocalLoss",
    "nn.class_balanced_alpha",
    "stats.Statistics",
    "stats.Monitor",
    "amp.GradScaler",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_is_complete(name: str) -> None:
    obj: Any = fastremedy
    for part in name.split("."):
        obj = getattr(obj, part)
    assert "Equivalent to:" in obj.__doc__
    assert ">>> " in obj.__doc__
    assert name.split(".")[-1] in README


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    # `csrc/core/adamw.h` but not `csrc/core/<stem>.h`
    for name in re.findall(r"`([\w.]+/[\w./]*)`", path.read_text()):
        assert (ROOT / name).exists(), name


def test_make_targets_of_the_documents_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in DOCUMENTS:
        assert set(re.findall(r"\bmake (\w+)", path.read_text())) <= targets


def run_table(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "table.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_numbers_of_the_readme_are_those_of_the_results() -> None:
    result = run_table("--check")
    assert result.returncode == 0, result.stderr


def test_every_result_has_its_origin() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        report = json.loads(path.read_text())
        assert report["machine"]["name"] == path.stem
        assert report["commit"] != "unknown"
        for part in ("versions", "date", "command"):
            assert report[part], path.name


def test_benchmarks_fill_the_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-k", "cpu-1000x1 or groups"]
    options = ["--rounds=2", f"--benchmark-json={tmp_path / 'machine.json'}"]
    # a run of its own, even if this one is a worker of pytest-xdist
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    result = subprocess.run(
        [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    text = table.tables(tmp_path)
    for title in ("clip + AdamW step (cpu)", "465 groups", "`clip_`, clips", "within the limit"):
        assert title in text
    row = next(line for line in text.splitlines() if line.startswith("| 1000 x 1 |"))
    size, *numbers = [cell.strip("* ") for cell in row.strip("|").split("|")]
    ours, fused, _, ratio = map(float, numbers)
    assert size == "1000 x 1"
    assert ratio == pytest.approx(fused / ours, rel=0.02)  # of three digits each
    assert table.replace_tables(f"a{table.BEGIN}old{table.END}b", "new").count("new") == 1
