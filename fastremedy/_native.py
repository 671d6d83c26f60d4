"""The native library, if there is one, and why not otherwise."""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

_schemas = torch.library.Library("fastremedy", "FRAGMENT")
_schemas.define("_retain_tensors(Tensor[] params, Tensor[] state) -> int")

error: str | None = None


def _load() -> ModuleType | None:
    global error
    try:
        return importlib.import_module("fastremedy._C")
    except ModuleNotFoundError:
        error = "fastremedy was installed without its native library (FASTREMEDY_BUILD=none?)"
    except ImportError as cause:  # built for another Python, torch or machine
        error = f"the native library does not load: {cause}"
        warnings.warn(
            f"fastremedy: {error}. Triton or pure torch run instead, more slowly. To cure it, "
            "reinstall fastremedy for this Python and torch "
            f"(torch {torch.__version__} is here; 2.11 or newer is needed).",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


@functools.cache
def library() -> ModuleType | None:
    """Return ``fastremedy._C``, or None where :data:`error` says why."""
    return _load()


_emulation: ModuleType | None = None


def emulate_cuda(module: ModuleType | None) -> None:
    """Run the CUDA kernels on CPU tensors: for tests. ``module`` is csrc/ built with emulation."""
    global _emulation
    _emulation = module


def cuda_emulation() -> ModuleType | None:
    """Return the emulation module of :func:`emulate_cuda`."""
    return _emulation


def module_for(backend: str) -> ModuleType:
    """Return the module that holds a native backend's kernels; the backend is available."""
    module = _emulation if backend == "cuda" and _emulation is not None else library()
    assert module is not None
    return module


def is_disabled() -> bool:
    """Whether ``FASTREMEDY_BACKEND`` rules the native library out."""
    return os.environ.get("FASTREMEDY_BACKEND") in ("torch", "triton")
