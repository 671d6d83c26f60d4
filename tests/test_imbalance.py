"""``python -m fastremedy imbalance`` trains on what it says and reports what it measured."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastremedy import __main__ as command_line
from fastremedy import backends, demo, imbalance

pytest.importorskip("sklearn", reason="the example's packages are not installed")
PNG = b"\x89PNG\r\n\x1a\n"
CPU = torch.device("cpu")


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    build = demo.network
    monkeypatch.setattr(
        imbalance, "network", lambda depth, num_classes: build(1, 4, num_classes=num_classes)
    )


def run_example(tmp_path: Path, *arguments: str) -> int:
    out = str(tmp_path / "made" / "imbalance.png")
    options = ["--epochs", "2", "--seeds", "2", "--device", "cpu", "--out", out]
    return command_line.main(["imbalance", *options, *arguments])


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_prints_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_network: None, backend: str
) -> None:
    if backends.available()[backend] is not None:
        pytest.skip(str(backends.available()[backend]))
    assert run_example(tmp_path, "--backend", backend) == 0
    out = capsys.readouterr().out
    assert f"backend {backend}" in out
    for loss in imbalance.LOSSES:
        assert re.search(rf"│ {loss.name} +│ .*\d ± ", out)
    for heading in ("recall", "precision", "accuracy", "average"):
        assert heading in out
    assert "last_stats of cross entropy: 13 of 1317 training images show digit 8" in out
    assert str(tmp_path / "made" / "imbalance.png") in out
    assert (tmp_path / "made" / "imbalance.png").read_bytes().startswith(PNG)


def test_terminal_without_unicode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_network: None
) -> None:
    memory = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(memory, "ascii", write_through=True))
    assert run_example(tmp_path, "--epochs", "1") == 0
    assert b" +- " in memory.getvalue()


def test_one_epoch_of_one_seed_of_another_digit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], small_network: None
) -> None:
    assert run_example(tmp_path, "--epochs", "1", "--seeds", "1", "--digit", "3") == 0
    assert "show digit 3" in capsys.readouterr().out
    assert (tmp_path / "made" / "imbalance.png").exists()


@pytest.mark.parametrize("digit", range(10))
def test_training_set_is_one_to_a_hundred(digit: int) -> None:
    data = demo.load_digits(CPU)
    made = imbalance.make_rare(data, digit, seed=0)
    num_others, num_rare = made.train_labels.bincount().tolist()
    assert num_others == int((data.train_labels != digit).sum())
    assert num_rare == round(num_others / 100)
    assert torch.equal(made.test_images, data.test_images)
    assert torch.equal(made.test_labels == 1, data.test_labels == digit)
    of_digit = {image.numpy().tobytes() for image in data.train_images[data.train_labels == digit]}
    kept = {image.numpy().tobytes() for image in made.train_images[made.train_labels == 1]}
    assert kept < of_digit
    assert len(kept) == num_rare


def test_seed_chooses_the_rare_images() -> None:
    data = demo.load_digits(CPU)
    first, again, other = (imbalance.make_rare(data, 8, seed).train_images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_same_again_and_another_for_another_seed(small_network: None) -> None:
    data = demo.load_digits(CPU)
    first, again = (imbalance.train_all(data, 8, epochs=1, seeds=2) for _ in range(2))
    assert first == again
    for of_loss in first.values():
        assert of_loss[0].p_t != of_loss[1].p_t


def test_losses_start_from_the_same_network(
    monkeypatch: pytest.MonkeyPatch, small_network: None
) -> None:
    fuse, weights = imbalance.fuse_, []

    def note(model: nn.Module) -> object:
        weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
        return fuse(model)

    monkeypatch.setattr(imbalance, "fuse_", note)
    imbalance.train_all(demo.load_digits(CPU), 8, epochs=1, seeds=1)
    assert len(weights) == len(imbalance.LOSSES)
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_plain_loss_is_cross_entropy() -> None:
    logits, labels = (
        torch.randn(50, 2, generator=torch.Generator().manual_seed(0)),
        torch.arange(50),
    )
    loss_function = imbalance.LOSSES[0].build(torch.tensor([1304, 13]))
    expected = nn.functional.cross_entropy(logits, labels % 2)
    torch.testing.assert_close(loss_function(logits, labels % 2), expected)


def test_measures() -> None:
    class Fixed(nn.Module):
        def forward(self, probability: torch.Tensor) -> torch.Tensor:
            return torch.stack([1 - probability, probability], 1).log()

    labels = torch.tensor([1, 1, 1, 0, 0, 0])
    training = imbalance.Training()
    data = demo.Data(labels, labels, torch.tensor([0.9, 0.4, 0.1, 0.8, 0.2, 0.3]), labels)
    training.test(Fixed(), data)
    assert training.recall == pytest.approx([1 / 3])
    assert training.precision == pytest.approx(1 / 2)
    assert training.accuracy == pytest.approx(3 / 6)
    assert training.average_precision == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
    data.test_images = torch.full((6,), 0.3)
    training.test(Fixed(), data)
    assert training.recall[1] == 0
    assert training.precision is None


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([0.5, None, 0.7], "60.0 ± 14.1"),
        ([1.0, 1.0], "100.0 ± 0.0"),
        ([0.035], "3.5"),
        ([None], "none found"),
    ],
    ids=str,
)
def test_spread(values: list[float | None], text: str) -> None:
    assert imbalance.spread(values) == text


@pytest.mark.parametrize(
    ("option", "value"), [("--epochs", "0"), ("--seeds", "-1"), ("--digit", "10")]
)
def test_option_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    with pytest.raises(SystemExit) as error:
        run_example(tmp_path, option, value)
    assert error.value.code == 2
    assert option in capsys.readouterr().err


def test_unavailable_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if backends.available()["cuda"] is None:
        pytest.skip("the cuda backend is available")
    assert run_example(tmp_path, "--backend", "cuda") == 2
    assert "backend 'cuda' is not available" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["sklearn", "matplotlib.figure", "rich"])
def test_missing_extra(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    small_network: None,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert run_example(tmp_path, "--epochs", "1", "--seeds", "1") == 2
    assert "pip install 'fastremedy[demo]'" in capsys.readouterr().err
