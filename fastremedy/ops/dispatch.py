"""From a list of tensors to the kernels of a backend."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _native, backends
from . import clip_grad_norm as definition

KERNEL_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)

_workspaces: dict[tuple[torch.device, int, str], Tensor] = {}


def is_plain(input: Tensor, others: Sequence[Tensor | None] = ()) -> bool:
    """Whether nothing but memory is behind the tensors, and nobody transforms the call."""
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.overrides.has_torch_function_variadic(input, *others)
        or input.layout != torch.strided
        or is_traceable_wrapper_subclass(input)
        or torch._C._get_tracing_state() is not None
    )


def is_traced(input: Tensor) -> bool:
    """Whether a tracer, by its mode or its types of tensors, wants to see an operator."""
    return (
        torch.compiler.is_compiling()
        or type(input) not in _PLAIN_TYPES
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
        return torch.zeros(num_bytes, dtype=torch.uint8)
    if torch.cuda.is_current_stream_capturing():
        # Memory of the graph: a replay on another stream must not meet this stream's calls.
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream, stem)
    known = _workspaces.get(key)
    if known is None or known.numel() < num_bytes:
        known = _workspaces[key] = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return known


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
    if first is None:
        return torch.tensor(0.0)
    backend = backends.active("clip_grad_norm", first.device)
    if backend in ("cpu", "cuda"):
        native = _native.module_for(backend).GradList(tensors, from_grad)
        if native.is_uniform and (max_norm == math.inf or not native.has_duplicates):
            norms = None if observe is None else _room_for_norms(len(native), first.device)
            norm = _clip_native(native, first, max_norm, norm_type, norms)
            if observe is not None and norms is not None:
                observe(norms)
            return norm
        grads = native.tensors
    else:
        grads = [grad for t in tensors if (grad := t.grad if from_grad else t) is not None]
    if (
        backend == "triton"
        and _is_uniform(grads)
        and (max_norm == math.inf or not _has_duplicates(grads))
    ):
        norms = None if observe is None else _room_for_norms(len(grads), first.device)
        norm = _clip_triton(grads, max_norm, norm_type, norms)
        if observe is not None and norms is not None:
            observe(norms)
        return norm
    if observe is not None:
        observe(definition.tensor_norms(grads, norm_type))
    if backend == "torch":
        return definition.clip_grad_norm_(grads, max_norm, norm_type)
    return _clip_mixed(grads, max_norm, norm_type)


def _room_for_norms(count: int, device: torch.device) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device=device)


def _first_grad(tensors: Sequence[Tensor], from_grad: bool) -> Tensor | None:
    if not from_grad:
        return tensors[0] if tensors else None
    return next((grad for t in tensors if (grad := t.grad) is not None), None)


def _clip_native(
    native: Any, first: Tensor, max_norm: float, norm_type: float, norms: Tensor | None = None
) -> Tensor:
    dtype = torch.float64 if native.has_float64 else torch.float32
    norm = torch.empty((), dtype=dtype, device=first.device)
    memory = workspace(first.device, native.workspace_bytes())
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


def _clip_mixed(grads: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Clip gradients of several devices or with layouts that kernels do not take."""
    if any(is_traceable_wrapper_subclass(grad) for grad in grads):
        total = torch.nn.utils.get_total_norm(grads, norm_type)
        if max_norm != math.inf:
            definition.scale_(grads, definition.clip_coefficient(total.double(), max_norm))
        return total
    by_device: dict[torch.device, list[Tensor]] = {}
    for grad in grads:
        by_device.setdefault(grad.device, []).append(_readable(grad))
    norms = [grad_norm_on(device, group, norm_type) for device, group in by_device.items()]
    total = definition.total_norm([norm.reshape(1) for norm in norms], norm_type)
    if norm_type == 0.0:
        total = torch.stack([norm.double().to(total.device) for norm in norms]).sum()
    if max_norm != math.inf:
        definition.scale_(grads, definition.clip_coefficient(total, max_norm))
    return total.to(definition.norm_dtype(grads))


def _readable(grad: Tensor) -> Tensor:
    """Return the gradient, or a dense real copy with the same norm."""
    if grad.is_complex():
        return grad.abs()
    grad = grad.resolve_neg()
    return grad if is_dense(grad) else grad.contiguous()


def grad_norm_on(device: torch.device, grads: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of dense real gradients of one device."""
    backend = backends.active("clip_grad_norm", device)
    if backend == "triton" and _is_uniform(grads):
        return _clip_triton(grads, math.inf, norm_type)
    if backend in ("cpu", "cuda"):
        native = _native.module_for(backend).GradList(grads, False)
        if native.is_uniform:
            return _clip_native(native, grads[0], math.inf, norm_type)
    return definition.grad_norm(grads, norm_type)
