"""What a bug report needs: versions, devices, and which backend runs what."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from . import _native, backends
from ._version import __version__

_ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "FASTREMEDY_BACKEND", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options: the whole text belongs in the report."""


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    print(report())
    return 0


def report() -> str:
    """Return the report as plain text."""
    return "\n".join([*_versions(), "", *_native_library(), "", *_operators()])


def versions() -> dict[str, str | None]:
    """Return the versions that decide what runs; None for what is missing."""
    return {
        "fastremedy": __version__,
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "triton": _version_of("triton"),
        "Python": platform.python_version(),
    }


def cpu_name() -> str:
    """Return the processor's name as its maker spells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[str]:
    for name, version in versions().items():
        yield f"{name + ':':<15} {version or 'none'}"
    yield f"{'platform:':<15} {platform.platform()}"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"{'CPU:':<15} {cpu_name()}, {capability}, {torch.get_num_threads()} threads"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield f"{f'cuda:{index}:':<15} {gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"
    for name in _ENVIRONMENT:
        if name in os.environ:
            yield f"{name}={os.environ[name]}"


def _native_library() -> Iterator[str]:
    library = _native.library()
    if library is None:
        yield f"native library: none, because {_native.error}"
        return
    archs = getattr(library, "cuda_archs", "unknown architectures")
    kernels = f"CUDA kernels for {archs}" if library.has_cuda else "no CUDA kernels"
    yield f"native library: {library.__file__}, {kernels}"


def _operators() -> Iterator[str]:
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for stem in backends.STEMS:
        for device in devices:
            try:
                runs = backends.active(stem, device)
            except (RuntimeError, ValueError) as error:  # FASTREMEDY_BACKEND cannot be followed
                runs = f"nothing: {error}"
            yield f"{stem} on {device} runs {runs}"
            for name in backends.NAMES:
                if name != runs:
                    reason = backends.reason_against(name, device)
                    yield f"    not {name}: {reason or 'it could, but is not the choice'}"
