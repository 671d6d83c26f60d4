"""No kernel spills registers, and full blocks are read 16 bytes at a time: compiled, not run."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "kernel_resources.py"
KERNELS = ROOT / "triton_kernels"
ARCH = "sm_90"

MODULES = ("clip_grad_norm", "adamw", "batch_norm_relu", "focal_loss", "activation_stats")
# Two loads in each of two loops; gradient, parameter and moments loaded, three stored.
WIDE_ACCESSES = {
    "clip_grad_norm": {f"grad_norm_kernel[l2, {dtype}]": 4 for dtype in ("fp32", "bf16")},
    "adamw": {
        f"update_kernel[{dtype}, {dtype}, {dtype}, {dtype}, nearest, no skipped]": 7
        for dtype in ("fp32", "bf16")
    },
}

USAGE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]
compressed
identifier = /path/to/csrc/cuda/{file}.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _Z6kernelPf:
  REG:31 STACK:{stack} SHARED:276 LOCAL:{local} CONSTANT[0]:4536 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z5otherPf:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:4536 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
compressed
identifier = /path/to/csrc/cuda/{file}.cu
"""
# Two numbers of the shape, for four elements: nvcc keeps too many others in uniform registers.
KNOWN_SPILLS = {("sm_100", "sigmoid_forward_kernel<(GammaKind)3, true, float>", 8)}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are compiled and not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= variables
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


def test_every_kernel_is_listed(script: ModuleType) -> None:
    pytest.importorskip("triton")
    sources = "".join(file.read_text() for file in KERNELS.glob("*.py"))
    assert script.TRITON_MODULES == MODULES
    names = [f"fastremedy.triton_kernels.{name}" for name in MODULES]
    forms = [form for name in names for form in importlib.import_module(name).specialisations()]
    listed = {form.kernel.__name__ for form in forms}
    assert listed == set(re.findall(r"^def ([a-z]\w*_kernel)\(", sources, re.MULTILINE))


# Compiled for sm_100, the sums with a histogram take all the registers that they may.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "module"),
    [*itertools.product(("sm_90", "gfx942"), MODULES), ("sm_100", "activation_stats")],
)
def test_no_kernel_spills_and_accesses_are_wide(arch: str, module: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "resources.json"
    forms = ["--first-form"] if arch == "gfx942" else []  # all of them compile for ten minutes
    result = run(str(SCRIPT), "--triton", module, "--arch", arch, "--json", str(output), *forms)
    assert result.returncode == 0, result.stderr
    rows = json.loads(output.read_text())
    assert {row["arch"] for row in rows} == {arch}
    assert not [row for row in rows if row["problem"] or row["local_bytes"]]
    assert all(row["registers"] > 0 and row["kernel"] in result.stdout for row in rows)
    wide_accesses = {row["kernel"]: row["wide_accesses"] for row in rows}
    if arch.startswith("sm_"):
        assert WIDE_ACCESSES.get(module, {}).items() <= wide_accesses.items()


def test_a_spilling_kernel_is_found() -> None:
    pytest.importorskip("triton")
    # 24 registers are too few for the update of AdamW.
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import kernel_resources
from fastremedy.triton_kernels import adamw, multi_tensor
multi_tensor.LAUNCH_OPTIONS["maxnreg"] = 24
forms = [form for form in adamw.specialisations() if form.wide_accesses == 7][:1]
adamw.specialisations = lambda: forms
(row,) = kernel_resources.triton_resources(["adamw"], ["{ARCH}"])
print(row.problem)
"""
    result = run("-c", program)
    assert "bytes of local memory per thread, expected 0" in result.stdout, result.stderr


def test_no_cuda_kernel_spills(script: ModuleType) -> None:
    pytest.importorskip("triton")
    rows = script.library_resources()
    if not rows and shutil.which("nvcc") is None:
        pytest.skip("the native library was built without CUDA, and there is no nvcc")
    files = (ROOT / "csrc" / "cuda").glob("*.cu")
    assert {row.source for row in rows} == {f"csrc/cuda/{file.name}" for file in files}
    spills = {(row.arch, row.kernel, row.local_bytes) for row in rows if row.problem}
    assert spills <= KNOWN_SPILLS


@pytest.mark.parametrize(("stack", "local"), [(0, 0), (16, 0), (0, 4), (8, 4)])
def test_report_of_a_library(script: ModuleType, stack: int, local: int) -> None:
    text = "".join(USAGE.format(file=file, stack=stack, local=local) for file in ("a", "b"))
    rows = list(script.cuda_resources(text))
    assert [row.source for row in rows] == ["csrc/cuda/a.cu"] * 2 + ["csrc/cuda/b.cu"] * 2
    first, second = rows[2:]
    name = script.demangle("_Z6kernelPf")
    assert first == script.Resources("csrc/cuda/b.cu", name, "sm_90", 31, stack + local, 276)
    assert (first.problem is None) == (stack + local == 0)
    assert second.problem is None


def test_report_of_cuobjdump(script: ModuleType) -> None:
    text = "Function kernel:\n  REG:48 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:616 TEXTURE:0"
    assert script.parse_resource_usage(text) == (48, 12, 16)
    with pytest.raises(ValueError, match="expected the output of cuobjdump"):
        script.parse_resource_usage("nothing")


def test_metadata_of_amd(script: ModuleType) -> None:
    text = "  .private_segment_fixed_size: 16\n  .vgpr_count: 18\n  .vgpr_spill_count: 3\n"
    assert script.parse_amdgcn(text) == (18, 16)
    with pytest.raises(ValueError, match="expected the metadata of a kernel"):
        script.parse_amdgcn("nothing")


def test_wide_accesses_are_counted_in_ptx(script: ModuleType) -> None:
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_first.v2.b64 { %rd3, %rd4 }, [ %rd1 + 0 ];
        st.global.v4.b32 [ %rd2 + 0 ], { %r1, %r2, %r3, %r4 };
        ld.global.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];
        ld.global.b32 { %r1 }, [ %rd1 + 0 ];
        ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r9 + 0 ];
        st.global.b16 [ %rd2 + 0 ], { %rs1 };
    """
    assert script.count_wide_accesses(ptx) == 3
    narrow = script.Resources("kernel.py", "kernel", "sm_90", 32, 0, 0, 3, 4)
    assert narrow.problem == "3 16-byte accesses, expected 4"
