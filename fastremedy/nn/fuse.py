"""Fuse the BatchNorms of an existing model with the sum and the activation that follow them.

Every forward is traced with :mod:`torch.fx` down to the modules that it calls. Where the trace is
``activation(bn(x))`` or ``activation(bn(x) + residual)``, the module gets a rewritten forward, as
an attribute of the instance. To everybody else a fused BatchNorm stays the plain one it was, so the
original forward stays right, and it runs whenever something that the trace relied on has changed.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ._fused_norms import (
    FusedBatchNorm,
    become_fused,
    become_unfused,
    unfit,
)
from ._patterns import (
    Fusion,
    find_fusion,
    fuse_in_graph,
    has_hooks,
    is_norm_act,
    own_activation,
)
from ._tracing import NotTraceable, trace
from .batch_norm_relu import _BatchNormReLU


@dataclass
class FuseReport:
    """What :func:`fuse_` did to the BatchNorms of a model.

    Attributes:
        fused: their names, and what became one operation.
        left: their names, and why they were left alone.
    """

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} of {len(self.fused) + len(self.left)} BatchNorms"]
        for title, rows in (("fused", self.fused), ("left", self.left)):
            lines += [f"  {title:5} {name or '(the model)'}: {text}" for name, text in rows]
        return "\n".join(lines)


def fuse_(model: nn.Module) -> FuseReport:
    """Fuse every BatchNorm of ``model`` with the activation that provably follows it, in place.

    Found are ``activation(bn(x))`` and ``activation(bn(x) + residual)``, in ``nn.Sequential`` and
    in every forward that :mod:`torch.fx` can trace, where the activation is ReLU, LeakyReLU,
    ELU(alpha=1) or SiLU, as a module, function or method; ``nn.Identity`` may be anywhere between,
    as dropout that is switched off often is. timm's ``BatchNormAct2d``, which has its activation
    inside, is fused with that. Modules, parameters, buffers, hooks, names and the state dict are
    the very same as before; only the classes of the fused BatchNorms become subclasses of what they
    were. Calling it again looks at the whole model anew.

    Equivalent to: the model as it was, up to rounding.

    Differs in:
        - The BatchNorm adds the residual and activates; modules of the activation and of
          identities are not called.
        - The original forward runs, unfused, where an argument is not a tensor, and if hooks are
          added to a fused BatchNorm or its activation, or modules or attributes are changed later.
        - Other traced values are taken as they are now, as :mod:`torch.fx` does: global variables,
          and the number of elements of a list.
        - With ELU and SiLU the backward pass needs the residual: it fails where one was changed in
          place after the forward pass.
        - A shallow copy (:func:`copy.copy`) of a fused module runs the modules of the original.
        - ``torch.jit.script`` and ``torch.fx.symbolic_trace`` refuse a fused model, and
          ``nn.DataParallel`` fails on a second device. Use :func:`unfuse_` first.

    Args:
        model: any module, in training or evaluation, on any device.

    Returns:
        What was fused, and what was left alone and why; made to be printed.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch, fastremedy
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        ...     torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU6(),
        ... )
        >>> print(fastremedy.nn.fuse_(model))
        fused 1 of 2 BatchNorms
          fused 1: bn + relu
          left  4: followed by ReLU6
    """
    unfuse_(model)
    names: dict[nn.Module, str] = {
        module: name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and not _activates_itself(module)
    }
    reasons = {module: unfit(module) for module in names}
    fit = {module for module, reason in reasons.items() if not reason}
    fusions: dict[nn.Module, Fusion] = {}
    for owner in list(model.modules()):
        inside = fit.intersection(owner.modules())
        if not inside or not _is_traceable(owner):
            continue
        try:
            graph = trace(owner)
        except NotTraceable as error:
            reasons |= dict.fromkeys(inside, f"forward of {type(owner).__name__}: {error}")
            continue
        found: list[Fusion] = []
        for norm, calls in _calls(owner, graph, inside).items():
            fusion = find_fusion(owner, calls)
            if isinstance(fusion, str):
                reasons[norm] = fusion
            elif any(fusion.sum is other.sum is not None for other in found):
                reasons[norm] = "it is the residual of another BatchNorm"
            elif _is_same_activation(fusions.setdefault(norm, fusion), fusion):
                found.append(fusion)
        if found:
            vars(owner)["forward"] = _FusedForward(owner, graph, found)
    fused = {norm: str(fusion) for norm, fusion in fusions.items()}
    for norm, fusion in fusions.items():
        become_fused(norm, fusion.activation, fusion.negative_slope)
    for norm in filter(is_norm_act, names):
        activation = own_activation(norm)
        if isinstance(activation, str):
            reasons[norm] = activation
        else:
            become_fused(norm, *activation)
            fused[norm] = f"bn + {activation[0]}"
    return FuseReport(
        [(name, fused[norm]) for norm, name in names.items() if norm in fused],
        [
            (name, reasons[norm] or "no traced forward calls it")
            for norm, name in names.items()
            if norm not in fused
        ],
    )


def unfuse_(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_`, in place: every class and every forward is what it was.

    Args:
        model: any module, fused or not.

    Returns:
        ``model``.

    Example:
        >>> import torch, fastremedy
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU())
        >>> report = fastremedy.nn.fuse_(model)
        >>> type(fastremedy.nn.unfuse_(model)[0])
        <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _FusedForward):
            del vars(module)["forward"]
        # What has a parametrization is of a class made for it, and a plain BatchNorm to everybody.
        if isinstance(module, FusedBatchNorm) and not is_parametrized(module):
            become_unfused(module)
    return model


def _is_same_activation(a: Fusion, b: Fusion) -> bool:
    return (a.activation, a.negative_slope) == (b.activation, b.negative_slope)


def _activates_itself(norm: object) -> bool:
    return isinstance(norm, _BatchNormReLU) and norm.activation != "identity"


def _is_traceable(owner: nn.Module) -> bool:
    """Return whether the forward of ``owner`` is its user's, or that of ``nn.Sequential``."""
    forward = type(owner).forward
    return forward is nn.Sequential.forward or (
        forward is not nn.Module.forward and not type(owner).__module__.startswith("torch.")
    )


def _calls(
    owner: nn.Module, graph: fx.Graph, norms: set[nn.Module]
) -> dict[nn.Module, list[fx.Node]]:
    """Return the nodes that call each of ``norms``."""
    calls = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_module":
            calls[owner.get_submodule(str(node.target))].append(node)
    return {norm: nodes for norm, nodes in calls.items() if norm in norms}


class _FusedForward:
    """The forward of one module, rewritten; the original one where its trace may not hold."""

    def __init__(self, module: nn.Module, graph: fx.Graph, fusions: list[Fusion]) -> None:
        self.module = module
        self.norms = [module.get_submodule(path) for path in _paths(f.norm for f in fusions)]
        passed = _paths(node for f in fusions for node in f.passed)
        uncalled = [module.get_submodule(path) for path in passed]
        steps = [step for path in _paths(graph.nodes) for step in _steps(module, path)]
        # The forward may have read anything of the modules that it went through.
        readers = list(dict.fromkeys([module, *(parent for parent, _, _ in steps)]))
        self.watched = [*self.norms, *uncalled]
        self.attributes = [
            *((m, k, v) for m, k, v in steps if any(v is x for x in (*readers, *self.watched))),
            *(attribute for m in (*readers, *uncalled) for attribute in _attributes(m)),
            *_shared(module),
        ]
        self.children = [(reader, _children(reader)) for reader in readers]
        for fusion in fusions:
            fuse_in_graph(graph, fusion)
        code = graph.python_code("self")
        self.source = code.src
        # What every generated code has is no part of the state: modules cannot be pickled.
        self.names = {k: v for k, v in code.globals.items() if k not in _common_names()}
        self.function = self._compile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._holds((*args, *kwargs.values())):
            return self.function(self.module, *args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    # What a forward is asked for: the arguments by trainers, the place by torch.export.
    @property
    def __code__(self) -> CodeType:
        return type(self.module).forward.__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "function"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.function = self._compile()

    def _compile(self) -> Callable[..., Any]:
        namespace: dict[str, Any] = {**_common_names(), **self.names}
        exec(_code(self.source), namespace)
        return cast(Callable[..., Any], namespace["forward"])

    def _holds(self, arguments: tuple[Any, ...]) -> bool:
        return (
            all(isinstance(argument, Tensor) for argument in arguments)
            and all(_is_still(getattr(m, k, None), value) for m, k, value in self.attributes)
            and all(_children(m) == children for m, children in self.children)
            and all(isinstance(m, FusedBatchNorm) for m in self.norms)
            and not any(has_hooks(m) for m in self.watched)
        )


@functools.cache
def _code(source: str) -> CodeType:
    """Compile a forward, once for modules that are alike: torch.compile knows them by the code."""
    return compile(source, "<forward rewritten by fastremedy.nn.fuse_>", "exec")


def _common_names() -> dict[str, Any]:
    return fx.Graph().python_code("self").globals


def _paths(nodes: Iterable[fx.Node]) -> list[str]:
    """Return what of a module the nodes name, each once."""
    return list(dict.fromkeys(str(n.target) for n in nodes if n.op in ("call_module", "get_attr")))


def _steps(module: nn.Module, path: str) -> list[tuple[nn.Module, str, Any]]:
    """Return (module, name, attribute) for every name in a dotted path."""
    steps = []
    for name in path.split("."):
        attribute = getattr(module, name)
        steps.append((module, name, attribute))
        module = attribute
    return steps


def _attributes(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return the attributes that a forward may branch on."""
    plain = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
    base = vars(nn.Module())
    return [(module, k, v) for k, v in vars(module).items() if k not in base and type(v) in plain]


def _shared(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Return every place of the modules that have several: a trace names one of them."""
    places = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if child is not None
    ]
    count = Counter(id(child) for _, _, child in places)
    return [place for place in places if count[id(place[2])] > 1]


def _is_still(now: object, before: object) -> bool:
    return now is before or (type(now) is type(before) and now == before)


def _children(module: nn.Module) -> list[tuple[str, bool]]:
    return [(name, child is None) for name, child in module._modules.items()]
