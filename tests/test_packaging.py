"""What is built, and what the built library and the wheel depend on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import fastremedy
from fastremedy import _native

ROOT = Path(__file__).parent.parent
SOURCES = ("benchmarks", "csrc", "fastremedy", "tests", "tools", "triton_kernels")
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the sources: a build writes beside them."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    return copy


def build_wheel(checkout: Path, build: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", "dist", "."]
    environment = {**os.environ, "FASTREMEDY_BUILD": build}
    subprocess.run(command, cwd=checkout, env=environment, check=True)
    (wheel,) = (checkout / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


def run_from(folder: Path, code: str) -> str:
    """Run Python code in a process that finds fastremedy in ``folder``, and warns of nothing."""
    # -S leaves out the .pth files, the one of an editable install among them
    command = [sys.executable, "-S", "-W", "error", "-c", code]
    path = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


STEP = """
import torch, fastremedy
from fastremedy import _native, backends, triton_kernels
param = torch.nn.Parameter(torch.ones(5))
param.grad = torch.full((5,), 2.0)
fastremedy.optim.AdamW([param], max_grad_norm=1.0).step()
print(fastremedy.__file__, backends.active("adamw", "cpu"), param.sum().item() < 5)
"""


def test_wheel_without_native_library(checkout: Path, tmp_path: Path) -> None:
    wheel = build_wheel(checkout, "none")
    names = wheel.namelist()
    assert "none-any" in str(wheel.filename)
    expected = {
        *(str(path.relative_to(ROOT)) for path in (ROOT / "fastremedy").rglob("*.py")),
        *(f"fastremedy/{path.relative_to(ROOT)}" for path in ROOT.glob("triton_kernels/**/*.py")),
        "fastremedy/py.typed",
    }
    assert expected == {name for name in names if ".dist-info/" not in name}
    wheel.extractall(tmp_path / "site")
    file, backend, is_updated = run_from(tmp_path / "site", STEP).split()
    assert file.startswith(str(tmp_path))
    assert (backend, is_updated) == ("torch", "True")


def test_source_distribution_can_be_built_from(checkout: Path) -> None:
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    environment = {**os.environ, "FASTREMEDY_BUILD": "none"}
    subprocess.run([sys.executable, "-c", code], cwd=checkout, env=environment, check=True)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    shutil.unpack_archive(archive, checkout / "unpacked")
    (unpacked,) = (checkout / "unpacked").iterdir()
    for folder in ("csrc", "fastremedy", "triton_kernels"):
        here = {path.relative_to(checkout) for path in (checkout / folder).rglob("*.*")}
        there = {path.relative_to(unpacked) for path in (unpacked / folder).rglob("*.*")}
        assert here <= there
    assert (unpacked / "setup.py").exists()


def setup_py(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py far enough to choose what to build."""
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_unknown_build_is_refused() -> None:
    result = setup_py(FASTREMEDY_BUILD="fast")
    assert result.returncode != 0
    assert "FASTREMEDY_BUILD must be auto, cpu, cuda or none, got 'fast'" in result.stderr


def test_cuda_without_nvcc_is_refused() -> None:
    result = setup_py(FASTREMEDY_BUILD="cuda", CUDA_HOME="/nowhere")
    assert result.returncode != 0
    assert "FASTREMEDY_BUILD=cuda needs nvcc" in result.stderr


def test_missing_compiler_tells_what_is_lost() -> None:
    result = setup_py(FASTREMEDY_BUILD="auto", CXX="no-such-compiler")
    assert result.returncode == 0
    assert "no native library: CPU tensors will run plain torch" in result.stderr
    assert fastremedy.__version__ in result.stdout


def test_a_changed_header_compiles_the_kernels_again() -> None:
    builds = [file.read_text() for file in ROOT.glob("build/temp*/build.ninja")]
    rules = [text.partition("rule cuda_compile")[2] for text in builds]
    if not any(rules):
        pytest.skip("nothing was built with nvcc here")
    assert all("depfile = $out.d" in rule for rule in rules if rule)


def test_version_stands_once() -> None:
    assert metadata.version("fastremedy") == fastremedy.__version__


def test_torch_alone_is_needed() -> None:
    required = metadata.requires("fastremedy") or []
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.11"]


@pytest.fixture
def library() -> ModuleType:
    module = _native.library()
    if module is None:
        pytest.skip(str(_native.error))
    return module


def tool_output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is missing")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.abi
def test_library_needs_libtorch_and_no_cuda(library: ModuleType) -> None:
    lines = tool_output("readelf", "--dynamic", "--wide", str(library.__file__)).splitlines()
    needed = {line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line}
    # libtorch.so itself needs libtorch_cuda.so in a CUDA build of torch, and not in a CPU build
    assert "libtorch.so" in needed
    system = (
        "libc.so",
        "libgcc_s.so",
        "libm.so",
        "libstdc++.so",
        "ld-linux",
        "libpthread",
        "librt",
        "libdl",
    )
    assert all(name == "libtorch.so" or name.startswith(system) for name in needed), needed


@pytest.mark.abi
def test_library_uses_only_the_stable_abi(library: ModuleType) -> None:
    output = tool_output("nm", "--dynamic", "--undefined-only", "--demangle", str(library.__file__))
    symbols = [line.split(maxsplit=1)[1] for line in output.splitlines()]
    assert any(name.startswith("aoti_torch_") for name in symbols)
    unstable = ("at::", "c10::", "torch::", "typeinfo for c10", "THP", "cuda")
    assert [name for name in symbols if name.startswith(unstable)] == []


@pytest.mark.abi
def test_library_shows_nothing_but_its_entry(library: ModuleType) -> None:
    output = tool_output("nm", "--dynamic", "--defined-only", str(library.__file__))
    assert [line.split()[2] for line in output.splitlines()] == ["PyInit__C"]
