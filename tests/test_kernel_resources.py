"""No kernel spills registers, and full blocks are read 16 bytes at a time: compiled, not run."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "kernel_resources.py"
KERNELS = SCRIPT.parents[1] / "triton_kernels"
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

PTXAS = """\
ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_90'
ptxas info    : Function properties for _Z6kernelPf
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 31 registers, used 1 barriers, 276 bytes smem
ptxas info    : Compiling entry function '_Z5otherPf' for 'sm_90'
ptxas info    : Function properties for _Z5otherPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""


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


def test_nvcc_can_be_required(tmp_path: Path) -> None:
    result = run(str(SCRIPT), "--require-nvcc", PATH=str(tmp_path))
    assert result.returncode == 1
    assert "no nvcc on PATH" in result.stderr


@pytest.mark.parametrize(
    ("stack", "stores", "loads", "local_bytes"),
    [(0, 0, 0, 0), (16, 24, 24, 24), (8, 0, 0, 8), (0, 4, 8, 8)],
)
def test_report_of_ptxas(
    script: ModuleType, stack: int, stores: int, loads: int, local_bytes: int
) -> None:
    text = PTXAS.format(stack=stack, stores=stores, loads=loads)
    first, second = script.parse_ptxas(text, "kernel.cu")
    assert first == script.Resources("kernel.cu", "_Z6kernelPf", "sm_90", 31, local_bytes, 276)
    assert (first.problem is None) == (local_bytes == 0)
    assert second == script.Resources("kernel.cu", "_Z5otherPf", "sm_90", 8, 0, 0)


def test_report_of_cuobjdump(script: ModuleType) -> None:
    text = "Function kernel:\n  REG:48 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:616 TEXTURE:0"
    assert script.parse_resource_usage(text) == (48, 12)
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
