"""Every backend behind the same tests: on a GPU if there is one, otherwise on the CPU.

Without a GPU the CUDA kernels run in the emulation of csrc/emulation, built here once, and the
Triton kernels in Triton's interpreter. With ``FASTREMEDY_REQUIRE_CUDA=1`` a missing GPU is a
failure.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest

# Workers of pytest-xdist share the cores: with the threads of all of them on each core, tests take
# half as long again. Those about threads set their number.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // WORKERS)))

import torch  # noqa: E402

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None

import fastremedy  # noqa: E402
from fastremedy import _native  # noqa: E402
from fastremedy.ops import memory  # noqa: E402

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"


def patch_language_once() -> None:
    """Keep Triton's interpreter from patching its language again in every call of a helper.

    A launch has done that and undoes it at its end; doing it again is a third of the time of the
    tests of Triton kernels.
    """
    patch = interpreter._patch_lang
    scope: Any = None
    modules: set[int] = set()  # whose functions find a patched language

    def once(fn: FunctionType) -> object:
        nonlocal scope
        if scope is None or not scope._changes:  # none is left after a launch
            scope = patch(fn)
            modules.clear()
        elif id(fn.__globals__) not in modules:
            patch(fn)
        modules.add(id(fn.__globals__))
        return scope

    interpreter._patch_lang = once


if interpreter is not None and hasattr(interpreter, "_LangPatchScope"):
    patch_language_once()


def cuda_include() -> Path | None:
    """Return the folder of CUDA's headers, None if there is none."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc is not None:
        homes.append(str(Path(nvcc).resolve().parents[1]))
    for home in homes:
        if home and (Path(home) / "include" / "cuda_runtime_api.h").exists():
            return Path(home) / "include"
    return None


def require_cuda_include() -> Path:
    """Return CUDA's headers; skip without them, but fail where nvcc says they should be there."""
    include = cuda_include()
    if include is None:
        reason = "CUDA's headers are missing: the emulation needs their types"
        if shutil.which("nvcc") is not None:
            pytest.fail(reason + ", and nvcc is on PATH")
        pytest.skip(reason)
    return include


@pytest.fixture(scope="session")
def cuda_emulation() -> ModuleType:
    """Build csrc/host and csrc/cuda for the CPU; load the result as a module."""
    include = require_cuda_include()
    sources = sorted([*CSRC.glob("host/*.cpp"), *CSRC.glob("cuda/*.cu")])
    digest = hashlib.sha256(sys.version.encode() + torch.__version__.encode())
    for file in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh"), *sources]):
        digest.update(file.read_bytes())
    folder = ROOT / "build" / f"emulation-{digest.hexdigest()[:16]}"
    library = folder / "_emulation.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of pytest-xdist come at the same time
        if not library.exists():
            _build_emulation(sources, include, library)
    loader = importlib.machinery.ExtensionFileLoader("_emulation", str(library))
    spec = importlib.util.spec_from_loader("_emulation", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def _build_emulation(sources: list[Path], include: Path, library: Path) -> None:
    import pybind11

    # -fno-strict-aliasing: vector accesses read 16-bit elements as 16 bytes, as CUDA allows.
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"]
    flags.append("-DFASTREMEDY_EMULATION")
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        # nvcc fuses multiplication and addition, too; of -O1 that is no part.
        flags += ["-mfma", "-fexpensive-optimizations"]
    # DLPack's header comes with torch.
    torch_include = Path(torch.__file__).parent / "include"
    includes = [pybind11.get_include(), sysconfig.get_path("include"), torch_include, include]
    flags += [part for path in includes for part in ("-isystem", str(path))]

    def compile(source: Path) -> str:
        output = library.with_name(f"{source.parent.name}_{source.stem}.o")
        command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(output)]
        subprocess.run(command, check=True)
        return str(output)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile, sources))
    subprocess.run(["g++", "-shared", *objects, "-o", str(library), "-pthread"], check=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow ones, so that no worker has one left at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(params=["torch", "cpu", "cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with every backend."""
    name: str = request.param
    if name in ("cuda", "triton") and not HAS_GPU and os.environ.get("FASTREMEDY_REQUIRE_CUDA"):
        pytest.fail("FASTREMEDY_REQUIRE_CUDA is set and torch sees no CUDA device")
    if name == "triton":
        pytest.importorskip("triton")
    if name == "cuda" and not HAS_GPU:
        _native.emulate_cuda(request.getfixturevalue("cuda_emulation"))
    try:
        with fastremedy.backends.use(name):
            yield name
    finally:
        _native.emulate_cuda(None)


@pytest.fixture
def device(backend: str) -> torch.device:
    """Return the device whose tensors the backend takes."""
    return torch.device("cuda" if HAS_GPU and backend in ("cuda", "triton") else "cpu")


@pytest.fixture
def gpu() -> torch.device:
    """Return the device of a test that only a GPU can run."""
    if not HAS_GPU:
        missing = pytest.fail if os.environ.get("FASTREMEDY_REQUIRE_CUDA") else pytest.skip
        missing("needs a GPU")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _blocks_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small results, too, lie in memory that others have left, with their numbers in it."""
    monkeypatch.setattr(memory, "BLOCK_BYTES", 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
