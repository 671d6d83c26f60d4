"""Memory for what operators write."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .dispatch import PLAIN_TYPES

# What the native library has blocks for: kHugePage of csrc/cpu/caching_allocator.h.
BLOCK_BYTES = 2 << 20


def empty_like(tensor: Tensor) -> Tensor:
    """Return ``torch.empty_like(tensor)``; large ones of the CPU lie in memory used before.

    New memory costs more than the kernels that fill it: the operating system clears every page.
    """
    if type(tensor) in PLAIN_TYPES and tensor.nbytes >= BLOCK_BYTES and tensor.is_cpu:
        native = _native.library()
        result: Tensor | None = None if native is None else native.empty_like(tensor)
        if result is not None:
            return result
    return torch.empty_like(tensor)


def empty_cache() -> None:
    """Give memory of results that no tensor uses any more back to the operating system.

    Results of 2 MB and more on the CPU (outputs of :class:`fastremedy.nn.BatchNormReLU2d`,
    gradients of losses) leave their memory to the next step. Never more is kept than was once in
    use, and what is over 1 GB the operating system takes back by itself when it needs it. So
    training need not call this; between training and something else it makes the process smaller.

    ``Tensor.resize_`` refuses such a result, as it refuses memory of numpy.

    Equivalent to :func:`torch.cuda.empty_cache`, for the CPU.

    Example:
        >>> import fastremedy
        >>> fastremedy.empty_cache()

    """
    native = _native.library()
    if native is not None:
        native.empty_cache()
