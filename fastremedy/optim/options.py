"""Options of the optimizers: checks, and how they reach all devices and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..ops import dispatch, shards
from ..ops.adamw import Options
from ..ops.clip_grad_norm import clip_coefficient, norm_dtype
from ..ops.table import Table
from .rows import LocalRows

_NONFINITE = ("propagate", "skip", "error")
_LOW_PRECISION = (None, "stochastic", "kahan", "master")
_STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def check_options(
    max_grad_norm: float | None,
    norm_type: float,
    nonfinite: str,
    low_precision: str | None,
    state_dtype: torch.dtype | None,
) -> None:
    """Check the arguments that torch's optimizers do not have.

    Raises:
        ValueError: one is out of range; the message names it.
    """
    if max_grad_norm is not None and not (_is_number(max_grad_norm) and max_grad_norm >= 0):
        raise ValueError(f"max_grad_norm must be None or a number >= 0, got {max_grad_norm!r}")
    if not (_is_number(norm_type) and norm_type > 0):
        raise ValueError(f"norm_type must be a number > 0 or inf, got {norm_type!r}")
    if nonfinite not in _NONFINITE:
        raise ValueError(f"nonfinite must be one of {_NONFINITE}, got {nonfinite!r}")
    if low_precision not in _LOW_PRECISION:
        raise ValueError(f"low_precision must be one of {_LOW_PRECISION}, got {low_precision!r}")
    if state_dtype not in _STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {_STATE_DTYPES}, got {state_dtype!r}")


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__")


def fold(
    tables: Sequence[tuple[LocalRows, Table]],
    everyone: Mapping[shards.Groups, torch.device],
    options: Options,
) -> tuple[Options, Tensor | None]:
    """Fold norm, clipping and checks over devices and ranks into grad_scale and found_inf."""
    if options.found_inf is not None:
        options = options._replace(found_inf=shards.agree(options.found_inf, everyone))
    if not options.needs_norm:
        return options, None
    memory: list[Tensor] = []
    groups: list[shards.Groups] = []
    for rows, table in tables:
        memory_of_rows, groups_of_rows = rows.norm_terms(table.grads())
        memory += memory_of_rows
        groups += groups_of_rows
    norm, _ = dispatch.norm_over_ranks(memory, groups, everyone, options.norm_type)
    scale = torch.ones_like(norm)
    if options.grad_scale is not None:
        scale = options.grad_scale.to(norm.device, torch.float64).reshape(())
        norm = norm / scale
    if options.max_norm is not None:
        scale = scale / clip_coefficient(norm, options.max_norm)
    found_inf = options.found_inf
    if options.skip_nonfinite:
        nonfinite = (~norm.isfinite()).float()
        if found_inf is not None:
            nonfinite = nonfinite + found_inf.to(norm.device).reshape(())
        found_inf = nonfinite
    folded = options._replace(
        max_norm=None, skip_nonfinite=False, grad_scale=scale, found_inf=found_inf
    )
    return folded, norm.to(norm_dtype(memory))


def on_device(options: Options, device: torch.device) -> Options:
    """Return the options with AMP's scalars on a device, in dtypes that kernels read.

    Both are float32; but ``grad_scale`` may stay float64, as which it holds a clip coefficient.
    """
    scale, found_inf = options.grad_scale, options.found_inf
    if scale is not None:
        dtype = torch.float64 if scale.dtype == torch.float64 else torch.float32
        options = options._replace(grad_scale=scale.to(device, dtype).reshape(()))
    if found_inf is not None:
        options = options._replace(found_inf=found_inf.to(device, torch.float32).reshape(()))
    return options
