"""BatchNorm with activation in Triton, on a GPU or interpreted: tiles, splits and phases."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from .triton_batch_norm_layer import DEVICE, LAYOUTS, Layer, check, lay_out, randn

pytest.importorskip("triton")

from fastremedy.triton_kernels import batch_norm_relu

from fastremedy.ops.batch_norm_relu import FINISH, REDUCE

from .reference import FLOATS, assert_same_bits

# --- tiles and splits ---


@pytest.mark.parametrize("spatial", [1, 7, 8, 63, 65, 511, 513, 1025])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_contiguous_edges(dtype: torch.dtype, spatial: int) -> None:
    shape = (3, 2, spatial)
    check(Layer(2, dtype, False), randn(shape, dtype, False), randn(shape, dtype, False), True)


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 63, 64, 65, 129])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_channels_last_edges(dtype: torch.dtype, channels: int) -> None:
    shape = (3, channels, 5, 3)
    check(Layer(channels, dtype, True), randn(shape, dtype, True), randn(shape, dtype, True), True)


@LAYOUTS
@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("num_programs", [1, 3, 1000])
def test_tiles_are_split_among_programs(
    num_programs: int, extra: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm_relu, "SUM_PROGRAMS", num_programs)
    monkeypatch.setattr(batch_norm_relu, "WRITE_PROGRAMS", num_programs)
    shape = (4 * 128 + extra, 8, 1) if channels_last else (1, 1, 4 * 1024 + extra)
    input = randn(shape, torch.float32, channels_last)
    launch = batch_norm_relu.plan(
        *shape, channels_last, input.dtype, aligned=True, num_programs=num_programs
    )
    assert launch.grid[1] == min(num_programs, 4 + (extra > 0)) or num_programs == 3
    check(Layer(shape[1], input.dtype, channels_last), input, None, False)


@pytest.mark.parametrize(
    "shape",
    [
        *[(1, 1, 1), (0, 3, 5), (2, 3, 0), (32, 64, 56 * 56), (256, 2048, 49)],
        *[(7, 65, 10_000), (1, 1, 2**33), (2, 3, 2**31 + 1), (1, 2**22, 1), (2**20, 4096, 1)],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@LAYOUTS
def test_a_plan_covers_every_element(
    channels_last: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    batch, channels, spatial = shape
    rows, row_size = (batch * spatial, channels) if channels_last else (batch, spatial)
    for num_programs in (1, 1024, 4096):
        launch = batch_norm_relu.plan(*shape, channels_last, dtype, True, num_programs)
        constants = launch.constants
        tiles = math.ceil(rows / constants["ROWS"])
        if channels_last:
            assert launch.grid[0] * constants["COLS"] >= channels
        else:
            assert launch.grid[0] == channels
            tiles *= math.ceil(row_size / constants["COLS"])
        assert launch.grid[1] * launch.tiles_per_split >= tiles
        assert (launch.grid[1] - 1) * launch.tiles_per_split < max(tiles, 1)
        assert launch.grid[1] <= 65535
        assert constants["ROWS"] * constants["COLS"] * dtype.itemsize == batch_norm_relu.TILE_BYTES
        assert constants["COLS"] % 8 == 0
        assert row_size % constants["VEC"] == 0


@LAYOUTS
def test_results_are_the_same_bits_every_time(
    channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm_relu, "SUM_PROGRAMS", 7)
    shape = (300, 8, 3, 3) if channels_last else (60, 2, 300)
    input, grad = (randn(shape, torch.float32, channels_last) for _ in range(2))
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        layer = Layer(shape[1], torch.float32, channels_last)
        outputs = layer.forward(input)
        results.append([*outputs, *layer.backward(grad, input), layer.saved, layer.running_var])
    for first, second in zip(*results, strict=True):
        assert_same_bits(first, second)


@LAYOUTS
def test_misaligned_views_are_written_inside_only(channels_last: bool) -> None:
    input, grad = (randn((5, 8, 6), torch.float32, channels_last) for _ in range(2))
    buffers = []

    def misaligned(values: Tensor) -> Tensor:
        buffers.append(torch.full((input.numel() + 9,), 7.0, device=DEVICE))
        return buffers[-1].as_strided(input.shape, input.stride(), 1).copy_(values)

    aligned, layer = (Layer(8, torch.float32, channels_last, values=None) for _ in range(2))
    views = [misaligned(tensor) for tensor in (input, grad, torch.zeros_like(input))]
    assert not any(batch_norm_relu._is_aligned(view) for view in views)
    output, _, _ = aligned.forward(input)
    layer.forward(views[0], output=views[2])
    assert_same_bits(views[2], output)
    grads = layer.backward(views[1], views[0], targets=[views[2], None, None, None])
    assert_same_bits(grads[0], aligned.backward(grad, input)[0])
    for buffer in buffers:
        assert (buffer[[0, *range(-8, 0)]] == 7).all()


# --- phases ---


@LAYOUTS
@pytest.mark.parametrize("sizes", [(3, 4), (5, 0, 2)], ids=["two", "one_empty"])
def test_ranks_together_are_one_pass(sizes: tuple[int, ...], channels_last: bool) -> None:
    input, residual, grad = (randn((7, 8, 5, 3), torch.float32, channels_last) for _ in range(3))
    torch.manual_seed(1)
    whole = Layer(8, torch.float32, channels_last)
    output, mask, _ = whole.forward(input + 3, residual)
    grads = whole.backward(grad, input + 3, None, mask)

    def parts(tensor: Tensor) -> Iterator[Tensor]:
        return (lay_out(part, channels_last) for part in tensor.split(sizes))

    ranks = []
    for part in parts(input + 3):
        torch.manual_seed(1)
        sums = torch.full((17,), math.nan, dtype=torch.float64, device=DEVICE)
        layer = Layer(8, torch.float32, channels_last, sums=sums)
        layer.forward(part, phase=REDUCE)
        assert layer.saved.isnan().all()
        assert layer.num_batches_tracked == 0
        ranks.append(layer)
    total = torch.stack([layer.sums for layer in ranks]).sum(0)
    x = (input + 3).double().movedim(1, 0).flatten(1)
    expected = [x.sum(1), x.square().sum(1), x.new_tensor([x.shape[1]])]
    torch.testing.assert_close(total, torch.cat(expected), rtol=1e-6, atol=1e-6)

    outputs, masks = [], []
    for layer, part, rest in zip(ranks, parts(input + 3), parts(residual), strict=True):
        layer.sums = total.clone()
        part_output, part_mask, _ = layer.forward(part, rest, FINISH)
        outputs.append(part_output)
        masks.append(part_mask)
        for name in ("saved", "running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(
                getattr(layer, name), getattr(whole, name), atol=1e-6, rtol=1e-6
            )
    torch.testing.assert_close(torch.cat(outputs), output, atol=2e-6, rtol=2e-6)
    assert torch.equal(torch.cat(masks), mask)

    weight_grads = []
    for layer, part, part_grad, part_mask in zip(
        ranks, parts(input + 3), parts(grad), masks, strict=True
    ):
        weight_grads.append(layer.backward(part_grad, part, None, part_mask, REDUCE)[2:])
    total = torch.stack([layer.sums for layer in ranks]).sum(0)
    for i in range(2):
        sum_of_ranks = torch.stack([pair[i] for pair in weight_grads]).sum(0)
        torch.testing.assert_close(sum_of_ranks, grads[2 + i], atol=1e-5, rtol=1e-5)
    input_grads = []
    for layer, part, part_grad, part_mask in zip(
        ranks, parts(input + 3), parts(grad), masks, strict=True
    ):
        layer.sums = total.clone()
        results = layer.backward(part_grad, part, None, part_mask, FINISH)
        assert results[2].isnan().all()
        assert results[3].isnan().all()
        input_grads.append(results[0])
    torch.testing.assert_close(torch.cat(input_grads), grads[0], atol=1e-6, rtol=1e-5)


def test_ranks_without_any_element_keep_their_running_statistics() -> None:
    layer = Layer(5, torch.float32, False, sums=torch.zeros(11, dtype=torch.float64, device=DEVICE))
    before = layer.running_mean.clone(), layer.running_var.clone()
    layer.forward(torch.empty(0, 5, 4, device=DEVICE), phase=FINISH)
    assert torch.equal(layer.running_mean, before[0])
    assert torch.equal(layer.running_var, before[1])
    assert layer.num_batches_tracked == 1
