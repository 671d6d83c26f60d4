"""Orders of elements in memory that kernels of ``[N, C, *]`` take as they are."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(input: Tensor) -> bool:
    """Whether the elements of all channels at one place are neighbours ``[N, *, C]``."""
    dim = input.dim()
    if dim == 4:
        return input.is_contiguous(memory_format=torch.channels_last)
    if dim == 2:
        return input.is_contiguous()
    if dim == 5:
        return input.is_contiguous(memory_format=torch.channels_last_3d)
    return input.movedim(1, -1).is_contiguous()


def with_kernel_layout(input: Tensor) -> Tensor:
    """Return ``input`` ``[N, C, *]`` if kernels take it as it lies, else a contiguous copy."""
    return input if input.is_contiguous() or is_channels_last(input) else input.contiguous()


def in_order(input: Tensor, channels_last: bool) -> Tensor:
    """Return ``input`` ``[N, C, *]`` in one of the two orders; itself if it lies so."""
    if not channels_last:
        return input.contiguous()
    return input.movedim(1, -1).contiguous().movedim(-1, 1)


def like(tensor: Tensor, input: Tensor) -> Tensor:
    """Return ``tensor`` with its elements in the order of ``input``; itself if they are."""
    if tensor.stride() == input.stride():
        return tensor
    return torch.empty_like(input, dtype=tensor.dtype).copy_(tensor)
