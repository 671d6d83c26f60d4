"""Where a traced forward activates what a BatchNorm gives, with or without a sum in between."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Target

# Functions of the module operator behind `x += y` and its like.
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")
# What follows the input in a call, and the attributes of the module that say the same.
_PARAMETERS = {
    "relu": ("inplace",),
    "leaky_relu": ("negative_slope", "inplace"),
    "elu": ("alpha", "inplace"),
    "silu": ("inplace",),
}
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.SiLU: "silu",
}
_FUNCTIONS: dict[Target, str] = {
    "relu": "relu",  # methods of a tensor
    "relu_": "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.elu: "elu",
    F.elu_: "elu",
    F.silu: "silu",
}
NO_ACTIVATION = "followed by nothing"
_SUMS = {operator.add, torch.add, "add"}
_SUMS_IN_PLACE = {operator.iadd, "add_"}


@dataclass(frozen=True)
class Fusion:
    """Nodes of a graph that become one call of a BatchNorm."""

    chain: tuple[
        fx.Node, ...
    ]  # from the BatchNorm to the activation, each the only user of the last
    sum: fx.Node | None
    activation: str
    negative_slope: float

    def __str__(self) -> str:
        return f"bn{' + residual' if self.sum else ''} + {self.activation}"

    @property
    def norm(self) -> fx.Node:
        return self.chain[0]

    @property
    def passed(self) -> tuple[fx.Node, ...]:
        """Return the nodes of modules that are not called any more."""
        return tuple(node for node in self.chain[1:] if node is not self.sum)


def find_fusion(owner: nn.Module, calls: list[fx.Node]) -> Fusion | str:
    """Find what can be fused with a BatchNorm, given its calls in the forward of ``owner``.

    Returns:
        The fusion, or the reason why there is none.
    """
    norm = calls[0]
    if len(calls) > 1:
        return "called more than once"
    if len(norm.args) != 1 or norm.kwargs or not isinstance(norm.args[0], fx.Node):
        return "called with other arguments than one tensor"
    chain = [norm]
    following = _follow(owner, chain)
    if isinstance(following, str):
        return following
    if following.op == "call_module" or following.target not in _SUMS | _SUMS_IN_PLACE:
        activation = _activation(owner, following)
        if isinstance(activation, str):
            return f"followed by {activation}"
        return Fusion((*chain, following), None, *activation)
    reason = _no_residual(owner, chain, following)
    if reason:
        return reason
    chain.append(following)
    last = _follow(owner, chain)
    if isinstance(last, str):
        return f"followed by a sum, {last}"
    activation = _activation(owner, last)
    if isinstance(activation, str):
        return f"followed by a sum, followed by {activation}"
    return Fusion((*chain, last), following, *activation)


def fuse_in_graph(graph: fx.Graph, fusion: Fusion) -> None:
    """Replace the nodes of ``fusion`` by one call, at the place of the sum or the BatchNorm.

    Nothing but the activation reads what the BatchNorm and the sum give, so that the result may be
    there early.
    """
    # Earlier fusions may have changed the arguments of these nodes.
    summands = fusion.sum.args if fusion.sum else ()
    inputs = (*fusion.norm.args, *(node for node in summands if node not in fusion.chain))
    with graph.inserting_before(fusion.sum or fusion.norm):
        call = graph.call_module(str(fusion.norm.target), inputs, {"fused": True})
    fusion.chain[-1].replace_all_uses_with(call)
    for node in reversed(fusion.chain):
        graph.erase_node(node)


def _follow(owner: nn.Module, chain: list[fx.Node]) -> fx.Node | str:
    """Return the only user of the last node; each ``nn.Identity`` before it joins the chain."""
    following = _only_user(chain[-1])
    while isinstance(following, fx.Node) and _is_identity(owner, following):
        chain.append(following)
        following = _only_user(following)
    return following


def _is_identity(owner: nn.Module, node: fx.Node) -> bool:
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    module = owner.get_submodule(str(node.target))
    return type(module) is nn.Identity and not has_hooks(module)


def _only_user(node: fx.Node) -> fx.Node | str:
    users = list(node.users)
    if len(users) > 1:
        return "its output is used more than once"
    if not users or users[0].op == "output":
        return NO_ACTIVATION
    return users[0]


def _no_residual(owner: nn.Module, chain: list[fx.Node], sum_: fx.Node) -> str:
    """Return why what is added to the BatchNorm is no residual; nothing if it is one."""
    if len(sum_.args) != 2 or sum_.kwargs:
        return "followed by a sum with options"
    norm, value = chain[0], chain[-1]
    first, second = sum_.args
    residual = second if first is value else first
    if residual is value:
        return "followed by a sum with itself"
    if not isinstance(residual, fx.Node) or not _is_tensor(residual):
        return "followed by a sum with what may not be a tensor"
    if sum_.target in _SUMS_IN_PLACE and first is not value:
        return "added to another tensor in place"
    # The BatchNorm moves to the sum: its input has to be the same there.
    between = norm.next
    while between is not sum_:
        if norm.args[0] in between.all_input_nodes and _may_write(owner, between):
            return "its input may change before the sum"
        between = between.next
    return ""


def _is_tensor(node: fx.Node) -> bool:
    if node.op == "call_function":
        # not getattr(x, "ndim") of builtins, and not an element of x.shape
        home = getattr(node.target, "__module__", None) or "torch"  # torch's own built-in ones
        return home.startswith(("torch", "_operator")) and node.target is not operator.getitem
    return node.op in ("placeholder", "call_module", "get_attr") or node.target in _FUNCTIONS


def _may_write(owner: nn.Module, node: fx.Node) -> bool:
    """Return whether the call may change its arguments."""
    if node.op == "call_module":
        return any(
            getattr(module, "inplace", False)
            or has_hooks(module)
            or not type(module).__module__.startswith("torch.nn.modules.")
            for module in owner.get_submodule(str(node.target)).modules()
        )
    name = str(getattr(node.target, "__name__", node.target))
    options = (*node.args, *node.kwargs.values())
    return name.endswith("_") or name in IN_PLACE or any(x is True for x in options)


def _activation(owner: nn.Module, node: fx.Node) -> tuple[str, float] | str:
    """Return activation and negative slope that ``node`` stands for, or why it is none of ours."""
    if node.op == "call_module":
        return activation_of(owner.get_submodule(str(node.target)))
    name = _FUNCTIONS.get(node.target, "")
    if not name:
        return str(getattr(node.target, "__name__", node.target))
    given = dict(zip(_PARAMETERS[name], node.args[1:], strict=False))
    return _checked(name, {**given, **node.kwargs})


def activation_of(module: nn.Module) -> tuple[str, float] | str:
    """Return activation and negative slope of a module, or why it is none of ours."""
    name = _MODULES.get(type(module), "")
    if not name:
        return type(module).__name__
    if has_hooks(module):
        return f"{type(module).__name__} with hooks"
    return _checked(name, {key: getattr(module, key) for key in _PARAMETERS[name]})


def is_norm_act(norm: nn.Module) -> bool:
    """Whether this is timm's BatchNorm with activation, known by name: nothing imports timm."""
    cls = type(norm)
    return cls.__name__ == "BatchNormAct2d" and cls.__module__ in (
        "timm.layers.norm_act",
        "timm.models.layers.norm_act",
    )


def own_activation(norm: nn.Module) -> tuple[str, float] | str:
    """Return activation and negative slope of timm's BatchNorm, or why they are none of ours."""
    drop, act = norm.get_submodule("drop"), norm.get_submodule("act")
    if "forward" in vars(norm):
        return "it has a forward of its own"
    if type(drop) is not nn.Identity or has_hooks(drop):
        return f"followed by {type(drop).__name__}"
    if type(act) is nn.Identity:
        return NO_ACTIVATION
    activation = activation_of(act)
    return f"followed by {activation}" if isinstance(activation, str) else activation


def _checked(name: str, options: dict[str, Any]) -> tuple[str, float] | str:
    if options.get("alpha", 1) != 1:
        return "ELU with alpha != 1"
    negative_slope = options.get("negative_slope", 0.01)
    if not isinstance(negative_slope, (int, float)):
        return "LeakyReLU with a slope that is no number"
    return name, float(negative_slope)


def has_hooks(module: nn.Module) -> bool:
    """Return whether somebody else sees a call of ``module``, or runs in its place.

    Hooks that say ``is_passive`` only look, and may as well see the fused output.
    """
    for hook in module._forward_hooks.values():
        if not getattr(hook, "is_passive", False):
            return True
    return bool(
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
