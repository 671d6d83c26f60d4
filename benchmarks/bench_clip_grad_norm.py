"""``clip_`` against ``torch.nn.utils.clip_grad_norm_``, where it clips and where it need not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastremedy import bench


@pytest.mark.parametrize(("device", "case"), bench.cases_on_devices(), ids=str)
def bench_clip_that_scales(
    device: torch.device, case: bench.Case, compare: Callable[..., None]
) -> None:
    params = case.params(device)
    compare(
        "clip_grad_norm",
        case,
        bench.clip_candidates(params, clips=True),
        device,
        prepare=bench.refill(params),
        note="clips",
        bytes_per_element=3 * case.dtype.itemsize,  # read, read again and written
    )


@pytest.mark.parametrize(("device", "case"), bench.cases_on_devices(), ids=str)
def bench_clip_within_the_limit(
    device: torch.device, case: bench.Case, compare: Callable[..., None]
) -> None:
    candidates = bench.clip_candidates(case.params(device), clips=False)
    compare(
        "clip_grad_norm",
        case,
        candidates,
        device,
        note="within the limit",
        bytes_per_element=case.dtype.itemsize,
    )
