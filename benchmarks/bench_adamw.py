"""Clip + AdamW step against ``clip_grad_norm_`` + ``torch.optim.AdamW``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastremedy import bench

# Parameter and both moments are read and written, the gradient is read twice.
ACCESSES = 8


@pytest.mark.parametrize(("device", "case"), bench.cases_on_devices(), ids=str)
def bench_step(device: torch.device, case: bench.Case, compare: Callable[..., None]) -> None:
    candidates = bench.adamw_candidates(case.params(device), case)
    if device.type == "cuda":
        candidates |= bench.graphed_candidates(candidates)
    num_bytes = ACCESSES * case.dtype.itemsize
    in_a_row = case.in_a_row
    compare("adamw", case, candidates, device, bytes_per_element=num_bytes, in_a_row=in_a_row)


def bench_step_with_cold_caches(device: torch.device, compare: Callable[..., None]) -> None:
    case = bench.COLD_CASE
    candidates = bench.adamw_candidates(case.params(device), case)
    compare("adamw", case, candidates, device, note="the others step in between")


def bench_step_after_backward(device: torch.device, compare: Callable[..., None]) -> None:
    case = bench.BACKWARD_CASE
    params = case.params(device)
    candidates = bench.adamw_candidates(params, case)
    prepare = bench.backward(params)
    compare("adamw", case, candidates, device, prepare=prepare, note="gradients new every step")


def bench_step_with_many_groups(device: torch.device, compare: Callable[..., None]) -> None:
    case = bench.GROUPED_CASE
    candidates = bench.grouped_candidates(case.params(device), case)
    compare("adamw", case, candidates, device, note="465 groups of 2 tensors")


@pytest.mark.parametrize("case", bench.OFFLOADED_CASES, ids=bench.offloaded_name)
def bench_offloaded_step(case: bench.Case, compare: Callable[..., None]) -> None:
    cpu = torch.device("cpu")
    params = case.params(cpu)
    prepare = bench.arrival(params)
    candidates = bench.adamw_candidates(params, case)
    note = "CPU offload: gradients arrive before every step"
    compare("adamw", case, candidates, cpu, prepare=prepare, note=note)


@pytest.mark.filterwarnings("ignore")  # torch.compile has deprecation warnings of its own
def bench_step_against_compiled(device: torch.device, compare: Callable[..., None]) -> None:
    case = bench.COMPILED_CASE
    candidates = bench.compiled_candidates(case.params(device), case)
    compare("adamw", case, candidates, device, note="against torch.compile")
