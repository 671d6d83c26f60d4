"""DTensors as the memory that this rank has of them, and norms that add up over ranks.

A norm is the sum of ``|x|^p`` over local memory, added up over the mesh dimensions in which a
tensor is sharded; where it is replicated every rank has all of it, which counts once. Which ranks
talk follows from the placements of the tensors alone, never from what is in the local shards: these
may be empty, or their sizes differ.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor, Placement

Groups = tuple["ProcessGroup", ...]  # over whose ranks a tensor is sharded, of any mesh

_MODULE = "torch.distributed.tensor"  # half a second to import: who has DTensors has it


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def any_dtensor(tensors: Iterable[Tensor]) -> bool:
    """Whether any of many tensors is a DTensor: 20 microseconds per thousand, 0 without a mesh."""
    module = sys.modules.get(_MODULE)
    return module is not None and any(
        issubclass(kind, module.DTensor) for kind in set(map(type, tensors))
    )


def local(tensor: Tensor) -> Tensor:
    """Return the memory behind a tensor, the tensor itself unless it is a DTensor.

    Not :meth:`DTensor.to_local`, whose result has a version counter of its own.
    """
    if not is_dtensor(tensor):
        return tensor
    shard = tensor._local_tensor
    if type(shard) is not Tensor and hasattr(shard, "trigger_wait"):  # an AsyncCollectiveTensor
        waited: Tensor = shard.trigger_wait()
        return waited
    return shard


def wrap(shard: Tensor, like: Tensor) -> Tensor:
    """Return a DTensor of local memory, distributed as another; or the memory of a plain one."""
    if not is_dtensor(like):
        return shard
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        shard,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def memory_as(tensor: Tensor, like: Tensor) -> Tensor | None:
    """Return the memory of a DTensor that is distributed as another; None if it is not."""
    if not is_dtensor(like) or not is_dtensor(tensor) or tensor.shape != like.shape:
        return None
    spec, wanted = tensor._spec, like._spec
    is_there = spec.placements == wanted.placements
    is_there = is_there and (spec.mesh is wanted.mesh or spec.mesh == wanted.mesh)
    return local(tensor) if is_there else None


def placed_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor distributed as another; ``tensor`` itself if it is, or if one is plain.

    Raises:
        ValueError: it is on another mesh, which torch's ``redistribute`` would not notice.
    """
    if not is_dtensor(tensor) or not is_dtensor(like) or memory_as(tensor, like) is not None:
        return tensor
    if tensor.device_mesh != like.device_mesh:
        raise ValueError(
            f"a DTensor must be on its parameter's mesh, expected {like.device_mesh}, "
            f"got {tensor.device_mesh}"
        )
    return tensor.redistribute(like.device_mesh, like.placements)


def groups_of(tensors: Sequence[Tensor]) -> list[Groups]:
    """Return, for each tensor, the process groups over which it is sharded; none if it is plain."""
    return [place.groups for place in _places_of(tensors)]


def everyone(tensors: Sequence[Tensor], groups: Sequence[Groups]) -> dict[Groups, torch.device]:
    """Return the groups in the order in which the tensors name them, with a device for each."""
    found: dict[Groups, torch.device] = {}
    for tensor, of_tensor in zip(tensors, groups, strict=True):
        if of_tensor not in found:
            found[of_tensor] = tensor.device
    return found


def complete(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Groups]]:
    """Return local memory and groups of tensors; partial sums are added over ranks into copies."""
    places = _places_of(tensors)
    memory = [
        local(_summed(tensor) if place.is_partial else tensor)
        for tensor, place in zip(tensors, places, strict=True)
    ]
    return memory, [place.groups for place in places]


class _Place(NamedTuple):
    groups: Groups
    is_partial: bool


_HERE = _Place((), False)


def _places_of(tensors: Sequence[Tensor]) -> list[_Place]:
    module = sys.modules.get(_MODULE)
    if module is None:
        return [_HERE] * len(tensors)
    known: dict[tuple[int, tuple[Placement, ...]], _Place] = {}
    found, place = [], _HERE
    mesh, placements = None, None
    for tensor in tensors:
        if not isinstance(tensor, module.DTensor):
            found.append(_HERE)
            continue
        spec = tensor._spec
        # Neighbours are mostly alike, and to compare is faster than to hash.
        if spec.mesh is not mesh or spec.placements != placements:
            mesh, placements = spec.mesh, spec.placements
            key = (id(mesh), placements)
            if key not in known:
                known[key] = _place_of(tensor)
            place = known[key]
        found.append(place)
    return found


def _place_of(tensor: DTensor) -> _Place:
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:  # this rank is outside the mesh and can ask nobody
        return _HERE
    groups = tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and not placement.is_partial() and mesh.size(dim) > 1
    )
    return _Place(groups, any(placement.is_partial() for placement in placements))


def _summed(tensor: Tensor) -> Tensor:
    assert is_dtensor(tensor)
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor.redistribute(tensor.device_mesh, placements)


def index_of(tensor: Tensor) -> int:
    """Number the shards of a tensor: replicas have the same number."""
    index = 0
    if is_dtensor(tensor) and (coordinate := tensor.device_mesh.get_coordinate()) is not None:
        for dim, placement in enumerate(tensor.placements):
            if not placement.is_replicate():
                index = index * tensor.device_mesh.size(dim) + coordinate[dim]
    return index


class Powers:
    """``|x|^p`` of many elements on the way to a norm: neutral value, sum, and root.

    The "sum" is the maximum or minimum for ``p`` of plus or minus infinity.
    """

    def __init__(self, norm_type: float) -> None:
        """Remember ``p``."""
        self.norm_type = norm_type
        self.neutral = math.inf if norm_type == -math.inf else 0.0
        self._is_sum = not math.isinf(norm_type)
        self._exponent = 1.0 if norm_type == 0.0 or not self._is_sum else norm_type

    def of_norms(self, norms: Tensor) -> Tensor:
        """Return what every norm, float64, adds."""
        return norms if self._exponent == 1.0 else norms.pow(self._exponent)

    def root(self, total: Tensor) -> Tensor:
        """Return the norm of a sum."""
        if self._exponent == 2.0:
            return total.sqrt()
        return total if self._exponent == 1.0 else total.pow(1.0 / self._exponent)

    def sum(self, values: Tensor) -> Tensor:
        """Add the elements of a vector; the result has one element."""
        if self._is_sum:
            return values.sum(0, keepdim=True)
        if len(values) == 0:
            return values.new_full((1,), self.neutral)
        extreme = torch.amax if self.norm_type > 0 else torch.amin
        return extreme(values, 0, keepdim=True)

    def sum_over_ranks(self, values: Tensor, group: ProcessGroup) -> Tensor:
        """Add vectors of all ranks, element by element; NaN of any rank wins."""
        from torch.distributed import ReduceOp, all_reduce

        if self._is_sum:
            values = values.clone()
            all_reduce(values, ReduceOp.SUM, group)
            return values
        # Libraries lose NaN in a maximum. As integers, numbers >= 0 keep their order, and NaN can
        # be the largest or the smallest: both 2^63 - 1 and -1 are the bits of one.
        is_max = self.norm_type > 0
        bits = values.view(torch.int64)
        bits = bits.masked_fill(values.isnan(), torch.iinfo(torch.int64).max if is_max else -1)
        all_reduce(bits, ReduceOp.MAX if is_max else ReduceOp.MIN, group)
        return bits.view(torch.float64)


def sum_over_ranks(sums: Mapping[Groups, Tensor], powers: Powers) -> dict[Groups, Tensor]:
    """Add vectors over the process groups of their keys: one collective for each group."""
    sums = dict(sums)
    for group in dict.fromkeys(group for groups in sums for group in groups):
        keys = [groups for groups in sums if group in groups]
        device = sums[keys[0]].device
        vector = torch.cat([sums[key].to(device) for key in keys])
        parts = powers.sum_over_ranks(vector, group).split([len(sums[key]) for key in keys])
        sums.update(zip(keys, parts, strict=True))
    return sums


def agree(flag: Tensor, groups: Iterable[Groups]) -> Tensor:
    """Return the largest flag >= 0 of all ranks of the groups."""
    values = flag.reshape(1).double()
    for group in dict.fromkeys(group for of_tensor in groups for group in of_tensor):
        values = Powers(math.inf).sum_over_ranks(values, group)
    return values.reshape(())
