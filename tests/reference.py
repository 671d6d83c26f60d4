"""What the tests compare with, and how close a result has to be."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
HALVES = (torch.float16, torch.bfloat16)

# Half the distance from 1 to the next number.
UNIT_ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in FLOATS}

# Rounding units that a result may be off beyond a multiple of torch's own error, which is zero
# where torch happens to hit the reference.
TOLERANCES = {
    # The reference is float64 itself, so that its own roundings count: about ten in a step.
    torch.float64: 16,
    # Factor, product, sum and result are rounded once each in a step; errors of two steps add up.
    torch.float32: 8,
    # Computed in float32 and rounded once.
    torch.float16: 1,
    torch.bfloat16: 1,
}

# The same examples in every run; interpreted and emulated kernels take their time.
few_examples = hypothesis.settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def assert_close_to_reference(
    actual: Tensor,
    reference64: Tensor,
    torch_result: Tensor,
    factor: float = 2,
    scale: float | None = None,
) -> None:
    """Fail if the error of ``actual`` is above ``factor`` times torch's, plus TOLERANCES.

    NaN and infinity have to be where the reference has them.

    Args:
        actual: result under test, in the dtype it was computed in.
        reference64: the same in float64 (complex128).
        torch_result: torch's own answer, rounded to the dtype of ``actual``.
        factor: how many times torch's largest error is allowed.
        scale: largest magnitude that took part; by default that of the result.
    """
    assert actual.shape == reference64.shape
    actual, reference64, torch_result = map(_real_on_cpu, (actual, reference64, torch_result))
    dtype = actual.dtype
    actual, torch_result = actual.double(), torch_result.double()
    finite = reference64.abs() <= torch.finfo(dtype).max
    torch.testing.assert_close(
        actual[~finite], reference64.to(dtype).double()[~finite], equal_nan=True
    )
    assert actual[finite].isfinite().all()
    if not finite.any():
        return
    error = (actual - reference64)[finite].abs().max().item()
    torch_error = (torch_result - reference64)[finite].abs()
    torch_error = torch_error[torch_error.isfinite()]  # where torch overflows it is no measure
    worst = torch_error.max().item() if torch_error.numel() else 0.0
    if scale is None:
        scale = reference64[finite].abs().max().item()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    allowed = factor * worst + TOLERANCES[dtype] * (UNIT_ROUNDOFF[dtype] * scale + smallest)
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}, torch's own {worst:.3e}"


def _real_on_cpu(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Fail unless dtype, shape and every bit are the same: NaN equals itself, -0 is not 0."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.is_meta == expected.is_meta
    if actual.is_meta:
        return
    actual, expected = (
        _real_on_cpu(tensor).contiguous().reshape(-1).view(torch.uint8)
        for tensor in (actual, expected)
    )
    assert torch.equal(actual, expected), f"{int((actual != expected).sum())} bytes differ"


def wide(tensor: Tensor) -> Tensor:
    """Return a copy in float64 or complex128 on the CPU."""
    tensor = tensor.detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def clip_reference(
    grads: Sequence[Tensor], max_norm: float, norm_type: float
) -> tuple[Tensor, list[Tensor]]:
    """Return the norm of all gradients as one vector, and the clipped gradients, in float64."""
    copies = [wide(grad) for grad in grads]
    magnitudes = torch.cat([copy.abs().flatten() for copy in copies])
    norm = torch.zeros((), dtype=torch.float64)
    if magnitudes.numel():
        norm = torch.linalg.vector_norm(magnitudes, norm_type)
    coefficient = torch.ones_like(norm)
    if max_norm != float("inf"):
        coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return norm, [copy * coefficient for copy in copies]


def clip_with_torch(
    grads: Sequence[Tensor], max_norm: float, norm_type: float
) -> tuple[Tensor, list[Tensor]]:
    """Do what torch does, halves in float32: torch alone would round the norm to a half."""
    params = []
    for grad in grads:
        copy = grad.detach().clone()
        param = torch.empty_like(copy.float() if copy.dtype in HALVES else copy)
        param.grad = copy.to(param.dtype)
        params.append(param)
    # torch has no infinity norm of nothing.
    norm = torch.nn.utils.clip_grad_norm_([p for p in params if p.numel()], max_norm, norm_type)
    return norm, [p.grad.to(grad.dtype) for p, grad in zip(params, grads, strict=True)]


def with_grads(grads: Sequence[Tensor]) -> list[Tensor]:
    """Return parameters with these very tensors as gradients."""
    params = []
    for grad in grads:
        param = torch.empty_like(grad, requires_grad=True)
        param.grad = grad
        params.append(param)
    return params


def grads_of(params: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients; every parameter has one."""
    return [param.grad for param in params if param.grad is not None]


def everything_in(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """Copy all that a step may change: parameters, gradients, state and hyper-parameters."""
    copies: dict[str, object] = {}
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            copies[f"groups[{g}].params[{i}]"] = param.detach().clone()
            copies[f"groups[{g}].params[{i}].grad"] = (
                None if param.grad is None else param.grad.clone()
            )
            for name, value in optimizer.state.get(param, {}).items():
                copies[f"groups[{g}].state[{i}].{name}"] = value.clone()
        for name, value in group.items():
            if name != "params":
                copies[f"groups[{g}].{name}"] = value
    return copies


def assert_unchanged(optimizer: torch.optim.Optimizer, before: dict[str, object]) -> None:
    """Fail unless everything is as :func:`everything_in` found it, to the bit."""
    after = everything_in(optimizer)
    assert after.keys() == before.keys()
    for name, expected in before.items():
        actual = after[name]
        if isinstance(expected, Tensor) and isinstance(actual, Tensor):
            assert_same_bits(actual, expected)
        else:
            assert actual == expected, name


def assert_norm_close(
    norm: Tensor, norm64: Tensor, torch_norm: Tensor, grads: Sequence[Tensor]
) -> None:
    """Hold a norm to the precision of the narrowest gradients: kernels may add those in float32."""
    if any(grad.dtype not in (torch.float64, torch.complex128) for grad in grads):
        norm = norm.float()
    assert_close_to_reference(norm, norm64, torch_norm)
