"""Warm up for a GPU that is not there, take a training step; print what compiles only in the step.

For a process of its own, without Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastremedy


def pretend_gpu() -> list[str]:
    """Let kernels compile and never run; return the growing list of those that were compiled."""
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    run: Any = JITFunction.run
    JITFunction.run = lambda *args, warmup, **kwargs: run(*args, warmup=True, **kwargs)
    torch.cuda.is_available = lambda: True
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment, misc]
    fastremedy.backends._triton_interprets = lambda: True  # takes tensors of the CPU
    compiled: list[str] = []
    hook = lambda fn, **others: compiled.append(fn.name.split(".")[-1])  # noqa: E731
    triton.knobs.runtime.jit_post_compile_hook = hook
    return compiled


def main() -> None:
    compiled = pretend_gpu()
    model = torch.nn.Linear(300, 100)
    loaded = fastremedy.warmup(model, "cpu")
    num_compiled = len(compiled)
    compiled.clear()
    optimizer = fastremedy.optim.AdamW(model.parameters(), max_grad_norm=1.0)
    model(torch.ones(2, 300)).sum().backward()
    fastremedy.clip_(model.parameters(), 1.0)
    optimizer.step()
    again = fastremedy.warmup(model, "cpu")
    print(json.dumps([loaded, again, num_compiled, compiled]))


main()
