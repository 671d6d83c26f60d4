"""Print what every kernel takes on every architecture: registers, local and shared memory.

Triton kernels are compiled for the forms that their modules list; CUDA kernels are those of the
built library, for the architectures that it was built for. No GPU is needed. AMD's architectures
(gfx) concern Triton alone. The exit status is 1 if a kernel spills registers to local memory or if
the loop of a Triton kernel over full, aligned blocks does not use 16-byte accesses.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
TRITON_MODULES = ("clip_grad_norm", "adamw", "batch_norm_relu", "focal_loss", "activation_stats")

WIDE_ACCESS = re.compile(r"\b(?:ld|st)\.global[\w.:]*\.(?:v4\.[bfsu]32|v2\.[bfsu]64|b128)\b")
AMDGPU_METADATA = re.compile(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)")
RESOURCE_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
CUDA_FILE = re.compile(r"^arch = (\w+)$.*?^identifier = \S*?([^\s/]+)$", re.DOTALL | re.MULTILINE)
CUDA_KERNEL = re.compile(r"^ Function (\w+):\n(.*)$", re.MULTILINE)


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


def parse_resource_usage(text: str) -> tuple[int, int, int]:
    """Return registers, local and shared bytes from ``cuobjdump --dump-resource-usage``."""
    match = RESOURCE_USAGE.search(text)
    if match is None:
        raise ValueError(f"expected the output of cuobjdump --dump-resource-usage, got {text!r}")
    registers, stack, shared, local = map(int, match.groups())
    return registers, stack + local, shared


def parse_amdgcn(assembly: str) -> tuple[int, int]:
    """Return registers and local bytes from the metadata of AMD's assembly."""
    metadata = {name: int(value) for name, value in AMDGPU_METADATA.findall(assembly)}
    if len(metadata) != 2:
        raise ValueError(f"expected the metadata of a kernel, got {metadata}")
    return metadata["vgpr_count"], metadata["private_segment_fixed_size"]


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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse_resource_usage(resource_usage(file.name))[:2]


def resource_usage(binary: str) -> str:
    """Return what cuobjdump, which comes with Triton, says of a cubin or a library.

    That is nothing where there is no kernel.
    """
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [cuobjdump, "--dump-resource-usage", binary]
    return subprocess.run(command, capture_output=True, text=True).stdout


def cuda_resources(usage: str) -> Iterator[Resources]:
    """Yield what cuobjdump says of each kernel of the library."""
    files = list(CUDA_FILE.finditer(usage))
    ends = [file.start() for file in files[1:]] + [len(usage)]
    for file, end in zip(files, ends, strict=True):
        for symbol, resources in CUDA_KERNEL.findall(usage[file.end() : end]):
            yield Resources(
                f"csrc/cuda/{file[2]}", demangle(symbol), file[1], *parse_resource_usage(resources)
            )


def library_resources() -> list[Resources]:
    """Return what the kernels of the built library take; nothing if it has none."""
    library = importlib.util.find_spec("fastremedy._C")
    if library is None or library.origin is None:
        return []
    return list(cuda_resources(resource_usage(library.origin)))


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
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    archs = arguments.arch or ARCHS
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    rows = list(triton_resources(arguments.triton or TRITON_MODULES, archs, arguments.first_form))
    if not arguments.triton:
        rows += [row for row in library_resources() if row.arch in archs]
    print(table(rows, archs))
    if arguments.json is not None:
        cells = [{**asdict(row), "problem": row.problem} for row in rows]
        arguments.json.write_text(json.dumps(cells, indent=1) + "\n")
    problems = [f"{row.kernel} on {row.arch}: {row.problem}" for row in rows if row.problem]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
