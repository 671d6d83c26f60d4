"""Which modules and parameters of a model a monitor watches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.jit._trace import TopLevelTracedModule

from ..nn.batch_norm_relu import _BatchNormReLU

Pattern = str | type[nn.Module]

PLAIN = (Tensor, nn.Parameter)  # other types may have no memory of their own

# They pass on what others have computed.
_UNINTERESTING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.modules.dropout._DropoutNd,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)
_UNITS_COME_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.Embedding, nn.RNNBase)
_UNITS_COME_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True)
class Layer:
    """A module whose outputs are watched."""

    name: str
    module: nn.Module
    unit_dim: int  # of its outputs: 1, or -1 as after Linear

    @property
    def kind(self) -> str | None:
        """``"sigmoid"`` or ``"tanh"`` if the outputs saturate like that."""
        kinds = {nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}
        return kinds.get(type(self.module))


@dataclass(frozen=True)
class Parameter:
    """A parameter that is watched."""

    name: str
    tensor: Tensor


def as_patterns(name: str, value: Pattern | Iterable[Pattern] | None) -> tuple[Pattern, ...] | None:
    """Return what ``include`` or ``exclude`` was given as a tuple.

    Raises:
        TypeError: something is neither a string nor a class of modules.
    """
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str | type) else tuple(value)
    for pattern in patterns:
        is_type = isinstance(pattern, type) and issubclass(pattern, nn.Module)
        if not is_type and not isinstance(pattern, str):
            raise TypeError(
                f"{name} must be names, patterns or classes of modules, got {pattern!r}"
            )
    return patterns


def layers_of(
    model: nn.Module,
    include: tuple[Pattern, ...] | None,
    exclude: tuple[Pattern, ...] | None,
) -> list[Layer]:
    """Return the modules to watch, in the order of the model."""
    layers, unit_dim = [], 1
    for name, module in model.named_modules():
        if isinstance(module, _UNITS_COME_LAST):
            unit_dim = -1
        elif isinstance(module, _UNITS_COME_SECOND):
            unit_dim = 1
        # Anything else keeps the layout of what comes before it: an activation after Linear.
        if _is_chosen(name, module, include) and not _matches(name, module, exclude or ()):
            layers.append(Layer(name, module, unit_dim))
    return layers


def _is_chosen(name: str, module: nn.Module, include: tuple[Pattern, ...] | None) -> bool:
    if isinstance(module, torch.jit.ScriptModule):  # calls hooks where it is entered, if at all
        computes = isinstance(module, TopLevelTracedModule)
    else:
        computes = not isinstance(module, _UNINTERESTING) and (
            next(module.children(), None) is None
            or isinstance(module, (nn.MultiheadAttention, _BatchNormReLU))
        )
    if include is None:
        return computes
    by_name = name in include or any(isinstance(module, p) for p in include if isinstance(p, type))
    return by_name or (computes and _matches(name, module, include))


def parameters_of(
    model: nn.Module,
    include: tuple[Pattern, ...] | None,
    exclude: tuple[Pattern, ...] | None,
) -> list[Parameter]:
    """Return the parameters to watch, in the order of the model."""
    chosen = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in model.named_parameters():
        owner_name = name.rpartition(".")[0]
        owner = modules[owner_name]

        def is_named_by(
            patterns: tuple[Pattern, ...],
            name: str = name,
            owner_name: str = owner_name,
            owner: nn.Module = owner,
        ) -> bool:
            return _matches(name, owner, patterns) or _matches(owner_name, owner, patterns)

        if (include is None or is_named_by(include)) and not is_named_by(exclude or ()):
            chosen.append(Parameter(name, tensor))
    return chosen


def _matches(name: str, module: nn.Module, patterns: tuple[Pattern, ...]) -> bool:
    return any(
        fnmatchcase(name, pattern) if isinstance(pattern, str) else isinstance(module, pattern)
        for pattern in patterns
    )


def uncalled(model: nn.Module, layers: list[Layer]) -> list[str]:
    """Return the names of layers that ``fuse_`` has fused away."""
    forwards = [vars(module).get("forward") for module in model.modules()]
    watched = [module for forward in forwards for module in getattr(forward, "watched", ())]
    ids = {id(module) for module in watched if not isinstance(module, _BatchNormReLU)}
    return [layer.name for layer in layers if id(layer.module) in ids]


def tensors_in(output: object) -> list[Tensor]:
    """Return the tensors of numbers that a module returns, however they are packed."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() or output.is_complex() else []
    if isinstance(output, nn.utils.rnn.PackedSequence):
        return tensors_in(output.data)
    if isinstance(output, dict):
        return [tensor for value in output.values() for tensor in tensors_in(value)]
    if isinstance(output, list | tuple):
        return [tensor for value in output for tensor in tensors_in(value)]
    return []


def readable(tensor: Tensor) -> Tensor | None:
    """Return the memory behind a tensor as real numbers, None if there is none to be read."""
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state():
        return None
    tensor = getattr(tensor, "_local_tensor", tensor)  # DTensor
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().coalesce()._values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return None
    is_memory = tensor.layout == torch.strided and type(tensor) in PLAIN
    return tensor if is_memory and not tensor.is_nested and tensor.device.type != "meta" else None
