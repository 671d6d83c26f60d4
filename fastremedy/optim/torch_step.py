"""The step of torch's own class, for what no kernel updates."""

from __future__ import annotations

import inspect

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


def is_needed(param_groups: list[Group]) -> bool:
    """Whether a parameter has no memory of its own that a kernel could update."""
    return any(
        is_traceable_wrapper_subclass(param) and not shards.is_dtensor(param)
        for group in param_groups
        for param in group["params"]
    )
