"""BatchNorm of any strides: the right elements meet, memory formats are those of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastremedy

from .batch_norm_reference import (
    LAYOUTS,
    assert_matches_torch,
    eager,
    is_slow,
    make_tensors,
    run,
    spare,
)
from .reference import assert_same_bits

SHAPE = (3, 9, 5, 3)
KERNEL_LAYOUTS = ("contiguous", "last", "misaligned_last")  # others are copied before
batch_norm_relu = fastremedy.functional.batch_norm_relu


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: str, device: torch.device, layout: str, training: bool) -> None:
    spare(backend, not training and layout not in KERNEL_LAYOUTS)
    for residual in (True,) if is_slow(backend) else (False, True):
        tensors = make_tensors(SHAPE, torch.float32, device, residual, layout)
        assert_matches_torch(tensors, training=training)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["sliced", "misaligned", "misaligned_last", "sliced_channels"])
def test_layouts_of_other_dtypes(
    backend: str, device: torch.device, layout: str, dtype: torch.dtype
) -> None:
    spare(backend, layout.startswith("sliced") and dtype != torch.float16)
    assert_matches_torch(make_tensors(SHAPE, dtype, device, True, layout))


@pytest.mark.parametrize("shape", [(5, 9), (4, 7, 6), (2, 3, 4, 5), (2, 3, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_every_dimension(
    backend: str, device: torch.device, layout: str, shape: tuple[int, ...]
) -> None:
    spare(backend, layout not in KERNEL_LAYOUTS or len(shape) == 4)
    assert_matches_torch(make_tensors(shape, torch.float32, device, False, layout))


@pytest.mark.parametrize("offset", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_misalignment(
    backend: str, device: torch.device, dtype: torch.dtype, offset: int
) -> None:
    """Input, residual and gradient begin at different places of a vector."""
    spare(backend, offset not in (1, 4))
    shape, size = (2, 5, 17), 2 * 5 * 17
    tensors = make_tensors(shape, dtype, device, True)
    buffer = torch.randn(3, size + 16, device=device).to(dtype)
    tensors = tensors._replace(
        input=buffer[0, offset : offset + size].view(shape),
        residual=buffer[1, 2 * offset - 1 : 2 * offset - 1 + size].view(shape),
    )
    assert_matches_torch(tensors, buffer[2, 9 - offset : 9 - offset + size].view(shape))


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_another_layout(
    backend: str, device: torch.device, layout: str, grad_layout: str
) -> None:
    spare(backend, layout not in KERNEL_LAYOUTS)
    residual_layout = grad_layout if layout == "contiguous" else "contiguous"
    tensors = make_tensors((2, 3, 4, 3), torch.float32, device, True, layout)
    assert tensors.residual is not None
    tensors = tensors._replace(residual=LAYOUTS[residual_layout](tensors.residual))
    grad = LAYOUTS[grad_layout](torch.randn_like(tensors.input))
    assert_matches_torch(tensors, grad)


@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_gradient_of_a_sum_is_expanded(
    backend: str, device: torch.device, residual: bool, layout: str
) -> None:
    tensors = make_tensors(SHAPE, torch.float32, device, residual, layout)
    grad = torch.full((), 0.5, device=device).expand(SHAPE)
    assert grad.stride() == (0, 0, 0, 0)
    assert_matches_torch(tensors, grad)


@pytest.mark.parametrize("dim", range(4))
def test_expanded_input_and_residual(backend: str, device: torch.device, dim: int) -> None:
    tensors = make_tensors(SHAPE, torch.float32, device, True)
    assert tensors.residual is not None
    grad = torch.randn(SHAPE, device=device)
    expanded = tensors._replace(
        input=tensors.input.narrow(dim, 0, 1).expand(SHAPE),
        residual=tensors.residual.narrow(dim, 1, 1).expand(SHAPE),
    )
    dense = expanded._replace(
        input=expanded.input.contiguous(),
        residual=expanded.residual.contiguous(),  # type: ignore[union-attr]
    )
    actual, expected = run(batch_norm_relu, expanded, grad), run(batch_norm_relu, dense, grad)
    for name, value in expected.items():
        if backend == "torch":
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-5)
        else:
            assert_same_bits(actual[name], value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_lie_as_in_torch(backend: str, device: torch.device, layout: str) -> None:
    """At least where the input has a memory format: what follows may depend on it."""
    spare(backend, layout not in KERNEL_LAYOUTS)
    tensors = make_tensors(SHAPE, torch.float32, device, True, layout)
    grad = torch.randn(SHAPE, device=device)
    ours, by_torch = run(batch_norm_relu, tensors, grad), run(eager, tensors, grad)
    assert ours["output"].shape == by_torch["output"].shape
    if layout in ("contiguous", "last", "misaligned", "misaligned_last"):
        assert ours["output"].stride() == tensors.input.stride()
        assert ours["input.grad"].stride() == tensors.input.stride()
        assert by_torch["output"].stride() == tensors.input.stride()
    else:
        assert ours["output"].is_contiguous()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_and_neighbours_are_left_alone(
    backend: str, device: torch.device, layout: str
) -> None:
    spare(backend, layout not in KERNEL_LAYOUTS)
    tensors = make_tensors(SHAPE, torch.float32, device, True, layout)
    grad = LAYOUTS[layout](torch.randn(SHAPE, device=device))
    kept = [t.clone() for t in (*tensors, grad) if t is not None]
    pointer = tensors.input.data_ptr()
    run(batch_norm_relu, tensors, grad)
    assert tensors.input.data_ptr() == pointer
    for actual, expected in zip((*tensors, grad), kept, strict=True):
        assert actual is not None
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", ["input", "residual", "grad", "weight", "bias", "running_mean"])
def test_negated(backend: str, device: torch.device, name: str) -> None:
    """A tensor may carry torch's lazy minus sign, strided or not."""
    tensors = make_tensors((4, 3, 5), torch.float32, device, True)
    grad = torch.randn(4, 3, 5, device=device)
    value = grad if name == "grad" else getattr(tensors, name)
    for lazy in (torch.complex(value, value).conj().imag, torch._neg_view(value)):
        assert lazy.is_neg()
        if name == "grad":
            assert_matches_torch(tensors, lazy)
        else:
            assert_matches_torch(tensors._replace(**{name: lazy}), grad)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_with_gaps(backend: str, device: torch.device, name: str) -> None:
    """Every other element of a vector, or one that is expanded, or begins anywhere."""
    tensors = make_tensors((4, 6, 5), torch.float32, device, True)
    values = getattr(tensors, name)
    for view in (
        values.repeat_interleave(2)[::2],
        torch.cat([values[:1], values])[1:],
        values[:1].expand(6),
    ):
        if name.startswith("running") and view.stride() == (0,):
            continue  # cannot be written
        assert_matches_torch(tensors._replace(**{name: view}))


def test_updates_running_statistics_of_any_strides(backend: str, device: torch.device) -> None:
    buffer = torch.zeros(6, 4, device=device)
    mean, var = buffer[:, 1], buffer[:, 2]
    input = torch.randn(8, 6, device=device)
    batch_norm_relu(input, mean, var, training=True)
    torch.testing.assert_close(mean, 0.1 * input.mean(0))
    torch.testing.assert_close(var, 0.1 * input.var(0))
    assert (buffer[:, [0, 3]] == 0).all()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_model_of_a_memory_format(
    backend: str, device: torch.device, memory_format: torch.memory_format
) -> None:
    def train(norm: nn.Module, activation: nn.Module) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, activation, nn.Conv2d(4, 1, 1))
        model.to(device, memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(images)
            assert output.is_contiguous(memory_format=memory_format)
            output.square().mean().backward()
            optimizer.step()
        return [*model.parameters(), *model.buffers()]

    images = torch.randn(2, 3, 6, 6, device=device).to(memory_format=memory_format)
    actual = train(fastremedy.nn.BatchNormReLU2d(4), nn.Identity())
    expected = train(nn.BatchNorm2d(4), nn.ReLU())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)  # three training steps


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_saved_tensors_come_back_in_another_order(
    backend: str, device: torch.device, memory_format: torch.memory_format, activation: str
) -> None:
    """As contiguous ones from ``torch.autograd.graph.save_on_cpu(pin_memory=True)``."""

    def grads(unpack: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        leaves = [
            tensor.to(device, memory_format=memory_format).detach().requires_grad_()
            for tensor in (values, values.flip(3))
        ]
        module = fastremedy.nn.BatchNormReLU2d(4, activation=activation).to(device)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
            output = module(*leaves)
        output.backward(values.to(device, memory_format=memory_format))
        return [*(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())]

    def swap(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=other) if tensor.dim() == 4 else tensor

    values = torch.randn(2, 4, 3, 5)
    is_last = memory_format is torch.channels_last
    other = torch.contiguous_format if is_last else torch.channels_last
    for actual, expected in zip(grads(swap), grads(lambda tensor: tensor), strict=True):
        torch.testing.assert_close(actual, expected)
