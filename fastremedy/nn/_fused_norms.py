"""What a BatchNorm becomes when it is fused, and how it becomes again what it was."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._patterns import has_hooks, is_norm_act, own_activation
from .batch_norm_relu import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    SyncBatchNormReLU,
    _BatchNormReLU,
)


class FusedBatchNorm(_BatchNormReLU):
    """A plain BatchNorm, but for the forward that was rewritten to call it with ``fused=True``."""

    by_torch: ClassVar[type[_BatchNorm]]
    _is_fused = True

    def forward(self, input: Tensor, residual: Tensor | None = None, fused: bool = False) -> Tensor:
        if fused:
            return super().forward(input, residual)
        return self.by_torch.forward(self, input)


class _FusedBatchNorm1d(FusedBatchNorm, BatchNormReLU1d):
    by_torch = nn.BatchNorm1d


class _FusedBatchNorm2d(FusedBatchNorm, BatchNormReLU2d):
    by_torch = nn.BatchNorm2d


class _FusedBatchNorm3d(FusedBatchNorm, BatchNormReLU3d):
    by_torch = nn.BatchNorm3d


class _FusedSyncBatchNorm(FusedBatchNorm, SyncBatchNormReLU):
    by_torch = nn.SyncBatchNorm


class _FusedNormAct(FusedBatchNorm):
    """A BatchNorm that has its activation as a child; the class it was of is a base, too."""

    _is_fused = False  # it activates whoever calls it

    def forward(self, input: Tensor, residual: Tensor | None = None, fused: bool = False) -> Tensor:
        is_as_fused = own_activation(self) == (self.activation, self.negative_slope)
        return super().forward(input, fused=is_as_fused)

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_norm_act, (self.by_torch,), vars(self)


def _fused_norm_act(cls: type[nn.Module]) -> type[FusedBatchNorm]:
    if cls not in _FUSED:
        bases = (_FusedNormAct, BatchNormReLU2d, cls)
        fused = type(f"_Fused{cls.__name__}", bases, {"by_torch": cls})
        _FUSED[cls] = cast(type[FusedBatchNorm], fused)
    return _FUSED[cls]


def _empty_norm_act(cls: type[nn.Module]) -> nn.Module:
    fused = _fused_norm_act(cls)
    return fused.__new__(fused)


# What can become fused: torch's classes, and ours without activation.
_FUSED: dict[type[nn.Module], type[FusedBatchNorm]] = {
    nn.BatchNorm1d: _FusedBatchNorm1d,
    nn.BatchNorm2d: _FusedBatchNorm2d,
    nn.BatchNorm3d: _FusedBatchNorm3d,
    nn.SyncBatchNorm: _FusedSyncBatchNorm,
    BatchNormReLU1d: _FusedBatchNorm1d,
    BatchNormReLU2d: _FusedBatchNorm2d,
    BatchNormReLU3d: _FusedBatchNorm3d,
    SyncBatchNormReLU: _FusedSyncBatchNorm,
}
# What our classes keep on an instance beyond torch's.
_OURS = ("activation", "negative_slope", "collect_stats", "_last")


def unfit(norm: nn.Module) -> str:
    """Return why nobody can fuse this BatchNorm with what follows; nothing if somebody may."""
    if type(norm) not in _FUSED or is_norm_act(norm):
        return f"{type(norm).__name__} may be more than a BatchNorm"
    return "it has hooks" if has_hooks(norm) else ""


def become_fused(norm: nn.Module, activation: str, negative_slope: float) -> None:
    """Make of a BatchNorm, in place, one that can activate."""
    state = vars(norm)
    state["_unfused"] = type(norm), {name: state[name] for name in _OURS if name in state}
    state["activation"], state["negative_slope"] = activation, negative_slope
    norm.__class__ = _fused_norm_act(type(norm)) if is_norm_act(norm) else _FUSED[type(norm)]


def become_unfused(norm: FusedBatchNorm) -> None:
    """Make of it what it was."""
    state = vars(norm)
    original, attributes = state.pop("_unfused")
    for name in _OURS:
        state.pop(name, None)
    state.update(attributes)
    norm.__class__ = original
