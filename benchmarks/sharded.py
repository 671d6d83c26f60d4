"""Host time of clip + step under FSDP2, ours beside stock, for tensors too small to count.

Run as ``torchrun --nproc-per-node 2 benchmarks/sharded.py``: on GPUs if there are any, otherwise
on the CPU. Not collected by pytest, which runs one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastremedy

MAX_NORM = 1e-3  # always clips


class SumOfSquares(nn.Module):
    """Parameters of 64 elements."""

    def __init__(self, count: int, device: torch.device) -> None:
        """Draw them."""
        super().__init__()
        for i in range(count):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(8, 8, device=device)))

    def forward(self) -> Tensor:
        """Add up all squares."""
        return torch.stack([param.square().sum() for param in self.parameters()]).sum()


def make_params(count: int, device: torch.device) -> list[nn.Parameter]:
    """Return parameters that ``fully_shard`` distributes, with the gradients that it leaves."""
    model = SumOfSquares(count, device)
    fully_shard(model, mesh=init_device_mesh(device.type, (dist.get_world_size(),)))
    model().backward()
    return list(model.parameters())


def candidates(count: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Return what is measured, by name."""
    params = make_params(count, device)
    stock = torch.optim.AdamW(params, fused=True)
    ours, clipping = fastremedy.optim.AdamW(params), fastremedy.optim.AdamW(params)
    clipping.max_grad_norm = MAX_NORM

    def by_stock() -> None:
        nn.utils.clip_grad_norm_(params, MAX_NORM)
        stock.step()

    def by_ours() -> None:
        fastremedy.clip_(params, MAX_NORM)
        ours.step()

    return {
        "stock: clip_grad_norm_, AdamW": by_stock,
        "fastremedy: clip_, AdamW": by_ours,
        "fastremedy: AdamW(max_grad_norm)": clipping.step,
    }


def measure(call: Callable[[], object], rounds: int) -> float:
    """Return the median milliseconds that the host takes, this rank's."""
    times = []
    for _ in range(rounds + 2):  # two to warm up
        dist.barrier()
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def main() -> None:
    """Print the times on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    for name, call in candidates(options.params, device).items():
        ms = measure(call, options.rounds)
        if dist.get_rank() == 0:
            print(f"{name:34}{ms:9.2f} ms", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
