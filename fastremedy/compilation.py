"""Load and compile ahead of the first step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import nn

from . import backends
from .nn.batch_norm_relu import _BatchNormReLU
from .nn.focal_loss import _FocalLoss
from .ops.dispatch import triton_kernels


class Loaded(NamedTuple):
    """What will run an operator."""

    backend: str
    num_compiled: int  # kernels compiled or found in Triton's cache; other backends compile nothing


def warmup(
    model_or_stems: nn.Module | str | Iterable[str] | None = None,
    device: torch.device | str | int | None = None,
) -> dict[str, Loaded]:
    """Load the native library and compile the Triton kernels that training will need.

    Without it the first step does so: for seconds where Triton runs and its cache is empty. Kernels
    are compiled in their usual forms: what else a model turns out to need compiles when it is
    needed.

    Args:
        model_or_stems: a model, for the operators of its modules and, if it trains, of AdamW and
            ``clip_``; or operators, of ``fastremedy.backends.STEMS``; or None for all operators.
        device: where the tensors will be. Default: where the model is, or else the current CUDA
            device if there is one, or else the CPU.

    Returns:
        The backend of each operator, and how many kernels were compiled for it.

    Raises:
        TypeError: ``model_or_stems`` is neither.
        ValueError: unknown stem or device.
        RuntimeError: a backend was chosen that cannot run there.

    Example:
        >>> import fastremedy
        >>> with fastremedy.backends.use("torch"):
        ...     fastremedy.warmup("focal_loss", "cpu")
        {'focal_loss': Loaded(backend='torch', num_compiled=0)}
    """
    model = model_or_stems if isinstance(model_or_stems, nn.Module) else None
    stems = _stems_of(model) if model is not None else _named(model_or_stems)
    place = _place(device, model)
    dtypes = None if model is None else {t.dtype for t in _tensors_of(model)}
    loaded = {}
    for stem in stems:
        backend = backends.active(stem, place)  # asks the native library, and so loads it
        loaded[stem] = Loaded(backend, _compile(stem, place, dtypes) if backend == "triton" else 0)
    return loaded


def _stems_of(model: nn.Module) -> list[str]:
    needed: set[str] = set()
    if any(param.requires_grad for param in model.parameters()):
        needed.update(("clip_grad_norm", "adamw"))
    for module in model.modules():
        if isinstance(module, _BatchNormReLU):
            needed.add("batch_norm_relu")
        elif isinstance(module, _FocalLoss):
            needed.add("focal_loss")
    return [stem for stem in backends.STEMS if stem in needed]


def _named(stems: Any) -> list[str]:
    if stems is None:
        return list(backends.STEMS)
    if not isinstance(stems, Iterable):
        raise TypeError(f"model_or_stems must be a module or stems, got {type(stems).__name__}")
    named = [stems] if isinstance(stems, str) else list(stems)
    for stem in named:
        if stem not in backends.STEMS:
            known = ", ".join(backends.STEMS)
            raise ValueError(f"model_or_stems must be a module or stems of {known}, got {stem!r}")
    return named


def _place(device: torch.device | str | int | None, model: nn.Module | None) -> torch.device:
    if device is None:
        first = None if model is None else next(_tensors_of(model), None)
        fallback = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(fallback) if first is None else first.device
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a device of torch, got {device!r}") from error
    count = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= count:
        raise ValueError(f"device must be among the {count} CUDA devices torch sees, got {place}")
    return place


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


_POINTERS = {
    "*fp64": torch.float64,
    "*fp32": torch.float32,
    "*fp16": torch.float16,
    "*bf16": torch.bfloat16,
    "*i64": torch.int64,
    "*i32": torch.int32,
    "*u8": torch.uint8,
    "*i1": torch.bool,
}


def _compile(stem: str, device: torch.device, dtypes: set[torch.dtype] | None) -> int:
    """Compile the forms that the module of an operator lists, as its launches would."""
    kernels = triton_kernels(stem)
    import triton

    forms = [
        form
        for form in kernels.specialisations()
        if isinstance(form.kernel, triton.JITFunction)  # it is not interpreted
        and (dtypes is None or _is_for(form, dtypes))
    ]
    if not forms:
        return 0
    # LLVM and ptxas run without the interpreter's lock.
    with (
        torch.cuda.device(device),
        ThreadPoolExecutor() as executor,
        triton.AsyncCompileMode(executor),
    ):
        for form in forms:
            form.kernel.warmup(*_arguments(form), grid=(1,), **form.options)
    return len(forms)


def _is_for(form: Any, dtypes: set[torch.dtype]) -> bool:
    """Whether a model with parameters of these types may launch the form."""
    names = triton_kernels("multi_tensor").TRITON_DTYPES
    params = {names[dtype] for dtype in dtypes if dtype in names}
    if "PARAM" in form.constants:
        return form.constants["PARAM"] in params
    if torch.float32 in dtypes:  # activations may be autocast
        params |= {names[torch.float16], names[torch.bfloat16]}
    return form.constants.get("DTYPE") in {None, *params}


def _arguments(form: Any) -> Iterator[Any]:
    """Yield values of the types that a form has; numbers that Triton does not specialise on."""
    for name in form.kernel.arg_names:
        if name in form.constants:
            yield form.constants[name]
        else:
            kind = form.types[name]
            yield _POINTERS[kind] if kind.startswith("*") else 0.5 if "fp" in kind else 2
