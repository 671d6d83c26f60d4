"""BatchNormReLU1d, 2d and 3d in the place of torch's modules."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fastremedy.nn import BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d

from .batch_norm_reference import ACTIVATIONS, NEGATIVE_SLOPE, activate, spare
from .reference import HALVES, assert_same_bits

# Ours, torch's, and a shape that both take.
MODULES = [
    pytest.param(BatchNormReLU1d, nn.BatchNorm1d, (6, 3), id="1d"),
    pytest.param(BatchNormReLU1d, nn.BatchNorm1d, (4, 3, 5), id="1d-length"),
    pytest.param(BatchNormReLU2d, nn.BatchNorm2d, (4, 3, 5, 2), id="2d"),
    pytest.param(BatchNormReLU3d, nn.BatchNorm3d, (2, 3, 2, 3, 2), id="3d"),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "average": {"momentum": None},
    "not_affine": {"affine": False},
    "no_bias": {"bias": False},
    "not_tracking": {"track_running_stats": False},
    "momentum": {"momentum": 0.4, "eps": 0.1},
}


def by_torch(cls: type[nn.Module], channels: int, options: dict[str, Any]) -> Any:
    options = dict(options)
    bias = options.pop("bias", True)  # not every torch has the argument
    module = cls(channels, **options)
    if not bias:
        module.register_parameter("bias", None)
    return module


def randomize(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)


@pytest.mark.parametrize(("ours", "torchs", "shape"), MODULES)
@pytest.mark.parametrize("options", OPTIONS)
def test_training_and_evaluation(
    backend: str,
    device: torch.device,
    options: str,
    ours: type[nn.Module],
    torchs: type[nn.Module],
    shape: tuple[int, ...],
) -> None:
    spare(backend, options in ("no_bias", "momentum", "not_affine"))
    module, expected = (
        ours(3, **OPTIONS[options]).to(device),
        by_torch(torchs, 3, OPTIONS[options]).to(device),
    )
    assert isinstance(module, torchs)
    randomize(module)
    expected.load_state_dict(module.state_dict())
    for mode in (True, True, False, True):
        module.train(mode)
        expected.train(mode)
        x, r = torch.randn(2, *shape, device=device).unbind()
        leaves = [t.clone().requires_grad_() for t in (x, r, x, r)]
        actual = module(leaves[0], leaves[1])
        reference = (expected(leaves[2]) + leaves[3]).relu()
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
        actual.square().sum().backward()
        reference.square().sum().backward()
        for own, other in zip(leaves[:2], leaves[2:], strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)
        for own, other in zip(module.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.state_dict(), expected.state_dict())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(backend: str, device: torch.device, activation: str) -> None:
    module = BatchNormReLU1d(3, activation=activation, negative_slope=NEGATIVE_SLOPE).to(device)
    x = torch.randn(8, 3, device=device)
    z = torch.nn.functional.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(module(x), activate(z, activation), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("options", ["default", "average"])
def test_half_modules_and_mixed_precision(
    backend: str, device: torch.device, options: str, dtype: torch.dtype
) -> None:
    """Parameters and buffers of the input's dtype, and float32 ones with an input of halves."""
    for is_half in (True, False):
        module = BatchNormReLU2d(3, **OPTIONS[options]).to(device, dtype if is_half else None)
        expected = nn.BatchNorm2d(3, **OPTIONS[options]).to(device, torch.float64)
        for _ in range(3):
            x = (torch.randn(4, 3, 5, 5, device=device) + 1).to(dtype)
            output = module(x)
            assert output.dtype == dtype
            reference = expected(x.double()).relu()
            torch.testing.assert_close(output, reference.to(dtype), rtol=0.02, atol=0.02)
            if is_half:  # every step rounds
                expected.load_state_dict(module.state_dict())
        tolerance = 0.01 if is_half else 1e-5
        torch.testing.assert_close(
            module.running_var.double(), expected.running_var, rtol=tolerance, atol=tolerance
        )
        output.float().sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad.dtype == module.weight.dtype


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormReLU2d(4)).to(device)
    x = torch.randn(2, 3, 6, 6, device=device)
    with torch.autocast(device.type, dtype):
        output = model(x)
    assert output.dtype == dtype
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    z = model[0](x)
    expected = torch.nn.functional.batch_norm(z, None, None, training=True).relu()
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("ours", "torchs", "shape"), MODULES)
@pytest.mark.parametrize("options", OPTIONS)
def test_state_dict_is_torchs(
    options: str, ours: type[nn.Module], torchs: type[nn.Module], shape: tuple[int, ...]
) -> None:
    module, other = ours(3, **OPTIONS[options]), by_torch(torchs, 3, OPTIONS[options])
    randomize(module)
    assert list(module.state_dict()) == list(other.state_dict())
    other.load_state_dict(module.state_dict())
    for name, value in other.state_dict().items():
        assert_same_bits(value, module.state_dict()[name])
    randomize(other)
    module.load_state_dict(other.state_dict())
    for name, value in other.state_dict().items():
        assert_same_bits(value, module.state_dict()[name])
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    by_torch(torchs, 3, OPTIONS[options]).load_state_dict(torch.load(buffer, weights_only=True))
    assert module.state_dict()._metadata == other.state_dict()._metadata  # type: ignore[attr-defined]


def test_state_dict_from_before_batches_were_counted() -> None:
    state = nn.BatchNorm2d(3).state_dict()
    del state["num_batches_tracked"]
    state._metadata[""]["version"] = 1  # type: ignore[attr-defined]
    module = BatchNormReLU2d(3)
    module.load_state_dict(state)
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.item() == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict(nn.BatchNorm2d(4).state_dict())


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(backend: str, device: torch.device, how: str) -> None:
    module = BatchNormReLU1d(3, activation="leaky_relu", negative_slope=0.3).to(device)
    module.collect_stats = True
    randomize(module)
    x = torch.randn(6, 3, device=device)
    module(x)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    else:
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert_same_bits(other(x), module(x))
    assert other.extra_repr() == module.extra_repr()
    for name, value in module.state_dict().items():
        assert_same_bits(other.state_dict()[name], value)
        assert other.state_dict()[name].data_ptr() != value.data_ptr() or value.numel() == 0


def test_what_torch_does_not_know_is_on_the_class() -> None:
    """A module that was made of another one, attribute by attribute, has it all the same."""
    module = BatchNormReLU2d(3)
    assert not module.collect_stats
    assert module.last_stats is None
    assert "collect_stats" not in vars(module)


def test_dtype_and_device_of_parameters() -> None:
    module = BatchNormReLU2d(3, dtype=torch.float64)
    assert {t.dtype for t in module.parameters()} == {torch.float64}
    assert module.running_var is not None
    assert module.running_var.dtype == torch.float64
    assert module.num_batches_tracked is not None
    assert module.num_batches_tracked.dtype == torch.int64
    half = module.half()
    assert half is module
    assert module.weight.dtype == torch.float16


def test_meta_device() -> None:
    module = BatchNormReLU2d(3, device="meta")
    output = module(torch.empty(2, 3, 4, 4, device="meta"))
    assert output.shape == (2, 3, 4, 4)
    assert output.is_meta
    module.to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(3))
    assert module(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)
    with torch.device("meta"):
        assert BatchNormReLU1d(3).weight.is_meta


def test_names() -> None:
    text = repr(BatchNormReLU2d(3))
    assert text.startswith("BatchNormReLU2d(3, eps=1e-05, momentum=0.1, affine=True")
    assert text.endswith("activation=relu)")
    text = repr(BatchNormReLU1d(3, activation="leaky_relu", negative_slope=0.2))
    assert text.endswith("activation=leaky_relu, negative_slope=0.2)")
    model = nn.Sequential(nn.Linear(2, 3), BatchNormReLU1d(3))
    assert [name for name, _ in model.named_children()] == ["0", "1"]
    assert [name for name, _ in model.named_parameters()][2:] == ["1.weight", "1.bias"]
    assert list(BatchNormReLU1d(3).children()) == []


def test_hooks_are_called(backend: str, device: torch.device) -> None:
    module = BatchNormReLU1d(3).to(device)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda *_: seen.append("forward"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    x = torch.randn(4, 3, device=device, requires_grad=True)
    module(x, x).sum().backward()
    assert seen == ["pre", "forward", "backward"]


def test_not_tracking_any_more(backend: str, device: torch.device) -> None:
    """As in torch: set to False later, buffers are left alone in training, used in evaluation."""
    module, expected = BatchNormReLU1d(3).to(device), nn.BatchNorm1d(3).to(device)
    for norm in (module, expected):
        norm.track_running_stats = False
        norm.running_mean.fill_(0.25)
    x = torch.randn(6, 3, device=device)
    for mode in (True, False):
        actual, reference = module.train(mode)(x), expected.train(mode)(x).relu()
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_statistics_without_a_counter(backend: str, device: torch.device) -> None:
    """``momentum=None`` with the counter removed is no average: torch leaves the buffers alone."""
    module, expected = (
        cls(3, momentum=None).to(device) for cls in (BatchNormReLU1d, nn.BatchNorm1d)
    )
    x = torch.randn(6, 3, device=device)
    for norm in (module, expected):
        norm.num_batches_tracked = None
        norm(x)
    torch.testing.assert_close(module.state_dict(), expected.state_dict(), rtol=0, atol=0)
