"""Which backend runs an operator, and how to choose one.

========  ==============================  ==================================================
name      runs                            chosen for
========  ==============================  ==================================================
cuda      kernels of the native library   CUDA tensors
triton    Triton kernels                  CUDA tensors where the native library has none
cpu       kernels of the native library   CPU tensors
torch     plain torch                     everything else; always there
========  ==============================  ==================================================

An explicit choice (:class:`use` or the environment variable ``FASTREMEDY_BACKEND``) succeeds or
raises with the reason; without one the first backend of the table that can run does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from types import TracebackType

import torch

from . import _native

NAMES = ("cuda", "triton", "cpu", "torch")
STEMS = ("clip_grad_norm", "adamw", "batch_norm_relu", "focal_loss", "activation_stats")

_environment = os.environ.get("FASTREMEDY_BACKEND") or None
_chosen: str | None = None


def choice() -> str | None:
    """Return the backend that was chosen explicitly, None if the choice is automatic."""
    return _chosen or _environment


def _cuda_reason() -> str | None:
    if _native.cuda_emulation() is not None:
        return None
    library = _native.library()
    if library is None:
        return _native.error
    if not library.has_cuda:
        return "the native library was built without nvcc"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


@functools.cache
def _reason_of_gpu(index: int) -> str | None:
    """Ask the runtime of the native library, which may want a newer driver or GPU than torch's."""
    try:
        _native.module_for("cuda").check_cuda_device(index)
    except RuntimeError as error:
        return f"the native library's kernels do not run on cuda:{index}: {error}"
    return None


def _triton_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "No module named 'triton'"
    if not torch.cuda.is_available() and not _triton_interprets():
        return "torch sees no CUDA device (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
    return None


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _cpu_reason() -> str | None:
    return None if _native.library() is not None else _native.error


def available() -> dict[str, str | None]:
    """Return every backend by name, with None if it can run here or else the reason why not.

    Example:
        >>> import fastremedy
        >>> fastremedy.backends.available()["torch"] is None
        True
    """
    return {
        "cuda": _cuda_reason(),
        "triton": _triton_reason(),
        "cpu": _cpu_reason(),
        "torch": None,
    }


def reason_against(name: str, device: torch.device | str) -> str | None:
    """Return why a backend cannot take tensors of a device, or None if it can."""
    if name == "torch":
        return None
    if name == "cuda":
        wanted = "cpu" if _native.cuda_emulation() is not None else "cuda"
        reason = _cuda_reason()
    elif name == "triton":
        wanted = "cpu" if _triton_interprets() else "cuda"
        reason = _triton_reason()
    else:
        wanted, reason = "cpu", _cpu_reason()
    device_type = _type_of(device)
    if reason is None and device_type != wanted:
        reason = f"it runs on {wanted} tensors, got {device_type}"
    if reason is None and name == "cuda" and device_type == "cuda":
        index = torch.device(device).index
        reason = _reason_of_gpu(torch.cuda.current_device() if index is None else index)
    return reason


def _type_of(device: torch.device | str) -> str:
    if device in ("cpu", "cuda"):
        return str(device)
    return device.type if isinstance(device, torch.device) else torch.device(device).type


def active(stem: str, device: torch.device | str) -> str:
    """Return the name of the backend that would run an operator on a device.

    Args:
        stem: operator, one of ``fastremedy.backends.STEMS``.
        device: where the tensors are.

    Raises:
        ValueError: unknown stem.
        RuntimeError: a backend was chosen that cannot run there.

    Example:
        >>> import fastremedy
        >>> with fastremedy.backends.use("torch"):
        ...     fastremedy.backends.active("adamw", "cpu")
        'torch'
    """
    if stem not in STEMS:
        raise ValueError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
    chosen = choice()
    if chosen is not None:
        _check_name(chosen, "FASTREMEDY_BACKEND")
        reason = reason_against(chosen, device)
        if reason is not None:
            raise RuntimeError(f"backend {chosen!r} was chosen but cannot run {stem}: {reason}")
        return chosen
    # Interpreted and emulated kernels are for tests: only an explicit choice runs them.
    device_type = _type_of(device)
    if device_type == "cpu":
        return "cpu" if _cpu_reason() is None else "torch"
    for name in ("cuda", "triton") if device_type == "cuda" else ():
        if reason_against(name, device) is None:
            return name
    return "torch"


def _check_name(name: str, argument: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}, got {name!r}")


class use:
    """Choose the backend, from now on or inside a ``with`` block.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"torch"``, or None for the automatic choice.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend cannot run on this machine; the message says why.

    Example:
        >>> import fastremedy
        >>> with fastremedy.backends.use("torch"):
        ...     pass  # everything in here runs plain torch
    """

    def __init__(self, name: str | None) -> None:
        """Switch to the backend."""
        global _chosen
        if name is not None:
            _check_name(name, "backend")
            reason = available()[name]
            if reason is not None:
                raise RuntimeError(f"backend {name!r} is not available: {reason}")
        self._previous = _chosen
        _chosen = name

    def __enter__(self) -> use:
        """Return self: the choice was made on construction."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Go back to the choice before."""
        global _chosen
        _chosen = self._previous
