"""Cures for the common ailments of neural-network training, faster than stock PyTorch."""

from . import amp, backends, functional, nn, ops, optim, stats
from ._version import __version__
from .clip import clip_, clip_value_, grad_norm
from .compilation import warmup
from .ops.memory import empty_cache

__all__ = [
    "__version__",
    "amp",
    "backends",
    "clip_",
    "clip_value_",
    "empty_cache",
    "functional",
    "grad_norm",
    "nn",
    "ops",
    "optim",
    "stats",
    "warmup",
]
