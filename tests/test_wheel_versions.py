"""The wheel of each Python runs on every torch, in environments that pip makes from the network.

Each takes gigabytes and minutes, so only ``FASTREMEDY_DOWNLOADS=1`` runs them; ``-k 3.12-2.11`` is
one of them. They are removed at once.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from .test_packaging import ROOT
from .test_wheels import build_wheel, script

__all__ = ["script"]  # a fixture

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
NEWEST = "newest"
TORCHS = ("2.11", "2.13", NEWEST)
BACKENDS = ("cpu", "torch", "triton")
# Triton 3.6 interprets with int() of arrays, which NumPy deprecates and refuses from 2.4 on
NUMPY = "numpy<2.4"
WARNINGS = (
    "error",
    "ignore:Conversion of an array:DeprecationWarning",
    "ignore::RuntimeWarning:triton.runtime.interpreter",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        not os.environ.get("FASTREMEDY_DOWNLOADS"),
        reason="installs every torch for every Python, gigabytes: ask with FASTREMEDY_DOWNLOADS=1",
    ),
]


@pytest.fixture(scope="module", params=PYTHONS)
def base(request: pytest.FixtureRequest, script: ModuleType) -> Path:
    python: Path | None = script.find_python(request.param)
    if python is None:
        pytest.skip(f"Python {request.param} is not there")
    return python


@pytest.fixture(scope="module")
def wheel(base: Path, script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = script.makefile_torch()
    return build_wheel(tmp_path_factory.mktemp("wheels"), f"--python={base}", f"--torch={torch}")


@pytest.fixture
def python(base: Path) -> Iterator[Path]:
    """Return the interpreter of an empty environment."""
    with tempfile.TemporaryDirectory(prefix="fastremedy-") as folder:
        subprocess.run([base, "-m", "venv", folder], check=True)
        yield Path(folder) / "bin" / "python"


@pytest.mark.parametrize("torch", TORCHS)
def test_every_operator_runs(python: Path, wheel: Path, torch: str) -> None:
    release = "torch" if torch == NEWEST else f"torch=={torch}.*"
    install = [python, "-m", "pip", "install", "--quiet", release, f"{wheel}[triton]", NUMPY]
    subprocess.run(install, check=True)
    for backend in BACKENDS:
        environment = {**os.environ, "FASTREMEDY_BACKEND": backend, "TRITON_INTERPRET": "1"}
        command = [python, "-I", *(f"-W{filter}" for filter in WARNINGS)]
        command += [ROOT / "tests" / "every_operator.py", backend]
        result = subprocess.run(
            command, cwd=python.parent, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{backend}: {result.stderr}"
        assert result.stdout.startswith(str(python.parents[1]))
