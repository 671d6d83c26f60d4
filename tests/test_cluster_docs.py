"""The commands of docs/cluster.md run, as far as one machine can: Slurm is played by stubs."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "cluster.md").read_text()
SOURCES = "".join(path.read_text() for path in (ROOT / "fastremedy").glob("*.py"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def block_with(language: str, text: str) -> str:
    (found,) = [block for block in blocks(language) if text in block]
    return found


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a home with the environment and the files of the text, and stubs for a cluster."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    stubs = {"srun": 'exec "$@"', "scontrol": "echo localhost", "module": "exit 0"}
    for name, command in stubs.items():
        (binaries / name).write_text(f"#!/bin/sh\n{command}\n")
        (binaries / name).chmod(0o755)
    activate = tmp_path / "fastremedy-env" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    (tmp_path / "train.py").write_text(block_with("python", "init_process_group"))
    (tmp_path / "train.sh").write_text(block_with("bash", "#SBATCH"))
    return tmp_path


def run_bash(home: Path, *arguments: str, **variables: str) -> str:
    path = f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "HOME": str(home), "PATH": path, **variables}
    command = ["bash", "-e", *arguments]
    for _ in range(4):
        result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        # torch 2.13 with gloo aborts at the end of 1 of 6 such runs, also without fastremedy
        if "terminate called without an active exception" not in result.stderr:
            break
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("script", [*blocks("sh"), *blocks("bash")])
def test_commands_are_valid(script: str, home: Path) -> None:
    (home / "script").write_text(script)
    run_bash(home, "-n", "script")


@pytest.mark.slow
def test_slurm_script_trains(home: Path) -> None:
    job = {
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_JOB_ID": str(random.randrange(10**6)),
        "SLURM_JOB_NODELIST": "node[1]",
        "SLURM_NNODES": "1",
        "USER": "somebody",
    }
    assert "trained on 2 processes" in run_bash(home, "train.sh", **job)


@pytest.mark.slow
def test_script_trains_on_one_machine(home: Path) -> None:
    command = block_with("sh", "--standalone")
    assert "trained on 2 processes" in run_bash(home, "-c", command, OMP_NUM_THREADS="1")


def test_info_is_what_the_text_says(home: Path) -> None:
    output = run_bash(home, "-c", block_with("sh", "FASTREMEDY_BACKEND"))
    assert "adamw on cpu runs torch" in output
    for reason in re.findall(r"^\| `(.*?)` \|", TEXT, re.MULTILINE):
        assert reason.replace("runs on cuda", "runs on {wanted}") in SOURCES, reason


def test_options_of_the_commands_exist() -> None:
    arguments = [sys.executable, str(ROOT / "tools" / "build_wheels.py"), "--help"]
    known = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    for block in blocks("sh"):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(line, comments=True)
            if "tools/build_wheels.py" in words:
                given = words[words.index("tools/build_wheels.py") + 1 :]
                assert all(word in known for word in given if word.startswith("--")), line
    options = re.findall(r"ARGS=(--\w+)", TEXT)
    assert options
    assert all(option in known for option in options)


@pytest.mark.slow
def test_wheel_installs_as_the_text_says(home: Path) -> None:
    wheels = home / "wheels"
    environment = {**os.environ, "FASTREMEDY_BUILD": "none"}
    copy = home / "checkout"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.so", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(wheels), "."]
    subprocess.run(command, cwd=copy, env=environment, check=True)
    shutil.rmtree(home / "fastremedy-env")  # the text makes it
    lines = block_with("sh", "--system-site-packages").splitlines()
    last = lines.pop()
    assert last == "python -m fastremedy info"
    for wheel in wheels.iterdir():
        shutil.copy(wheel, home)
    site = "import site; print(site.getsitepackages()[0])"
    torch = f"echo {Path(sys.executable).parent.parent}/lib/python*/site-packages"
    beside = f'{torch} > "$(python -c {shlex.quote(site)})/torch.pth"'  # torch of the module
    output = run_bash(home, "-c", "\n".join([*lines, beside, "cd /", last]), PYTHONPATH="")
    assert "native library: none" in output


def test_no_registry_is_named() -> None:
    assert not re.search(r"https?://|\b\w+\.(io|org|com)\b", TEXT)
