"""Optimizers with the API of :mod:`torch.optim`."""

from .adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
