"""Modules, as in :mod:`torch.nn`."""

from .batch_norm_relu import (
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
    SyncBatchNormReLU,
)
from .focal_loss import FocalLoss, SigmoidFocalLoss, class_balanced_alpha
from .fuse import FuseReport, fuse_, unfuse_

__all__ = [
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
    "FocalLoss",
    "FuseReport",
    "SigmoidFocalLoss",
    "SyncBatchNormReLU",
    "class_balanced_alpha",
    "fuse_",
    "unfuse_",
]
