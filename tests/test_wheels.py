"""The wheel that ``make wheel`` gives runs elsewhere: its tag, its library, every operator."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from . import test_packaging as packaging

ROOT = packaging.ROOT
SCRIPT = ROOT / "tools" / "build_wheels.py"
PYTHON = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_wheels", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_wheel(folder: Path, *arguments: str) -> Path:
    """Run the script on a copy of the sources; return the wheel of the one Python named."""
    checkout = folder / "checkout"  # a build writes beside the sources
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for source in packaging.SOURCES:
        shutil.copytree(ROOT / source, checkout / source, ignore=ignored)
    for file in packaging.FILES:
        shutil.copy(ROOT / file, checkout)
    # What is in a wheel is asked here, not how fast it is: -O3 takes 61 s instead of 33.
    compiler = folder / "g++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    command = [sys.executable, str(checkout / "tools" / "build_wheels.py"), *arguments]
    result = subprocess.run(
        [*command, "--cpu", "--out", str(folder / "dist")],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(compiler)},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (built,) = (folder / "dist").glob("*.whl")
    assert built.name in result.stdout
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel of this Python, without CUDA."""
    for tool in ("g++", "patchelf"):
        if shutil.which(tool, path=path_with_tools()) is None:
            pytest.skip(f"{tool} is missing")
    pytest.importorskip("auditwheel")
    built = build_wheel(tmp_path_factory.mktemp("wheels"), "--here")
    assert (built.parent / f"{PYTHON}.log").exists()
    assert list(built.parent.glob("*.tar.gz"))
    return built


def path_with_tools() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an environment of its own, beside the torch of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--no-index", str(wheel)], check=True)
    # a path of a .pth file comes last, and the .pth files in it are not read
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder


def installed_library(environment: Path) -> SimpleNamespace:
    (library,) = environment.glob("lib/python*/site-packages/fastremedy/_C.*.so")
    return SimpleNamespace(__file__=str(library))


@pytest.mark.slow
@pytest.mark.abi
def test_tag_names_python_and_oldest_system(wheel: Path) -> None:
    arch = os.uname().machine
    assert re.fullmatch(rf"fastremedy-[\d.]+-{PYTHON}-{PYTHON}-manylinux\w+_{arch}.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    # nothing of torch or of the compiler was copied in
    assert [name for name in names if ".so" in name] == [
        name for name in names if name.startswith("fastremedy/_C.")
    ]


@pytest.mark.slow
@pytest.mark.abi
def test_repaired_library_needs_what_the_built_one_does(environment: Path) -> None:
    library: Any = installed_library(environment)
    packaging.test_library_needs_libtorch_and_no_cuda(library)
    packaging.test_library_uses_only_the_stable_abi(library)
    packaging.test_library_shows_nothing_but_its_entry(library)


@pytest.mark.slow
@pytest.mark.abi
def test_library_keeps_to_the_stable_abi_of_the_oldest_torch(environment: Path) -> None:
    audit = shutil.which("torch-abi-audit", path=path_with_tools())
    if audit is None:
        pytest.skip("torch-abi-audit is missing")
    command = [audit, "--check", "torch", installed_library(environment).__file__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    oldest = re.search(r"Min torch: +(\d+)\.(\d+)", result.stdout)
    assert oldest is not None, result.stdout
    assert (int(oldest[1]), int(oldest[2])) <= (2, 11), result.stdout


@pytest.mark.slow
def test_every_operator_runs_from_the_installed_wheel(environment: Path, tmp_path: Path) -> None:
    command = [str(environment / "bin" / "python"), "-I", "-W", "error"]
    command += [str(ROOT / "tests" / "every_operator.py"), "cpu"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(str(environment))


def test_torch_is_that_of_the_makefile(script: ModuleType) -> None:
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", script.makefile_torch())


def test_pythons_are_found_by_version_and_by_path(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python3.12").symlink_to(sys.executable)
    run = f'[ "$PYENV_VERSION" = 3.13 ] && exec {sys.executable} "$@"'
    for name in ("python3.11", "python3.13"):
        shim = tmp_path / name  # as of pyenv, which has 3.13 installed and switched off
        shim.write_text(f"#!/bin/sh\n{run}\nexit 127\n")
        shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert script.find_python("3.12") is not None
    assert script.find_python("3.13") is not None
    assert script.find_python("3.11") is None
    assert script.find_python("3.14") is None
    assert script.find_python(sys.executable) == Path(sys.executable)


def test_missing_python_is_told(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", os.devnull + "/nowhere"]
    with pytest.raises(SystemExit, match="2"):
        script.main(["--here", "--python", "3.12", *out])
    assert "--here takes neither --python nor --torch" in capsys.readouterr().err


def test_lacked_pythons_are_named(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(script, "find_python", lambda name: None)
    assert script.main(["--out", str(tmp_path)]) == 1
    output = capsys.readouterr().out
    assert output == "not there: " + ", ".join(f"Python {v}" for v in script.VERSIONS) + "\n"


def test_failed_command_shows_the_end_of_its_log(script: ModuleType, tmp_path: Path) -> None:
    job = script.Job("cp39", tmp_path / "log")
    code = "print('[3/7] c++'); print('last words'); raise SystemExit(3)"
    with pytest.raises(script.BuildError, match="last words"):
        job.run(sys.executable, "-c", code)
    assert "last words" in (tmp_path / "log").read_text()
