"""Modules, as in :mod:`torch.nn`."""

from .batch_norm_relu import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    SyncBatchNormReLU,
)
from .fuse import FuseReport, fuse_, unfuse_

__all__ = [
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "FuseReport",
    "SyncBatchNormReLU",
    "fuse_",
    "unfuse_",
]
