"""What torch refuses is refused with torch's words, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastremedy
from fastremedy import _native
from fastremedy.nn import BatchNormReLU1d, BatchNormReLU2d, BatchNormReLU3d

from .reference import assert_same_bits

batch_norm_relu = fastremedy.functional.batch_norm_relu
Call = Callable[..., Tensor]

# Of a batch [4, 3, 5]: what is wrong with one argument, as torch and ours get it.
CASES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "weight too long": lambda a: {"weight": torch.ones(4)},
    "bias too short": lambda a: {"bias": torch.ones(2)},
    "running_mean too long": lambda a: {"running_mean": torch.ones(6)},
    "running_var too short": lambda a: {"running_var": torch.ones(1)},
    "only running_mean": lambda a: {"running_var": None},
    "only running_var": lambda a: {"running_mean": None},
    "integers": lambda a: {"input": a["input"].long()},
    "bools": lambda a: {"input": a["input"] > 0},
    "complex": lambda a: {"input": a["input"].to(torch.complex64)},
    "vector": lambda a: {"input": a["input"][:, 0, 0]},
    "scalar": lambda a: {"input": a["input"][0, 0, 0]},
    "eps zero": lambda a: {"eps": 0.0},
    "eps negative": lambda a: {"eps": -1e-5},
    "one value": lambda a: {"input": a["input"][:1, :, :1]},
    "one value, last": lambda a: {"input": a["input"][:1, :, 0]},
}


def arguments(device: torch.device) -> dict[str, Any]:
    return {
        "input": torch.randn(4, 3, 5, device=device),
        "running_mean": torch.zeros(3, device=device),
        "running_var": torch.ones(3, device=device),
        "weight": torch.ones(3, device=device),
        "bias": torch.ones(3, device=device),
        "training": True,
        "eps": 1e-5,
    }


def error_of(function: Call, arguments: dict[str, Any]) -> Exception:
    with pytest.raises((RuntimeError, ValueError, IndexError, NotImplementedError)) as info:
        function(**arguments)
    return info.value


@pytest.mark.parametrize("case", CASES)
def test_errors_are_torchs(backend: str, device: torch.device, case: str) -> None:
    given = arguments(device)
    for name, value in CASES[case](given).items():
        given[name] = value.to(device) if isinstance(value, Tensor) else value
    kept = {name: v.clone() for name, v in given.items() if isinstance(v, Tensor)}
    expected = error_of(F.batch_norm, given)
    counter = torch.tensor(7, device=device)
    for residual in (None, torch.zeros(given["input"].shape, device=device)):
        actual = error_of(
            batch_norm_relu, {**given, "residual": residual, "num_batches_tracked": counter}
        )
        assert type(actual) is type(expected)
        assert str(actual) == str(expected)
        assert counter.item() == 7
        for name, value in kept.items():
            assert_same_bits(given[name], value)


def test_evaluation_needs_running_statistics(backend: str, device: torch.device) -> None:
    x = torch.randn(4, 3, device=device)
    for stats in ((None, None), (torch.zeros(3, device=device), None)):
        given = {"input": x, "running_mean": stats[0], "running_var": stats[1]}
        assert str(error_of(batch_norm_relu, given)) == str(error_of(F.batch_norm, given))


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("input", "x", "a Tensor, got str"),
        ("input", None, "a Tensor, got NoneType"),
        ("residual", [1.0], "a Tensor or None, got list"),
        ("weight", "x", "a Tensor or None, got str"),
        ("bias", 1.0, "a Tensor or None, got float"),
        ("running_mean", (), "a Tensor or None, got tuple"),
        ("running_var", "x", "a Tensor or None, got str"),
        ("num_batches_tracked", 1, "a Tensor or None, got int"),
        ("training", "x", "a bool, got 'x'"),
        ("momentum", [], "a number or None, got []"),
        ("eps", "x", "a number, got 'x'"),
        ("eps", None, "a number, got None"),
        ("negative_slope", "x", "a number, got 'x'"),
    ],
)
def test_wrong_types(
    backend: str, device: torch.device, name: str, value: Any, expected: str, is_strided: bool
) -> None:
    given = {**arguments(device), "activation": "leaky_relu"}
    if is_strided:
        given["input"] = given["input"][..., ::2]
    given[name] = value
    with pytest.raises(TypeError) as info:
        batch_norm_relu(**given)
    assert str(info.value) == f"{name} must be {expected}"
    for untouched in ("running_mean", "running_var"):
        if name != untouched:
            assert_same_bits(given[untouched], arguments(device)[untouched])


@pytest.mark.parametrize("training", [False, True])
def test_counter_of_three(backend: str, device: torch.device, training: bool) -> None:
    counter = torch.zeros(3, dtype=torch.int64, device=device)
    given = {**arguments(device), "training": training, "num_batches_tracked": counter}
    message = r"num_batches_tracked must have one element, got shape \[3\]"
    with pytest.raises(RuntimeError, match=message):
        batch_norm_relu(**given)
    assert counter.tolist() == [0, 0, 0]
    assert_same_bits(given["running_mean"], arguments(device)["running_mean"])


@pytest.mark.parametrize("activation", ["gelu", "", "ReLU", None])
def test_unknown_activation(activation: Any) -> None:
    match = "activation must be one of identity, relu, leaky_relu, elu, silu, got"
    with pytest.raises(ValueError, match=match):
        batch_norm_relu(torch.randn(4, 3), None, None, training=True, activation=activation)
    for cls in (BatchNormReLU1d, BatchNormReLU2d, fastremedy.nn.SyncBatchNormReLU):
        with pytest.raises(ValueError, match=match):
            cls(3, activation=activation)


@pytest.mark.parametrize(
    ("ours", "torchs", "dims"),
    [
        (BatchNormReLU1d, nn.BatchNorm1d, (1, 4, 5)),
        (BatchNormReLU2d, nn.BatchNorm2d, (2, 3, 5)),
        (BatchNormReLU3d, nn.BatchNorm3d, (2, 4, 6)),
    ],
)
def test_number_of_dimensions(
    backend: str, device: torch.device, ours: Any, torchs: Any, dims: tuple[int, ...]
) -> None:
    module, expected = ours(3).to(device), torchs(3).to(device)
    for dim in dims:
        given = {"input": torch.randn([3] * dim, device=device)}
        error = error_of(module, given)
        assert isinstance(error, ValueError)
        assert str(error) == str(error_of(expected, given))
    assert module.num_batches_tracked.item() == 0


def test_one_value_leaves_the_module_alone(backend: str, device: torch.device) -> None:
    """But for the counter, which torch's module increments before the error."""
    module = BatchNormReLU1d(3).to(device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(torch.randn(1, 3, device=device))
    assert torch.equal(module.running_mean, torch.zeros(3, device=device))
    assert module.num_batches_tracked.item() == 0
    module.eval()
    module(torch.randn(1, 3, device=device))


@pytest.mark.parametrize("shape", [(4, 3, 6), (2, 4, 3, 6), (3, 5, 4)], ids=str)
def test_residual_that_does_not_fit(
    backend: str, device: torch.device, shape: tuple[int, ...]
) -> None:
    x = torch.randn(4, 3, 5, device=device)
    module = BatchNormReLU1d(3).to(device)
    with pytest.raises(RuntimeError, match="residual must have a shape that broadcasts"):
        module(x, torch.randn(shape, device=device))
    assert torch.equal(module.running_mean, torch.zeros(3, device=device))
    assert module.num_batches_tracked.item() == 0


def test_channels_do_not_match(backend: str, device: torch.device) -> None:
    module, expected = BatchNormReLU2d(4).to(device), nn.BatchNorm2d(4).to(device)
    given = {"input": torch.randn(2, 3, 5, 5, device=device)}
    assert str(error_of(module, given)) == str(error_of(expected, given))
    assert torch.equal(module.running_mean, torch.zeros(4, device=device))


def test_no_channels(backend: str, device: torch.device) -> None:
    x = torch.randn(2, 0, 3, device=device)
    output = batch_norm_relu(x, None, None, training=True)
    assert output.shape == (2, 0, 3)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_input(backend: str, device: torch.device, layout: torch.layout) -> None:
    x = torch.randn(4, 3, device=device).to_sparse(layout=layout)
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch_norm_relu(x, None, None, training=True)


class _Subclass(Tensor):
    pass


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input", lambda x: x[:, :, ::2]),
        ("input", lambda x: x.transpose(2, 3)),
        ("input", lambda x: x.long()),
        ("input", lambda x: x.as_subclass(_Subclass)),
        ("input", lambda x: x[:1, :, :1, :1]),
        ("input", torch._neg_view),
        ("residual", lambda x: x[:1]),
        ("residual", lambda x: x.double()),
        ("residual", lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)),
        ("residual", torch._neg_view),
        ("weight", lambda x: x[:-1]),
        ("weight", lambda x: x.repeat_interleave(2)[::2]),
        ("weight", lambda x: x.long()),
        ("bias", lambda x: x[None]),
        ("bias", lambda x: x.to("meta")),
        ("running_mean", torch._neg_view),
        ("running_mean", lambda _: None),
        ("running_var", lambda x: x.as_subclass(_Subclass)),
        ("num_batches_tracked", lambda x: x.int()),
        ("num_batches_tracked", lambda x: x.repeat(2)),
    ],
)
def test_native_look(
    name: str, change: Callable[[Tensor], Tensor | None], channels_last: bool
) -> None:
    native = _native.library()
    if native is None:
        pytest.skip(str(_native.error))
    x = torch.randn(2, 6, 4, 4)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tensors: dict[str, Tensor | None] = {
        "input": x,
        "residual": x.clone(),
        "weight": torch.nn.Parameter(torch.ones(6)),
        "bias": torch.zeros(6, dtype=torch.bfloat16),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
        "num_batches_tracked": torch.tensor(0),
    }

    def takes() -> bool:
        options = (True, 0.1, 1e-5, 1, 0.0, False, False, None)
        return native.batch_norm_relu_run_forward(*tensors.values(), *options) is not None

    assert takes()
    tensor = tensors[name]
    assert tensor is not None
    tensors[name] = change(tensor)
    assert not takes()
    if name != "num_batches_tracked":
        assert tensors["num_batches_tracked"] == 1
