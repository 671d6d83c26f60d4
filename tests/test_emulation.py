"""The CUDA kernels on the CPU, under the sanitizers.

``csrc/emulation/check*.cpp`` hold the kernels to plain loops: values, what lies around the buffers,
and that nothing depends on the number of blocks. AddressSanitizer sees an access outside a buffer,
the fibers a barrier that some threads never reach, and ThreadSanitizer a missing barrier or fence.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
CHECKS = sorted((CSRC / "emulation").glob("check*.cpp"))
KERNELS = [CSRC / "cuda" / "device.cu"] + [
    CSRC / "cuda" / f"{check.stem.removeprefix('check_')}.cu"
    for check in CHECKS
    if check.stem != "check"
]

FLAGS = [
    "-std=c++17",
    "-g1",  # lines of the report
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-fno-strict-aliasing",  # kernels read 16-bit elements as 16 bytes, as CUDA allows
    "-ffp-contract=off",  # the check repeats the formula and expects the same bits
    "-pthread",
    "-DFASTREMEDY_EMULATION",
]
# -Og compiles as fast as -O0 and runs in half the time.
SANITIZERS = {
    "address": ["-Og", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread", "-DFASTREMEDY_EMULATION_THREADS"],
}
ENVIRONMENT = {
    # Fibers switch stacks, which a fake stack and the search for leaks do not follow.
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command with the sanitizers' options; return its output and exit status."""
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
    )


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_kernels_under_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    compiler = [os.environ.get("CXX", "g++"), *FLAGS, *SANITIZERS[sanitizer], "-x", "c++"]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no compiler: {compiler[0]} is not on PATH")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    works = run(*compiler, empty, "-o", tmp_path / "empty")
    if works.returncode == 0:
        works = run(tmp_path / "empty")
    if works.returncode != 0:
        pytest.skip(f"the compiler has no {sanitizer} sanitizer that runs here: {works.stderr}")

    built = run(*compiler, *CHECKS, *KERNELS, "-o", tmp_path / "check")
    assert built.returncode == 0, built.stderr
    checked = run(tmp_path / "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
