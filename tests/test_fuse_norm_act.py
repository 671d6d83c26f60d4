"""timm's BatchNorm with an activation inside: fused with it, and what it was afterwards."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastremedy.nn import BatchNormReLU2d, SyncBatchNormReLU, fuse_, unfuse_
from fastremedy.stats import Monitor

from .test_fuse import assert_alike, counts_calls

MODULE = "timm.layers.norm_act"


class BatchNormAct2d(nn.BatchNorm2d):
    """What timm's class of that name does."""

    def __init__(self, num_features: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.drop = nn.Identity() if drop is None else drop
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


@pytest.fixture(autouse=True)
def _timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the class be found where timm's is."""
    for name in ("timm", "timm.layers", MODULE):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[MODULE])["BatchNormAct2d"] = BatchNormAct2d
    monkeypatch.setattr(BatchNormAct2d, "__module__", MODULE)


def model(act: nn.Module | None = None, drop: nn.Module | None = None) -> Any:
    norm = BatchNormAct2d(4, nn.ReLU(inplace=True) if act is None else act, drop)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), norm).double()


ACTIVATIONS = {"relu": nn.ReLU(), "silu": nn.SiLU(), "leaky_relu": nn.LeakyReLU(0.2)}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fused_and_restored(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = model(ACTIVATIONS[name])
    fused = copy.deepcopy(stock)
    report = fuse_(fused)
    assert (report.fused, report.left) == ([("1", f"bn + {name}")], [])
    assert isinstance(fused[1], BatchNormAct2d)
    assert list(fused.state_dict()) == list(stock.state_dict())
    calls = counts_calls(monkeypatch)
    assert_alike(fused, stock)
    assert calls == ["plain"] * 3
    assert fuse_(fused).fused == report.fused
    unfuse_(fused)
    assert type(fused[1]) is BatchNormAct2d
    assert vars(fused[1]).keys() == vars(stock[1]).keys()
    assert_alike(fused, stock)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_fused(duplicate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = model()
    stock = copy.deepcopy(fused)
    fuse_(fused)
    other = duplicate(fused)
    assert type(other[1]) is type(fused[1])
    calls = counts_calls(monkeypatch)
    assert_alike(other, stock)
    assert calls == ["plain"] * 3
    assert type(unfuse_(other)[1]) is BatchNormAct2d


def exchange_activation(norm: Any) -> None:
    norm.act = nn.Tanh()


def fill_drop(norm: Any) -> None:
    norm.drop = nn.Hardtanh()


def add_hook(norm: Any) -> None:
    norm.act.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [exchange_activation, fill_drop, add_hook])
def test_changed_later_runs_unfused(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = model()
    stock = copy.deepcopy(fused)
    fuse_(fused)
    for m in (fused, stock):
        change(m[1])
    calls = counts_calls(monkeypatch)
    assert_alike(fused, stock)
    assert calls == []


def test_left_alone() -> None:
    for stock, reason in (
        (model(nn.Hardswish()), "followed by Hardswish"),
        (model(nn.Identity()), "followed by nothing"),
        (model(drop=nn.Dropout()), "followed by Dropout"),
    ):
        assert fuse_(stock).left == [("1", reason)]
        assert type(stock[1]) is BatchNormAct2d


def test_conversion_keeps_the_activation() -> None:
    for stock in (model(nn.LeakyReLU(0.3)), model(nn.Identity())):
        fused = copy.deepcopy(stock)
        fuse_(fused)
        for converted in map(
            SyncBatchNormReLU.convert_sync_batchnorm, (copy.deepcopy(stock), fused)
        ):
            assert isinstance(converted, nn.Sequential)
            assert type(converted[1]) is SyncBatchNormReLU
            assert_alike(converted, copy.deepcopy(stock))
    with pytest.raises(ValueError, match=r"got BatchNormAct2d followed by Hardswish: convert the"):
        SyncBatchNormReLU.convert_sync_batchnorm(model(nn.Hardswish()))


def test_monitor_shows_it_as_one_layer() -> None:
    fused = model().float()
    fuse_(fused)
    with Monitor(fused, full_every=1) as monitor:
        fused(torch.randn(2, 3, 8, 8)).sum().backward()
        monitor.step()
    activations = monitor.report().parts["activations"]
    row = activations.names.index("1")
    assert activations.overall["count"][row] == 2 * 4 * 6 * 6
    assert isinstance(fused[1], BatchNormReLU2d)
