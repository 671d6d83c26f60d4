"""Trace one forward, down to the modules that it calls, or say why that proves nothing."""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from ._patterns import IN_PLACE

_one_at_a_time = threading.RLock()  # torch.fx and this module patch what all threads share


class NotTraceable(Exception):
    """The forward depends on more than its trace shows."""


class _TensorProxy(fx.Proxy):
    """Stands for a tensor, but cannot pass for one: C code would take it at its word."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] != "torch":
            raise NotTraceable("it asks what class a value is of")
        return type(self)


def _isinstance(value: object, classes: Any) -> bool:
    if isinstance(value, fx.Proxy):
        if value.node.op != "placeholder":
            raise NotTraceable("it asks what class a value is of")
        return issubclass(torch.Tensor, classes)  # a forward is rewritten for tensors only
    return isinstance(value, classes)


def _record_in_place(name: str) -> None:
    """Let ``x += y`` be recorded as what it is; :mod:`torch.fx` makes ``x = x + y`` of it."""

    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(_TensorProxy, f"__{name}__", method)


for _name in IN_PLACE:
    _record_in_place(_name)


class _Tracer(fx.Tracer):
    # An update of a buffer has to be recorded, not done.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()
        self.thread = threading.get_ident()

    # torch.fx sees the calls of all threads.
    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, torch.Tensor):
            known = (*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs)
            if not any(a is tensor for tensor in known):
                raise NotTraceable("it uses a tensor that is no attribute of its modules")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        # A graph does not show `with torch.no_grad():`.
        if _modes() != self.modes:
            raise NotTraceable("it changes grad mode, autocast or what is saved for backward")
        return super().create_node(*args, **kwargs)


def trace(module: nn.Module) -> fx.Graph:
    """Trace the forward of ``module``; every module that it calls is one node.

    Args:
        module: its state, and that of all random generators, is as before afterwards.

    Returns:
        The graph, the same in training and evaluation.

    Raises:
        NotTraceable: with the reason.
    """
    forward = type(module).forward
    if "forward" in vars(module):
        raise NotTraceable("it is an attribute of the instance")
    if hasattr(forward, "__wrapped__"):
        raise NotTraceable("it is decorated")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise NotTraceable("it takes a variable number of arguments")
        if parameter.default is not parameter.empty:
            raise NotTraceable("it has optional arguments")
    with _one_at_a_time:
        graphs = [_trace_in_mode(module, training) for training in (True, False)]
    training, evaluation = (graph.python_code("self").src for graph in graphs)
    if training != evaluation:
        raise NotTraceable("it differs between training and evaluation, or without grad mode")
    return graphs[0]


def _trace_in_mode(module: nn.Module, training: bool) -> fx.Graph:
    # A forward may ask for grad mode as for training.
    with (
        warnings.catch_warnings(),
        torch.set_grad_enabled(training),
        _restored(module) as has_changed,
        _restored_generators() as has_drawn,
        _patched_isinstance(type(module).forward.__globals__),
    ):
        warnings.simplefilter("ignore")
        for child in module.modules():
            vars(child)["training"] = training
        try:
            graph = _Tracer().trace(module)
        except NotTraceable:
            raise
        except Exception as error:
            # Any code may fail on a proxy, in any way.
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            raise NotTraceable(f"it cannot be traced: {reason}") from error
        if has_drawn():
            raise NotTraceable("it draws random numbers")
        if has_changed():
            raise NotTraceable("it changes attributes of a module")
    for node in graph.nodes:
        node.type = None  # annotations need not be importable
    return graph


def _modes() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(False),  # also of checkpoint()
    )


@contextlib.contextmanager
def _restored_generators() -> Iterator[Callable[[], bool]]:
    """Put the states of random generators back at the end; tell whether one has moved."""
    numpy = sys.modules["numpy"].random if "numpy" in sys.modules else None
    # As a list, which no mode of torch sees: FakeTensorMode would not compare the tensors.
    state, python = torch.get_rng_state(), random.getstate()
    of_torch = state.tolist()
    of_numpy = numpy.get_state() if numpy else None
    try:
        yield (
            lambda: (
                torch.get_rng_state().tolist() != of_torch
                or random.getstate() != python
                or (numpy is not None and str(numpy.get_state()) != str(of_numpy))
            )
        )
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        if numpy:
            numpy.set_state(of_numpy)


@contextlib.contextmanager
def _restored(module: nn.Module) -> Iterator[Callable[[], bool]]:
    """Put all attributes back at the end; give a function that says whether any has changed."""
    modes = [(child, child.training) for child in module.modules()]
    before = [
        (container, container.copy())
        for child in module.modules()
        for container in (vars(child), *vars(child).values())
        if type(container) in (dict, OrderedDict, list)
    ]
    try:
        yield lambda: any(_differ(container, content) for container, content in before)
    finally:
        for container, content in before:
            if _differ(container, content):
                container.clear()
                (container.extend if type(container) is list else container.update)(content)
        for child, mode in modes:
            vars(child)["training"] = mode


def _differ(a: Any, b: Any) -> bool:
    """Compare two lists or dictionaries, all but the mode of a module, by identity."""
    if type(a) is not list:
        a, b = ([x for item in c.items() if item[0] != "training" for x in item] for c in (a, b))
    return len(a) != len(b) or any(x is not y for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def _patched_isinstance(names: dict[str, Any]) -> Iterator[None]:
    """Let a module with these globals see tensors where proxies stand for them."""
    own = {"isinstance": names["isinstance"]} if "isinstance" in names else {}
    if not own and not names.get("__name__", "").startswith("torch."):
        names["isinstance"] = _isinstance
    try:
        yield
    finally:
        names.pop("isinstance", None)
        names.update(own)
