"""Focal loss as a node of torch's graph: derivatives of every order, other transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastremedy

from .batch_norm_reference import is_slow, spare
from .focal_loss_reference import (
    FORMS,
    function_of,
    make_call,
    run,
    sigmoid_reference,
    softmax_reference,
    vectors,
)
from .reference import FLOATS, HALVES, UNIT_ROUNDOFF, assert_same_bits

BOTH_FORMS = pytest.mark.parametrize("form", FORMS)
KINDS = pytest.mark.parametrize("kind", ["labels", "soft"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
SMOOTH_GAMMAS = (0.0, 0.5, 1.0, 1.5, 2.0, 5.0)
# Forward-mode differentiation scripts its formulas.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


@BOTH_FORMS
@KINDS
@pytest.mark.parametrize("gamma", SMOOTH_GAMMAS)
def test_gradcheck_and_gradgradcheck(
    backend: str, device: torch.device, gamma: float, kind: str, form: str
) -> None:
    spare(backend, gamma != 0.5)
    input, target = make_call(form, (2, 3), device, torch.float64, kind)
    options: dict[str, Any] = {"gamma": gamma, **vectors(form, 3, device)}
    leaf = (input / 3).requires_grad_()
    for reduction in ("none", "mean"):
        if is_slow(backend) and (reduction == "none") == (kind == "soft"):
            continue

        def function(x: Tensor, reduction: str = reduction) -> Any:
            return function_of(form)(x, target, reduction=reduction, **options)

        assert torch.autograd.gradcheck(function, (leaf,))
        assert torch.autograd.gradgradcheck(function, (leaf,))


@BOTH_FORMS
@pytest.mark.parametrize("gamma", SMOOTH_GAMMAS)
def test_targets_and_vectors_that_require_gradients(
    backend: str, device: torch.device, gamma: float, form: str
) -> None:
    """Torch's operators run; their value is that of the kernels."""
    spare(backend, True)  # they do not run
    input, target = make_call(form, (2, 3), device, torch.float64, "soft")
    values = {name: value.double() for name, value in vectors(form, 3, device).items()}
    leaves = [t.clone().requires_grad_() for t in (input / 3, target, *values.values())]
    function = function_of(form)

    def call(x: Tensor, t: Tensor, *given: Tensor) -> Any:
        named = dict(zip(values, given, strict=True))
        return function(x, t, gamma=gamma, reduction="sum", **named)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    expected = function(input / 3, target, gamma=gamma, reduction="sum", **values)
    torch.testing.assert_close(call(*leaves).detach(), expected, rtol=1e-12, atol=0)


def test_gradient_of_probabilities_is_that_of_cross_entropy(
    backend: str, device: torch.device
) -> None:
    """Of a probability of 0, too."""
    input, _ = make_call("softmax", (4, 3), device, torch.float64)
    target = torch.eye(4, 3, device=device, dtype=torch.float64)
    grads = []
    for function in (fastremedy.functional.focal_loss, F.cross_entropy):
        options = {"gamma": 0.0} if function is not F.cross_entropy else {}
        leaf = target.clone().requires_grad_()
        function(input, leaf, reduction="sum", **options).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


@REDUCTIONS
@BOTH_FORMS
@KINDS
def test_backward_twice(
    backend: str, device: torch.device, kind: str, form: str, reduction: str
) -> None:
    """The second gradient is right, and the first is not touched by it."""
    input, target = make_call(form, (5, 4, 3), device, kind=kind)
    leaf = input.clone().requires_grad_()
    loss = function_of(form)(leaf, target, reduction=reduction)
    grads = [3 * torch.rand_like(loss) for _ in range(2)]
    (first,) = torch.autograd.grad(loss, leaf, grads[0], retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, grads[1], retain_graph=True)
    (again,) = torch.autograd.grad(loss, leaf, grads[0])
    assert_same_bits(first, kept)
    assert_same_bits(again, kept)
    _, expected = run(function_of(form), input, target, grads[1], reduction=reduction)
    assert_same_bits(second, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf, grads[0])


@REDUCTIONS
@BOTH_FORMS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scaled_loss(
    backend: str, device: torch.device, dtype: torch.dtype, form: str, reduction: str
) -> None:
    """As a GradScaler does; gradients add up in ``.grad``."""
    spare(backend, dtype == torch.bfloat16 or reduction == "sum")
    input, target = make_call(form, (6, 4), device, dtype)
    function = function_of(form)
    _, plain = run(function, input, target, reduction=reduction)
    for scale in (0.0, -1.0, 3.0, 1024.0):
        leaf = input.clone().requires_grad_()
        (function(leaf, target, reduction=reduction).float() * scale).sum().backward()
        assert leaf.grad is not None
        unit = 8 * UNIT_ROUNDOFF[dtype]
        tiny = (abs(scale) + 1) * torch.finfo(dtype).smallest_normal
        torch.testing.assert_close(
            leaf.grad.double(), plain.double() * scale, rtol=unit, atol=unit * tiny
        )
        kept = leaf.grad.clone()
        function(leaf, target, reduction=reduction).sum().backward()
        assert_same_bits(leaf.grad, kept + plain)


@BOTH_FORMS
@KINDS
def test_loss_used_twice(backend: str, device: torch.device, kind: str, form: str) -> None:
    input, target = make_call(form, (6, 4), device, kind=kind)
    other = torch.randn_like(input)
    results = []
    for x, function in (
        (input, function_of(form)),
        (input.double(), sigmoid_reference if form == "sigmoid" else softmax_reference),
    ):
        leaf = x.clone().requires_grad_()
        weight = torch.ones((), dtype=x.dtype, requires_grad=True)
        loss = function(leaf * weight, target, reduction="mean")
        again = function(leaf + other, target, reduction="mean")
        (loss * loss + 2 * loss + again.exp()).backward()
        results.append([leaf.grad.double(), weight.grad.double()])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@REDUCTIONS
@BOTH_FORMS
@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_second_derivative(
    backend: str, device: torch.device, dtype: torch.dtype, kind: str, form: str, reduction: str
) -> None:
    """A gradient penalty; with ``create_graph`` the first gradient is the same as without."""
    spare(backend, dtype in HALVES)
    input, target = make_call(form, (4, 3), device, dtype, kind)
    results = []
    for x, function in (
        (input, function_of(form)),
        (input.double(), sigmoid_reference if form == "sigmoid" else softmax_reference),
    ):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, target, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.double().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.double().square().sum(), leaf)
        results.append((grad.detach().double(), second.double()))
    plain = run(function_of(form), input, target, reduction=reduction)[1]
    rounding = 8 * UNIT_ROUNDOFF[dtype]
    for actual, expected in zip(
        (*results[0], plain.double()), (*results[1], results[1][0]), strict=True
    ):
        error = (actual - expected).abs().max()
        assert error <= max(rounding, 1e-5) * expected.abs().max()


def test_without_gradients_there_is_no_graph(backend: str, device: torch.device) -> None:
    for form in FORMS:
        input, target = make_call(form, (6, 4), device)
        function = function_of(form)
        assert function(input, target).grad_fn is None
        input.requires_grad_()
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                assert not function(input, target).requires_grad
        assert function(input, target).requires_grad
        with torch.inference_mode():
            inference = input.detach().clone()
            expected = function(inference, target)
        assert_same_bits(function(inference, target), expected)


def test_input_changed_before_backward_is_an_error(backend: str, device: torch.device) -> None:
    if backend == "torch":
        pytest.skip("torch's own operators keep what they computed from it")
    for form in FORMS:
        input, target = make_call(form, (6, 4), device)
        leaf = input.requires_grad_()
        loss = function_of(form)(leaf, target, reduction="none")
        with torch.no_grad():
            leaf.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@BOTH_FORMS
def test_checkpointing(backend: str, device: torch.device, form: str, use_reentrant: bool) -> None:
    input, target = make_call(form, (6, 4), device)
    grads = []
    for wrap in (False, True):
        leaf = input.clone().requires_grad_()

        def loss_of(x: Tensor) -> Any:
            return function_of(form)(2 * x, target, reduction="mean")

        loss = checkpoint(loss_of, leaf, use_reentrant=use_reentrant) if wrap else loss_of(leaf)
        loss.backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert_same_bits(*grads)


@BOTH_FORMS
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(backend: str, device: torch.device, dtype: torch.dtype, form: str) -> None:
    """Logits of halves give a float32 loss and a gradient of halves."""
    layer = nn.Linear(5, 4).to(device)
    target = make_call(form, (6, 4), device)[1]
    for reduction in ("mean", "none"):
        with torch.autocast(device.type, dtype):
            logits = layer(torch.randn(6, 5, device=device))
            assert logits.dtype == dtype
            logits.retain_grad()
            loss = function_of(form)(logits, target, reduction=reduction)
        assert loss.dtype == torch.float32
        wide = logits.detach().float().requires_grad_()
        expected = function_of(form)(wide, target, reduction=reduction)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
        expected.sum().backward()
        loss.sum().backward()
        assert logits.grad is not None
        assert wide.grad is not None
        assert logits.grad.dtype == dtype
        unit = UNIT_ROUNDOFF[dtype] * 1.01
        torch.testing.assert_close(
            logits.grad.float(),
            wide.grad,
            rtol=unit,
            atol=torch.finfo(dtype).smallest_normal * unit,
        )


# --- transforms that see torch's own operators ---


def test_functional_transforms(backend: str, device: torch.device) -> None:
    for form in FORMS:
        input, target = make_call(form, (6, 4), device, torch.float64)
        function = function_of(form)
        _, expected = run(function, input, target, reduction="sum")

        def loss_of(x: Tensor, t: Tensor = target, function: Any = function) -> Any:
            return function(x, t, reduction="sum")

        actual = torch.func.grad(loss_of)(input)
        torch.testing.assert_close(actual, expected)
        per_sample = torch.vmap(torch.func.grad(lambda x, t: loss_of(x[None], t[None])))
        torch.testing.assert_close(per_sample(input, target), expected)
        tangent = torch.randn_like(input)
        value, derivative = torch.func.jvp(loss_of, (input,), (tangent,))
        torch.testing.assert_close(value, loss_of(input))
        torch.testing.assert_close(derivative, (expected * tangent).sum())
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss_of(forward_ad.make_dual(input, tangent)))
        torch.testing.assert_close(dual.tangent, derivative)
        hessian = torch.func.hessian(loss_of)(input)
        by_autograd = torch.autograd.functional.hessian(loss_of, input)
        torch.testing.assert_close(hessian, by_autograd)


def test_vmap_over_models(backend: str, device: torch.device) -> None:
    for form in FORMS:
        input, target = make_call(form, (3, 6, 4), device)
        target = make_call(form, (6, 4), device)[1]
        function = function_of(form)
        actual = torch.vmap(function, (0, None))(input, target)
        expected = torch.stack([function(x, target) for x in input])
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_what_is_kept_for_backward(backend: str, device: torch.device) -> None:
    """Logits and target, and numbers of a row: no tensor of the size of the logits."""
    if backend == "torch":
        pytest.skip("keeps what torch's own operators keep")
    for form in FORMS:
        for kind in ("labels", "soft"):
            input, target = make_call(form, (64, 50), device, kind=kind)
            kept: dict[int, int] = {}

            def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                function_of(form)(input.requires_grad_(), target, reduction="none")
            assert kept.pop(input.data_ptr()) == input.nbytes
            kept.pop(target.data_ptr())
            assert sum(kept.values()) <= 3 * 4 * 64 + 8
