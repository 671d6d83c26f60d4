"""Print what every kernel takes on every architecture: registers, local and shared memory.

Triton kernels are compiled for the forms that their modules list, CUDA files by nvcc; no GPU is
needed. AMD's architectures (gfx) concern Triton alone. The exit status is 1 if a kernel spills
registers to local memory or if the loop of a Triton kernel over full, aligned blocks does not use
16-byte accesses.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
TRITON_MODULES = ("clip_grad_norm", "adamw", "batch_norm_relu", "focal_loss", "activation_stats")

WIDE_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64|b128)\b")
AMDGPU_METADATA = re.compile(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)")
RESOURCE_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
PTXAS_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
PTXAS_STACK = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
PTXAS_USED = re.compile(r"Used (\d+) registers")
PTXAS_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture."""

    source: str
    kernel: str
    arch: str
    registers: int  # per thread
    local_bytes: int  # per thread: spilled registers and stack
    shared_bytes: int  # per block
    wide_accesses: int = 0
    expected_wide_accesses: int = 0

    @property
    def problem(self) -> str | None:
        """Say what is wrong with the kernel, or None."""
        if self.local_bytes > 0:
            return f"{self.local_bytes} bytes of local memory per thread, expected 0"
        if self.wide_accesses != self.expected_wide_accesses:
            return f"{self.wide_accesses} 16-byte accesses, expected {self.expected_wide_accesses}"
        return None


def count_wide_accesses(ptx: str) -> int:
    """Return the number of 16-byte loads and stores of global memory."""
    return len(WIDE_ACCESS.findall(ptx))


def parse_resource_usage(text: str) -> tuple[int, int]:
    """Return registers and local bytes from the output of ``cuobjdump --dump-resource-usage``."""
    match = RESOURCE_USAGE.search(text)
    if match is None:
        raise ValueError(f"expected the output of cuobjdump --dump-resource-usage, got {text!r}")
    registers, stack, _, local = map(int, match.groups())
    return registers, stack + local


def parse_amdgcn(assembly: str) -> tuple[int, int]:
    """Return registers and local bytes from the metadata of AMD's assembly."""
    metadata = {name: int(value) for name, value in AMDGPU_METADATA.findall(assembly)}
    if len(metadata) != 2:
        raise ValueError(f"expected the metadata of a kernel, got {metadata}")
    return metadata["vgpr_count"], metadata["private_segment_fixed_size"]


def parse_ptxas(text: str, source: str) -> Iterator[Resources]:
    """Yield what ``ptxas -v`` says of each kernel."""
    entries = list(PTXAS_ENTRY.finditer(text))
    ends = [entry.start() for entry in entries[1:]] + [len(text)]
    for entry, end in zip(entries, ends, strict=True):
        report = text[entry.end() : end]
        stack, used = PTXAS_STACK.search(report), PTXAS_USED.search(report)
        if stack is None or used is None:
            raise ValueError(f"expected stack frame and registers of {entry[1]}, got {report!r}")
        shared = PTXAS_SHARED.search(report)
        yield Resources(
            source,
            entry[1],
            entry[2],
            registers=int(used[1]),
            local_bytes=max(map(int, stack.groups())),  # the frame holds what is spilled
            shared_bytes=int(shared[1]) if shared else 0,
        )


def triton_resources(
    modules: Sequence[str], archs: Sequence[str], first_form: bool = False
) -> Iterator[Resources]:
    """Compile the Triton kernels; there must be no TRITON_INTERPRET in the environment."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for name in modules:
        module = importlib.import_module(f"fastremedy.triton_kernels.{name}")
        forms = list(module.specialisations())
        if first_form:
            forms = list({form.kernel: form for form in reversed(forms)}.values())
        for form, arch in itertools.product(forms, archs):
            is_amd = arch.startswith("gfx")
            compiled = triton.compile(
                ASTSource(form.kernel, form.signature, form.constants),
                target=GPUTarget("hip", arch, 64)
                if is_amd
                else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32),
                options=dict(form.options),
            )
            asm = compiled.asm
            usage = parse_amdgcn(asm["amdgcn"]) if is_amd else cubin_resources(asm["cubin"])
            # Blocks are made for 128 threads, and on AMD's GPUs as many warps have 256.
            wide = (0, 0) if is_amd else (count_wide_accesses(asm["ptx"]), form.wide_accesses)
            source, shared_bytes = f"triton_kernels/{name}.py", compiled.metadata.shared
            yield Resources(source, form.name, arch, *usage, shared_bytes, *wide)


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and local bytes of a kernel."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_resource_usage(usage.stdout)


def cuda_resources(nvcc: str, archs: Sequence[str]) -> Iterator[Resources]:
    """Compile the CUDA files."""
    for file in sorted(CUDA_SOURCES.glob("*.cu")):
        for arch in (arch for arch in archs if arch.startswith("sm_")):
            command = [nvcc, "-cubin", f"-arch={arch}", "-O3", "-std=c++17", "-Xptxas=-v"]
            command += ["-o", os.devnull, str(file)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode != 0:
                raise SystemExit(f"nvcc does not compile {file} for {arch}:\n{result.stderr}")
            for resources in parse_ptxas(result.stderr, f"csrc/cuda/{file.name}"):
                yield replace(resources, kernel=demangle(resources.kernel))


@functools.cache
def demangle(symbol: str) -> str:
    """Return the C++ name of a kernel with its template arguments, without namespace."""
    if not shutil.which("c++filt"):
        return symbol
    command = ["c++filt", "--no-params", symbol]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"(fastremedy::|cuda::|\(anonymous namespace\)::|^void )", "", name)


def table(rows: Sequence[Resources], archs: Sequence[str]) -> str:
    """Return one line per kernel: registers/local/shared bytes on each architecture."""
    by_kernel: dict[tuple[str, str], dict[str, Resources]] = {}
    for row in rows:
        by_kernel.setdefault((row.source, row.kernel), {})[row.arch] = row
    width = max(len(kernel) for _, kernel in by_kernel)
    lines = [f"{'registers/local/shared':{width}}" + "".join(f"{arch:>13}" for arch in archs)]
    source = None
    for (row_source, kernel), cells in by_kernel.items():
        if row_source != source:
            source = row_source
            lines.append(source)
        line = f"{kernel:{width}}"
        for arch in archs:
            cell = cells.get(arch)
            text = f"{cell.registers}/{cell.local_bytes}/{cell.shared_bytes}" if cell else "-"
            line += f"{text:>12}{'!' if cell and cell.problem else ' '}"
        lines.append(line)
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", help=f"default: {', '.join(ARCHS)}")
    parser.add_argument(
        "--triton", action="append", choices=TRITON_MODULES, help="these modules alone"
    )
    parser.add_argument(
        "--first-form", action="store_true", help="of every Triton kernel the first form alone"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the table here")
    parser.add_argument(
        "--require-nvcc", action="store_true", help="fail instead of leaving the CUDA files out"
    )
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    archs = arguments.arch or ARCHS
    nvcc = None if arguments.triton else shutil.which("nvcc")
    if nvcc is None and arguments.require_nvcc:
        raise SystemExit("csrc/cuda cannot be compiled: there is no nvcc on PATH")
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    rows = list(triton_resources(arguments.triton or TRITON_MODULES, archs, arguments.first_form))
    if nvcc is not None:
        rows += cuda_resources(nvcc, archs)
    print(table(rows, archs))
    if nvcc is None and not arguments.triton:
        print("csrc/cuda is left out: there is no nvcc on PATH")
    if arguments.json is not None:
        cells = [{**asdict(row), "problem": row.problem} for row in rows]
        arguments.json.write_text(json.dumps(cells, indent=1) + "\n")
    problems = [f"{row.kernel} on {row.arch}: {row.problem}" for row in rows if row.problem]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
