"""Functions, as in :mod:`torch.nn.functional`."""

from .batch_norm_relu import BatchNormStats, batch_norm_relu
from .focal_loss import FocalLossStats, focal_loss, sigmoid_focal_loss

__all__ = [
    "BatchNormStats",
    "FocalLossStats",
    "batch_norm_relu",
    "focal_loss",
    "sigmoid_focal_loss",
]
