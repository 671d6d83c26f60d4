"""The step of torch's own class, for what no kernel updates."""

from __future__ import annotations

import inspect
import sys
import warnings
from types import FrameType

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..ops import shards
from ..ops.table import Group

REFUSAL = (
    "parameters that wrap other tensors, unless as DTensor, run torch's own update, "
    "which has no max_grad_norm, nonfinite or low_precision"
)
WARNING = "fastremedy: parameters that wrap other tensors run torch's own update"

# Without the wrapper that torch puts around the step of every class it instantiates: ours has one.
step = inspect.unwrap(torch.optim.Adam.step, stop=lambda f: not hasattr(f, "hooked"))


def warn() -> None:
    """Tell who called the step, past its wrappers: of hooks, schedulers and gradient scalers."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and _owner(frame) in ("torch", "fastremedy"):
        frame, level = frame.f_back, level + 1
    warnings.warn(WARNING, stacklevel=level)


def _owner(frame: FrameType) -> str:
    name: str = frame.f_globals.get("__name__", "")
    return name.partition(".")[0]


def is_needed(param_groups: list[Group]) -> bool:
    """Whether a parameter has no memory of its own that a kernel could update."""
    return any(
        is_traceable_wrapper_subclass(param) and not shards.is_dtensor(param)
        for group in param_groups
        for param in group["params"]
    )
