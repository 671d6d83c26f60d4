"""An operator is a stem, a backend is a folder, and the borders between the folders hold."""

from __future__ import annotations

import ast
import re
from importlib import metadata
from pathlib import Path

import pytest

from fastremedy import backends

ROOT = Path(__file__).parent.parent
NATIVE = sorted(
    path for suffix in ("h", "cuh", "cpp", "cu") for path in (ROOT / "csrc").rglob(f"*.{suffix}")
)
PYTHON = sorted([*(ROOT / "fastremedy").rglob("*.py"), *(ROOT / "triton_kernels").rglob("*.py")])


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("stem", backends.STEMS)
@pytest.mark.parametrize(
    "rooms",
    [
        ["fastremedy/ops/{}.py"],
        ["csrc/core/{}.h"],
        ["csrc/cpu/{}.cpp"],
        ["csrc/cuda/{}.cu"],
        ["csrc/ops/{}.cpp", "csrc/host/{}.cpp"],
        ["triton_kernels/{}.py"],
        ["tests/test_{}.py"],
        ["benchmarks/bench_{}.py"],
    ],
    ids=lambda rooms: " or ".join(rooms),
)
def test_stem_has_its_rooms(stem: str, rooms: list[str]) -> None:
    assert any((ROOT / room.format(stem)).is_file() for room in rooms)


def test_no_operator_without_stem() -> None:
    # cpu/ and cuda/ hold shared files too; a formula, a test and a benchmark belong to one stem
    formulas = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")}
    assert formulas == {f"bench_{stem}" for stem in backends.STEMS}


TORCH_INCLUDE = re.compile(r'#\s*include\s*[<"]((?:torch|ATen|c10)/[^>"]*)')


@pytest.mark.parametrize("folder", ["core", "cpu", "cuda", "host", "emulation"])
def test_only_ops_includes_torch(folder: str) -> None:
    # DLPack's own header comes with torch; it declares plain structs
    allowed = {"ATen/dlpack.h"} if folder == "host" else set()
    files = [path for path in NATIVE if path.parent.name == folder]
    assert files
    for path in files:
        assert set(TORCH_INCLUDE.findall(path.read_text())) <= allowed, relative(path)


def test_ops_includes_only_the_stable_abi() -> None:
    stable = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
    for path in NATIVE:
        if path.parent.name == "ops":
            for header in TORCH_INCLUDE.findall(path.read_text()):
                assert header.startswith(stable), relative(path)


def test_the_formula_touches_no_cuda_and_no_memory() -> None:
    for path in (ROOT / "csrc" / "core").iterdir():
        assert not re.search(r"cuda\w*\(|<<<|threadIdx|blockIdx|#include <cuda", path.read_text())


@pytest.mark.parametrize("path", [*NATIVE, *PYTHON], ids=relative)
def test_file_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_nothing_imports_triton_kernels_by_its_folder_name(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        assert "triton_kernels" not in [name.split(".")[0] for name in names]


def test_only_fastremedy_is_installed_at_top_level() -> None:
    top_level = metadata.distribution("fastremedy").read_text("top_level.txt")
    assert top_level is not None
    assert top_level.split() == ["fastremedy"]


def test_triton_kernels_refuse_their_folder_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=r"fastremedy\.triton_kernels"):
        __import__("triton_kernels")
