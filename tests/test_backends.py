"""Choosing a backend, explicitly or not, and a native library that is missing or broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

import fastremedy
from fastremedy import _native, backends

PACKAGE = Path(fastremedy.__file__).parent

TRAIN_A_STEP = """
import torch, fastremedy
weight = torch.nn.Parameter(torch.zeros(2))
weight.grad = torch.tensor([3.0, 4.0])
assert fastremedy.clip_(weight, 1.0).item() == 5.0
fastremedy.optim.AdamW([weight], lr=0.1, max_grad_norm=1.0).step()
torch.testing.assert_close(weight.detach(), torch.tensor([-0.1, -0.1]), rtol=1e-4, atol=0)
"""


def run_python(
    code: str, cwd: Path | None = None, pythonpath: Path = PACKAGE.parent, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with the package of ``pythonpath``."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTREMEDY_", "TRITON_"))}
    env.update(PYTHONPATH=str(pythonpath), PYTHONDONTWRITEBYTECODE="1", **environment)
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)


def assert_runs(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stderr


@pytest.fixture
def package_copy(tmp_path: Path) -> Path:
    """Return a folder with the package but without its native library."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "fastremedy", ignore=ignored)
    return tmp_path


def test_available_names_every_backend() -> None:
    available = backends.available()
    assert tuple(available) == backends.NAMES
    assert available["torch"] is None
    for reason in available.values():
        assert reason is None or len(reason) > 10


def test_the_backend_under_test_runs(backend: str, device: torch.device) -> None:
    assert backends.available()[backend] is None
    for stem in backends.STEMS:
        assert backends.active(stem, device) == backend
        assert backends.active(stem, device.type) == backend


def test_automatic_choice_on_the_cpu() -> None:
    expected = "cpu" if _native.library() is not None else "torch"
    for stem in backends.STEMS:
        assert backends.active(stem, "cpu") == expected
        assert backends.active(stem, "meta") == "torch"


def test_use_in_a_block_and_nested() -> None:
    automatic = backends.active("adamw", "cpu")
    with backends.use("torch"):
        assert backends.active("adamw", "cpu") == "torch"
        with backends.use(None):
            assert backends.active("adamw", "cpu") == automatic
        assert backends.active("adamw", "cpu") == "torch"
    assert backends.choice() is None


def test_use_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), backends.use("torch"):
        raise KeyError
    assert backends.choice() is None


def test_use_as_a_function_lasts() -> None:
    try:
        backends.use("torch")
        assert backends.active("clip_grad_norm", "cpu") == "torch"
    finally:
        backends.use(None)
    assert backends.choice() is None


@pytest.mark.parametrize("name", ["gpu", "", "CPU"])
def test_unknown_backend(name: str) -> None:
    message = f"backend must be one of cuda, triton, cpu, torch, got '{name}'"
    with pytest.raises(ValueError, match=message):
        backends.use(name)
    assert backends.choice() is None


def test_unknown_stem() -> None:
    stems = ", ".join(backends.STEMS)
    with pytest.raises(ValueError, match=f"stem must be one of {stems}, got 'adam'"):
        backends.active("adam", "cpu")


def test_explicit_choice_raises_where_it_cannot_run() -> None:
    param = torch.zeros(3, device="meta", requires_grad=True)
    param.grad = torch.zeros(3, device="meta")
    with backends.use("cpu"):
        message = "backend 'cpu' was chosen but cannot run clip_grad_norm: .*cpu tensors, got meta"
        with pytest.raises(RuntimeError, match=message):
            fastremedy.clip_(param, 1.0)
        with pytest.raises(RuntimeError, match="backend 'cpu' was chosen but cannot run adamw"):
            fastremedy.optim.AdamW([param]).step()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_cuda_without_a_gpu_says_why() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: "):
        backends.use("cuda")
    assert backends.choice() is None


def test_gpu_that_the_kernels_do_not_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver, say, may serve torch and be too old for the kernels' runtime."""
    asked = []

    def check_cuda_device(index: int) -> None:
        asked.append(index)
        if index == 1:
            raise RuntimeError("CUDA error: CUDA driver version is insufficient")

    library = types.SimpleNamespace(has_cuda=True, check_cuda_device=check_cuda_device)
    monkeypatch.setattr(_native, "library", lambda: library)
    monkeypatch.setattr(backends, "_triton_reason", lambda: None)
    monkeypatch.setattr(backends, "_triton_interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    backends._reason_of_gpu.cache_clear()
    try:
        for _ in range(2):
            assert backends.active("adamw", torch.device("cuda", 0)) == "cuda"
            assert backends.active("adamw", "cuda:0") == "cuda"
            assert backends.active("adamw", torch.device("cuda", 1)) == "triton"
            assert backends.active("adamw", "cuda") == "triton"
        with backends.use("cuda"), pytest.raises(RuntimeError, match="cuda:1: CUDA error: CUDA dr"):
            backends.active("adamw", "cuda")
        assert asked == [0, 1]
    finally:
        backends._reason_of_gpu.cache_clear()


def test_chosen_backend_reaches_other_threads() -> None:
    seen = []
    with backends.use("torch"):
        thread = threading.Thread(target=lambda: seen.append(backends.active("adamw", "cpu")))
        thread.start()
        thread.join()
    assert seen == ["torch"]


def test_environment_chooses_and_use_wins_over_it() -> None:
    code = """
import fastremedy
with fastremedy.backends.use("cpu"):
    assert fastremedy.backends.active("adamw", "cpu") == "cpu"
assert fastremedy.backends.active("adamw", "cpu") == "torch"
"""
    assert_runs(run_python(code + TRAIN_A_STEP, FASTREMEDY_BACKEND="torch"))


def test_unknown_backend_in_the_environment() -> None:
    result = run_python(TRAIN_A_STEP, FASTREMEDY_BACKEND="gpu")
    message = "ValueError: FASTREMEDY_BACKEND must be one of cuda, triton, cpu, torch, got 'gpu'"
    assert message in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backend_in_the_environment_that_cannot_run(name: str) -> None:
    result = run_python(TRAIN_A_STEP, FASTREMEDY_BACKEND=name)
    message = f"RuntimeError: backend '{name}' was chosen but cannot run clip_grad_norm: "
    assert message in result.stderr
    assert result.stderr.rstrip().splitlines()[-1].startswith(message)


def test_missing_library() -> None:
    code = """
import sys, warnings
sys.modules["fastremedy._C"] = None  # importing it raises ModuleNotFoundError
warnings.simplefilter("error")
import fastremedy
assert fastremedy.backends.active("adamw", "cpu") == "torch"
assert "without its native library" in fastremedy.backends.available()["cpu"]
try:
    fastremedy.backends.use("cpu")
except RuntimeError as error:
    assert "without its native library" in str(error)
else:
    raise AssertionError
"""
    assert_runs(run_python(code + TRAIN_A_STEP))


def test_broken_library_warns_once_then_torch_runs(package_copy: Path) -> None:
    (package_copy / "fastremedy" / "_C.so").write_bytes(b"no library")
    code = (
        """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastremedy
    for _ in range(3):
        assert fastremedy.backends.active("adamw", "cpu") == "torch"
        assert "does not load" in fastremedy.backends.available()["cpu"]
"""
        + "\n".join("    " + line for line in TRAIN_A_STEP.splitlines())
        + """
ours = [w for w in caught if "fastremedy" in str(w.message)]
assert [w.category for w in ours] == [RuntimeWarning], caught
text = str(ours[0].message)
for part in ("_C.so", "reinstall fastremedy", "torch " + torch.__version__):
    assert part in text, (part, text)
try:
    fastremedy.backends.use("cpu")
except RuntimeError as error:
    assert "does not load" in str(error)
else:
    raise AssertionError
"""
    )
    assert_runs(run_python(code, cwd=package_copy, pythonpath=package_copy))


def test_a_broken_library_is_not_touched_when_torch_is_chosen(package_copy: Path) -> None:
    (package_copy / "fastremedy" / "_C.so").write_bytes(b"no library")
    code = 'import warnings; warnings.simplefilter("error")' + TRAIN_A_STEP
    assert_runs(
        run_python(code, cwd=package_copy, pythonpath=package_copy, FASTREMEDY_BACKEND="torch")
    )


def test_import_loads_torch_alone_and_empty_environment_is_no_choice() -> None:
    code = """
import sys, fastremedy
heavy = {"triton", "rich", "matplotlib", "sklearn", "tensorboard", "pandas"} & set(sys.modules)
assert not heavy, heavy
assert fastremedy.backends.choice() is None
"""
    assert_runs(run_python(code, FASTREMEDY_BACKEND=""))
