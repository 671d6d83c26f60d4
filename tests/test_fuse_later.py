"""A fused model over its life: what changes after fuse_, and what other tools do with it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastremedy.nn.batch_norm_relu import BatchNormReLU2d, SyncBatchNormReLU
from fastremedy.nn.fuse import fuse_, unfuse_

from . import fuse_models as models
from .test_fuse import assert_alike, counts_calls, images, run


@pytest.fixture
def fused() -> models.BasicBlock:
    block = models.BasicBlock(3, 3, 1, None).double()
    assert len(fuse_(block).fused) == 2
    return block


@pytest.fixture
def stock(fused: nn.Module) -> nn.Module:
    return unfuse_(copy.deepcopy(fused))


def add_hook_to_norm(block: Any) -> None:
    block.bn2.register_forward_hook(lambda module, args, output: output * 2)


def add_hook_to_activation(block: Any) -> None:
    block.relu.register_forward_hook(lambda module, args, output: output * 2)


def exchange_activation(block: Any) -> None:
    block.relu = nn.Tanh()


def exchange_norm(block: Any) -> None:
    torch.manual_seed(0)
    block.bn2 = nn.GroupNorm(1, 3).double()


def add_downsample(block: Any) -> None:
    torch.manual_seed(0)
    block.downsample = models.conv1x1(3, 3).double()


def unfuse_norm(block: Any) -> None:
    unfuse_(block.bn2)


def synchronize(block: Any) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(block)


@pytest.mark.parametrize(
    "change",
    [
        add_hook_to_norm,
        add_hook_to_activation,
        exchange_activation,
        exchange_norm,
        add_downsample,
        unfuse_norm,
        synchronize,
    ],
)
def test_changed_model_runs_unfused(
    change: Callable[[nn.Module], None],
    fused: nn.Module,
    stock: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    change(fused)
    change(stock)
    calls = counts_calls(monkeypatch)
    assert_alike(fused, stock)
    assert calls == []
    fuse_(fused)  # takes the model as it is now
    assert_alike(fused, stock)


def fill_a_place(block: Any) -> None:
    block.drop_block = nn.Hardtanh()


def add_hook_to_identity(block: Any) -> None:
    block.drop_path.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [fill_a_place, add_hook_to_identity])
def test_changed_identity_runs_unfused(
    change: Callable[[nn.Module], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = models.BasicBlockWithIdentities(3, 3, 1, None).double()
    block = copy.deepcopy(stock)
    assert fuse_(block).left == []
    change(block)
    change(stock)
    calls = counts_calls(monkeypatch)
    assert_alike(block, stock)
    assert calls == []


def test_conversion_by_us_runs_unfused(fused: nn.Module, stock: nn.Module) -> None:
    SyncBatchNormReLU.convert_sync_batchnorm(fused)
    assert_alike(fused, stock)


def test_fuse_after_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = models.BasicBlock(3, 3, 1, None).double()
    block = SyncBatchNormReLU.convert_sync_batchnorm(copy.deepcopy(stock))
    report = fuse_(block)
    assert report.left == []
    calls = counts_calls(monkeypatch)
    assert_alike(block, stock)
    assert calls == ["plain", "with residual"] * 3
    unfuse_(block)
    assert type(block.bn1) is SyncBatchNormReLU
    assert block.bn1.activation == "identity"
    assert_alike(block, stock)


def test_norm_by_itself_stays_a_batch_norm(fused: Any, stock: Any) -> None:
    assert isinstance(fused.bn1, BatchNormReLU2d)
    assert fused.bn1.activation == "relu"
    torch.testing.assert_close(fused.bn1(images()), stock.bn1(images()), rtol=0, atol=0)
    layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()).double()
    expected = copy.deepcopy(layers)
    fuse_(layers)
    assert_alike(layers[:2], expected[:2])


def test_hyper_parameters_stay_live(
    fused: Any, stock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counts_calls(monkeypatch)
    for block in (fused, stock):
        block.bn1.momentum, block.bn2.eps = 0.5, 0.3
        block.bn2.weight.requires_grad_(False)
        block.conv1 = nn.Identity()
    x = images()
    torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())
    fused.bn1.eval()  # frozen statistics
    stock.bn1.eval()
    torch.testing.assert_close(fused(x), stock(x))
    torch.testing.assert_close(fused.state_dict(), stock.state_dict())
    assert len(calls) == 4


def test_changed_attribute_runs_unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = models.DenseLayer(3).double()
    assert len(fuse_(layer).fused) == 2
    calls = counts_calls(monkeypatch)
    layer(images())
    layer(input=images())
    assert len(calls) == 4
    layer.drop_rate = 1.0
    assert not layer(images()).any()
    assert len(calls) == 4


def test_list_of_tensors_runs_unfused() -> None:
    layer = models.DenseLayer(6).double()
    expected = copy.deepcopy(layer)
    fuse_(layer)
    x = images()
    torch.testing.assert_close(layer([x, x]), expected([x, x]))


class Taps(nn.Module):
    """Calls the modules of a Sequential one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x.clone())
        return torch.cat(outputs)


def test_other_callers_of_a_sequential_see_every_output() -> None:
    model = Taps().double()
    expected = copy.deepcopy(model)
    assert len(fuse_(model).fused) == 2
    assert_alike(model, expected)


class Untraceable(Taps):
    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x if x.dim() == 4 else x[None])


def test_inside_an_untraceable_forward() -> None:
    model = Untraceable().double()
    expected = copy.deepcopy(model)
    assert len(fuse_(model).fused) == 2
    assert_alike(model, expected)


class Chain(nn.Module):
    """What one fusion gives is the residual of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.norms:
            x = self.act(norm(x * 2) + x)
        return x


def test_chain_of_residuals() -> None:
    model = Chain().double()
    expected = copy.deepcopy(model)
    assert [what for _, what in fuse_(model).fused] == ["bn + residual + relu"] * 4
    assert_alike(model, expected)
    for m in (model, expected):
        del m.norms[3]
    assert_alike(model, expected)


def test_shared_block_and_shared_norm() -> None:
    block = models.BasicBlock(3, 3, 1, None)
    other = nn.Sequential(block.bn1, nn.ReLU())
    model = nn.Sequential(block, other, block).double()
    expected = copy.deepcopy(model)
    assert [name for name, _ in fuse_(model).fused] == ["0.bn1", "0.bn2"]
    assert_alike(model, expected)
    assert model[1][0] is model[0].bn1
    conflict = nn.Sequential(other, nn.Sequential(block.bn1, nn.SiLU())).double()
    unfuse_(model)
    expected = copy.deepcopy(conflict)
    fuse_(conflict)
    assert_alike(conflict, expected)


@pytest.mark.parametrize("changed", ["conv1", "conv2"])
def test_a_module_with_two_names_that_loses_one(changed: str) -> None:
    """The trace names it ``conv1`` wherever it is called."""
    block = models.BasicBlock(3, 3, 1, None).double()
    block.conv2 = block.conv1
    expected = copy.deepcopy(block)
    assert len(fuse_(block).fused) == 2
    assert_alike(block, expected)
    for model in (block, expected):
        setattr(model, changed, nn.Identity())
    assert_alike(block, expected)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm1d(3, affine=False), (5, 3, 4)),
        (nn.BatchNorm2d(3, track_running_stats=False), (2, 3, 4, 4)),
        (nn.BatchNorm3d(3, momentum=None), (2, 3, 4, 4, 4)),
        (nn.SyncBatchNorm(3), (2, 3, 4, 4)),
    ],
    ids=lambda value: str(value),
)
def test_every_batch_norm(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(norm, nn.LeakyReLU(0.3)).double()
    expected = copy.deepcopy(model)
    assert fuse_(model).left == []
    assert_alike(model, expected, torch.randn(shape, dtype=torch.float64))


class Decorated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


def test_forwards_that_others_have_wrapped_are_left_alone() -> None:
    assert fuse_(Decorated()).left == [("bn", "forward of Decorated: it is decorated")]
    block = models.BasicBlock(3, 3, 1, None)
    forward = block.forward
    block.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]
    mine = block.forward
    reason = "forward of BasicBlock: it is an attribute of the instance"
    assert fuse_(block).left == [("bn1", reason), ("bn2", reason)]
    assert unfuse_(block).forward is mine


# --- other tools ---


def test_signature(fused: nn.Module, stock: nn.Module) -> None:
    assert inspect.signature(fused.forward) == inspect.signature(stock.forward)


def test_functional_call(fused: nn.Module, stock: nn.Module) -> None:
    parameters = {name: p * 2 for name, p in stock.named_parameters()}
    actual, expected = (torch.func.functional_call(m, parameters, images()) for m in (fused, stock))
    torch.testing.assert_close(actual, expected)


def test_export(fused: nn.Module, stock: nn.Module) -> None:
    exported = torch.export.export(fused.eval(), (images(),), strict=False)
    torch.testing.assert_close(exported.module()(images()), stock.eval()(images()))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_before_and_after(process_group: None) -> None:
    stock = models.ResNet(models.BasicBlock).double()
    fused_before, fused_after = copy.deepcopy(stock), copy.deepcopy(stock)
    fuse_(fused_before)
    model, other = map(nn.parallel.DistributedDataParallel, (fused_before, fused_after))
    assert fuse_(other).fused[0] == ("module.bn1", "bn + relu")
    expected = run(stock, images())
    for parallel in (model, other):
        actual = run(parallel, images())
        for name, value in expected.items():
            key = name if name in ("output", "x.grad") else f"module.{name}"
            torch.testing.assert_close(actual[key], value)


class _Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_parametrized_after_fusing(fused: Any, stock: Any) -> None:
    parametrize = nn.utils.parametrize
    for block in (fused, stock):
        parametrize.register_parametrization(block.bn1, "weight", _Exponential())
    for change in (lambda block: block, unfuse_, fuse_):
        change(fused)
        assert_alike(fused, stock)
    for block in (fused, stock):
        parametrize.remove_parametrizations(block.bn1, "weight")
    assert_alike(fused, stock)
    assert type(unfuse_(fused).get_submodule("bn1")) is nn.BatchNorm2d
