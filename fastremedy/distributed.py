"""Train the demo's network on several processes and compare the loss curves with one process.

Started by ``torchrun --nproc-per-node 2 -m fastremedy distributed``, on the GPUs of the machine if
there are any (NCCL), otherwise on its CPU (gloo). Every process trains the network alone on whole
batches; then all of them together on shares of the same batches, under DistributedDataParallel and
under FSDP2 (``fully_shard``), which keeps parameters, gradients and moments in shards.

Normalisation over all ranks, the norm over all shards and the mean of gradients add the same
numbers in another order, so that the curves differ by rounding. A network with ReLU magnifies that
from step to step, in float32 to 4e-4 within 44 steps; hence everything is float64 here. There 44
steps on two or four ranks left at most 9e-16, under DDP and FSDP2 alike. A clip coefficient in
float32 would make 4e-9 of it, clipping by the norm of one rank's shards alone 2e-3.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends, demo
from .demo import BATCH_SIZE, LEARNING_RATE, MAX_GRAD_NORM, SEED, Run, our_run
from .nn import SyncBatchNormReLU, fuse_
from .optim import AdamW

TOLERANCE = 1e-12  # of losses around 1
COMMAND = "torchrun --nproc-per-node 2 -m fastremedy distributed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m fastremedy distributed``."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    parser.add_argument("--epochs", type=demo.positive, default=2, help="passes over the data (2)")
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"({devices[0]})")
    parser.add_argument("--backend", choices=backends.NAMES, help="(the fastest that can run)")


def run(options: argparse.Namespace) -> int:
    """Train and print the comparison; 1 if the curves differ by more than rounding."""
    if not dist.is_torchelastic_launched():
        print(f"one process has nobody to talk to: {COMMAND}", file=sys.stderr)
        return 2
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        return demo.run_example(options, "adamw", compare)
    finally:
        dist.destroy_process_group()
        # While Python shuts down, a thread of gloo that is still there may abort the process
        # (pytorch#179291). Threads end with the group, and models in cycles hold it.
        gc.collect()


def compare(options: argparse.Namespace, device: torch.device, backend: str) -> int:
    """Run the example on one rank."""
    alone, shared = train(options.epochs, device)
    if dist.get_rank() == 0:
        print_runs(alone, shared, f"{device}, backend {backend}")
    if all(difference(run, alone) <= TOLERANCE for run in shared):
        return 0
    if dist.get_rank() == 0:
        print("the loss curves differ by more than rounding: please report this", file=sys.stderr)
    return 1


def difference(run: Run, alone: Run) -> float:
    """Return the largest distance of two loss curves; infinity if there is NaN in them."""
    distances = [abs(a - b) for a, b in zip(run.losses, alone.losses, strict=True)]
    return math.inf if any(map(math.isnan, distances)) else max(distances)


@dataclass
class SharedRun(Run):
    """A network that all ranks train together."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on this rank's share of a batch; note the loss of all of it, and times."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        share = slice(*(len(images) * i // world_size for i in (rank, rank + 1)))
        with demo.stopwatch(self.step_ms, images.device):
            output = self.model(images[share])
            loss = nn.functional.cross_entropy(output, labels[share], reduction="sum")
            loss = loss * (world_size / len(images))  # gradients are divided by world_size
            self.optimizer.zero_grad()
            loss.backward()
            with demo.stopwatch(self.update_ms, images.device):
                self.update()
            self.schedule.step()
        whole = loss.detach() / world_size
        dist.all_reduce(whole)
        self.losses.append(whole.item())


def shared_run(name: str, model: nn.Module, num_steps: int) -> SharedRun:
    """Return a run under the engine of that name."""
    fuse_(model)
    model = SyncBatchNormReLU.convert_sync_batchnorm(model)
    if name == "FSDP2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device_type = next(model.parameters()).device.type
        mesh = init_device_mesh(device_type, (dist.get_world_size(),))
        for child in model.children():
            if isinstance(child, demo.Block):
                fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = AdamW(model.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    schedule = demo.one_cycle(optimizer, num_steps)
    return SharedRun(name, model, optimizer, optimizer.step, schedule)


def train(epochs: int, device: torch.device) -> tuple[Run, list[SharedRun]]:
    """Train side by side; return the run of one process and those of all."""
    data = demo.load_digits(device)
    images, labels = data.train_images.double(), data.train_labels
    num_batches = len(images) // BATCH_SIZE
    num_steps = epochs * num_batches

    def model() -> nn.Module:
        torch.manual_seed(SEED)
        return demo.network().to(device, torch.float64)

    alone = our_run("one process", model(), num_steps)
    shared = [shared_run(name, model(), num_steps) for name in ("DDP", "FSDP2")]
    shuffle = torch.Generator().manual_seed(SEED)
    with demo.exact():
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=shuffle).to(device)
            for batch in order[: num_batches * BATCH_SIZE].split(BATCH_SIZE):
                for training in (alone, *shared):
                    training.step(images[batch], labels[batch])
    return alone, shared


def print_runs(alone: Run, shared: list[SharedRun], where: str) -> None:
    """Print a line for every run."""
    from rich.console import Console
    from rich.table import Table

    title = f"{dist.get_world_size()} processes, {len(alone.losses)} steps on {where}"
    table = Table("", title=title)
    for heading in ("last loss", "largest difference", "clip + step"):
        table.add_column(heading, justify="right")
    for training in (alone, *shared):
        table.add_row(
            training.name,
            f"{training.losses[-1]:.6f}",
            "" if training is alone else f"{difference(training, alone):.1e}",
            f"{demo.median(training.update_ms):.3f} ms",
        )
    Console().print(table)
