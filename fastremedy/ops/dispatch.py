"""From a list of tensors to the kernels of a backend."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _native, backends
from . import clip_grad_norm as definition
from . import shards

KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_workspaces: dict[tuple[torch.device, int, str], Tensor] = {}


def is_plain(input: Tensor, others: Sequence[Tensor | None] = ()) -> bool:
    """Whether nothing but memory is behind the tensors, and nobody transforms the call."""
    return not (
        is_transformed(input, *others)
        or input.layout != torch.strided
        or is_traceable_wrapper_subclass(input)
    )


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether somebody wants to see the call instead: functorch, forward mode, a subclass, jit."""
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.overrides.has_torch_function_variadic(*tensors) and not _are_at_home(tensors))
        or torch._C._get_tracing_state() is not None
    )


def _are_at_home(tensors: Sequence[Tensor | None]) -> bool:
    """Whether ``torch.set_default_device`` is all that makes torch ask for their functions.

    It is a mode, but one that only makes new tensors elsewhere.
    """
    modes = range(torch._C._len_torch_function_stack())
    return all(type(torch._C._get_function_stack_at(i)) is DeviceContext for i in modes) and all(
        tensor is None or type(tensor) in PLAIN_TYPES for tensor in tensors
    )


def is_traced(input: Tensor) -> bool:
    """Whether a tracer, by its mode or its types of tensors, wants to see an operator."""
    return (
        torch.compiler.is_compiling()
        or type(input) not in PLAIN_TYPES
        or torch._C._len_torch_dispatch_stack() > 0
    )


def has_kernels(stem: str, device_type: str) -> bool:
    """Whether anything but torch would run an operator."""
    return backends.active(stem, device_type) != "torch"


# What torch.compiler.assume_constant_result does, without importing the compiler for it.
has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlap, in any order."""
    if tensor.is_contiguous() or tensor.numel() == 0:
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def is_capturing() -> bool:
    """Whether a CUDA graph takes what the current stream is given."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def triton_kernels(stem: str) -> Any:
    """Import the Triton kernels of an operator; triton itself is loaded here and not earlier."""
    return importlib.import_module(f"fastremedy.triton_kernels.{stem}")


def workspace(device: torch.device, num_bytes: int, stem: str = "") -> Tensor | None:
    """Return zero-initialised device memory that one operator's kernels of a stream share.

    None on the CPU.
    """
    if num_bytes == 0:
        return None
    if device.type != "cuda":  # emulation
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    if torch.cuda.is_current_stream_capturing():
        # Memory of the graph: a replay on another stream must not meet this stream's calls.
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device)
    key = (device, stream.cuda_stream, stem)
    known = _workspaces.get(key)
    if known is None or known.numel() < num_bytes:
        # torch.compile, before it captures a graph, runs it with memory of the graph's pool, in
        # which nothing may stay. Pools are of one thread: take memory in another.
        with ThreadPoolExecutor(1) as thread:
            known = _workspaces[key] = thread.submit(_zeros_on, stream, num_bytes).result()
    return known


def _zeros_on(stream: torch.cuda.Stream, num_bytes: int) -> Tensor:
    with torch.cuda.stream(stream):
        return torch.zeros(num_bytes, dtype=torch.uint8, device=stream.device)


def clip_grad_norm_(
    tensors: list[Tensor],
    max_norm: float,
    norm_type: float,
    *,
    from_grad: bool,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Clip ``tensors``, or their ``.grad``; an infinite ``max_norm`` only measures.

    ``observe`` is given the norms of the gradients before clipping, float64, one of each tensor
    that has a gradient.
    """
    first = _first_grad(tensors, from_grad)
    backend = "torch" if first is None else backends.active("clip_grad_norm", first.device)
    native = None
    if backend in ("cpu", "cuda"):
        native = _native.module_for(backend).GradList(tensors, from_grad)
    # If every gradient is plain memory there is no DTensor: looking at all of them takes time.
    is_plain = native is not None and native.is_uniform and len(native) == len(tensors)
    if not is_plain and shards.any_dtensor(tensors):
        return _clip_mixed(tensors, max_norm, norm_type, from_grad, observe)
    if first is None:
        return torch.tensor(0.0)
    if native is not None:
        if native.is_uniform and (max_norm == math.inf or not native.has_duplicates):
            norms = None if observe is None else _room_for_norms(len(native), first.device)
            norm = _clip_native(native, first.device, max_norm, norm_type, norms)
            if observe is not None and norms is not None:
                observe(norms)
            return norm
    elif backend == "triton":
        grads = _grads_of(tensors, from_grad)
        if _is_uniform(grads) and (max_norm == math.inf or not _has_duplicates(grads)):
            norms = None if observe is None else _room_for_norms(len(grads), first.device)
            norm = _clip_triton(grads, max_norm, norm_type, norms)
            if observe is not None and norms is not None:
                observe(norms)
            return norm
    else:
        _refuse_sparse(tensors, from_grad)
        grads = _grads_of(tensors, from_grad)
        if observe is not None:
            observe(definition.tensor_norms(grads, norm_type))
        return definition.clip_grad_norm_(grads, max_norm, norm_type)
    _refuse_sparse(tensors, from_grad)
    return _clip_mixed(tensors, max_norm, norm_type, from_grad, observe)


def _room_for_norms(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=device)


def _grads_of(tensors: Sequence[Tensor], from_grad: bool) -> list[Tensor]:
    if not from_grad:
        return list(tensors)
    return [grad for t in tensors if (grad := t.grad) is not None]


def _refuse_sparse(tensors: Sequence[Tensor], from_grad: bool) -> None:
    for i, tensor in enumerate(tensors):
        grad = tensor.grad if from_grad else tensor
        if grad is not None and grad.layout != torch.strided:
            name = f"the gradient of parameters[{i}]" if from_grad else f"gradient {i}"
            raise NotImplementedError(f"{name} must be strided, got {grad.layout}")


def _first_grad(tensors: Sequence[Tensor], from_grad: bool) -> Tensor | None:
    if not from_grad:
        return tensors[0] if tensors else None
    return next((grad for t in tensors if (grad := t.grad) is not None), None)


def _clip_native(
    native: Any,
    device: torch.device,
    max_norm: float,
    norm_type: float,
    norms: Tensor | None = None,
) -> Tensor:
    dtype = torch.float64 if native.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=device)
    memory = workspace(device, native.workspace_bytes())
    address = 0 if memory is None else memory.data_ptr()
    norms_address = 0 if norms is None else norms.data_ptr()
    if native.clip(max_norm, norm_type, norm.data_ptr(), norms_address, address):
        torch.autograd.graph.increment_version(native.tensors)
    return norm


def _is_uniform(grads: list[Tensor]) -> bool:
    """Whether kernels can take all of them as they are: one device, dense, float dtypes."""
    device = grads[0].device
    return all(
        grad.device == device
        and grad.dtype in KERNEL_DTYPES
        and grad.layout == torch.strided
        and not is_traceable_wrapper_subclass(grad)
        and not grad.is_neg()
        and is_dense(grad)
        for grad in grads
    )


def _has_duplicates(grads: list[Tensor]) -> bool:
    """Whether some memory comes twice: programs would scale it at the same time."""
    addresses = [grad.data_ptr() for grad in grads if grad.numel() > 0]
    return len(set(addresses)) < len(addresses)


def _clip_triton(
    grads: list[Tensor], max_norm: float, norm_type: float, norms: Tensor | None = None
) -> Tensor:
    kernels = triton_kernels("clip_grad_norm")
    norm: Tensor = kernels.clip_grad_norm_(grads, max_norm, norm_type, norms)
    if max_norm != math.inf:
        torch.autograd.graph.increment_version(grads)
    return norm


def _clip_mixed(
    tensors: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    from_grad: bool,
    observe: Callable[[Tensor], None] | None,
) -> Tensor:
    """Clip gradients of several devices or ranks, or with layouts that kernels do not take."""
    maybe = [t.grad for t in tensors] if from_grad else list(tensors)
    grads = [grad for grad in maybe if grad is not None]
    memory, groups = shards.complete(grads)
    everyone = shards.everyone(grads, groups)
    if len(grads) < len(tensors):  # other ranks may have the gradient, and wait for this one
        placed = [t if g is None else g for t, g in zip(tensors, maybe, strict=True)]
        everyone = shards.everyone(placed, shards.groups_of(placed))
    total, norms = norm_over_ranks(memory, groups, everyone, norm_type, of_each=observe is not None)
    if observe is not None and norms is not None:
        observe(norms)
    if max_norm != math.inf:
        _scale(grads, definition.clip_coefficient(total, max_norm))
    return total.to(definition.norm_dtype(grads))


def norm_over_ranks(
    memory: Sequence[Tensor],
    groups: Sequence[shards.Groups],
    everyone: Mapping[shards.Groups, torch.device],
    norm_type: float,
    of_each: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the norm of gradients of any kind: a plain float64 scalar, equal on all ranks.

    ``memory`` is what of them is on this rank; ``groups`` are the process groups that have the
    rest. ``everyone`` holds all groups, those without gradient on this rank too, in an order that
    all ranks share. With ``of_each`` the second result holds the norm of each gradient, for which
    all ranks must have the same ones; otherwise it is None.
    """
    powers = shards.Powers(norm_type)
    places: dict[shards.Groups, dict[torch.device, list[int]]] = {}
    for i, (tensor, of_tensor) in enumerate(zip(memory, groups, strict=True)):
        places.setdefault(of_tensor, {}).setdefault(tensor.device, []).append(i)
    sums: dict[shards.Groups, Tensor] = {}
    order: list[int] = []
    for of_tensor, device in everyone.items():
        values = [torch.empty(0, dtype=torch.float64, device=device)]
        for chosen in places.get(of_tensor, {}).values():
            values.append(_powers_of([memory[i] for i in chosen], powers).to(device))
            order += chosen
        sums[of_tensor] = torch.cat(values) if of_each else powers.sum(torch.cat(values))
    if not sums:
        return torch.zeros((), dtype=torch.float64), None
    device = memory[0].device if memory else next(iter(everyone.values()))
    sums = shards.sum_over_ranks(sums, powers)
    joined = torch.cat([values.to(device) for values in sums.values()])
    norms = None
    if of_each:
        unordered = powers.root(joined).unbind()
        norms = torch.stack(
            [unordered[k] for k in sorted(range(len(order)), key=order.__getitem__)]
        )
    total = powers.root(powers.sum(joined)).reshape(())
    is_nothing = norm_type < 0 and not any(everyone) and not any(t.numel() for t in memory)
    return torch.zeros_like(total) if is_nothing else total, norms


def _powers_of(grads: list[Tensor], powers: shards.Powers) -> Tensor:
    """Return what each gradient of one device adds to the norm, float64."""
    values = powers.of_norms(_norms_of(grads, powers.norm_type))
    if powers.norm_type < 0:  # 0 stands for the norm of nothing, whose power is not 0
        for i, grad in enumerate(grads):
            if grad.numel() == 0:
                values[i].fill_(powers.neutral)
    return values


def _norms_of(grads: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of each gradient of one device, float64."""
    device = grads[0].device
    backend = backends.active("clip_grad_norm", device)
    norms = torch.zeros(len(grads), dtype=torch.float64, device=device)
    for taken in (grads, None):
        taken = taken or [_readable(grad) for grad in grads]
        if backend == "triton" and _is_uniform(taken):
            _clip_triton(taken, math.inf, norm_type, norms)
            return norms
        if backend in ("cpu", "cuda"):
            native = _native.module_for(backend).GradList(taken, False)
            if native.is_uniform:
                _clip_native(native, device, math.inf, norm_type, norms)
                return norms
    return definition.tensor_norms(grads, norm_type)


def _readable(grad: Tensor) -> Tensor:
    """Return the gradient, or a dense real copy with the same norm."""
    if grad.is_complex():
        return grad.abs()
    grad = grad.resolve_neg()
    return grad if is_dense(grad) else grad.contiguous()


def _scale(grads: list[Tensor], coefficient: Tensor) -> None:
    """Scale memory of this rank; many shards of one dtype at once."""
    if definition.is_on_host(coefficient) and coefficient.item() == 1.0:
        return  # elsewhere asking would wait for the device
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for grad in grads:
        memory = shards.local(grad)
        alike.setdefault((memory.device, memory.dtype), []).append(memory)
    for (device, dtype), group in alike.items():
        is_full = dtype in (torch.float32, torch.float64)  # a factor would lose digits in half
        if is_full and _is_uniform(group) and not _has_duplicates(group):
            torch._foreach_mul_(group, coefficient.to(device, dtype))
        else:
            definition.scale_(group, coefficient)
    torch.autograd.graph.increment_version([grad for grad in grads if shards.is_dtensor(grad)])
