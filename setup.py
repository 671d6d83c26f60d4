"""Build the native library; everything static stands in pyproject.toml.

FASTREMEDY_BUILD: none (pure Python), cpu, cuda, or auto (default: what there are compilers for).
FASTREMEDY_CUDA_ARCHS: compute capabilities as "8.0;9.0+PTX", or native for the GPU of this machine.
"""

import importlib.util
import os
import re
import shutil
import warnings
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

CUDA_ARCHS = os.environ.get("FASTREMEDY_CUDA_ARCHS") or "7.5;8.0;9.0;10.0;12.0+PTX"
CXX_FLAGS = """-O3 -g0 -std=c++17 -fvisibility=hidden -fopenmp-simd -fno-math-errno
    -fno-trapping-math -ffp-contract=fast""".split()
NVCC_FLAGS = "-O3 -std=c++17 --threads 2 -Xcompiler -fvisibility=hidden -lineinfo".split()
LINK_FLAGS = """-Wl,--no-as-needed -ltorch -Wl,--as-needed -Wl,--exclude-libs,ALL
    -Wl,--version-script,csrc/exports.map""".split()


def find_cuda():
    """Return the folders of nvcc and of the static CUDA runtime, or None."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    beside_nvcc = Path(shutil.which("nvcc") or "/usr/bin/nvcc").resolve().parents[1]
    for home in [Path(named)] if named else [Path("/usr/local/cuda"), beside_nvcc]:
        for library in ("lib64", "lib", f"lib/{os.uname().machine}-linux-gnu"):
            if (home / "bin/nvcc").exists() and (home / library / "libcudart_static.a").exists():
                return home, home / library
    return None


def arch_flags(archs):
    """Return nvcc's flags for native or compute capabilities; each serves later minors, too."""
    flags = ["-arch=native"] if archs == "native" else []
    for number, with_ptx in re.findall(r"(\d+a?)(\+PTX)?", archs.replace(".", "")):
        # What nvcc's front end makes is the same for 8.0 to 9.0, and from 10.0 on: it runs once.
        ptx = next((n for n in (100, 80) if n <= int(number.rstrip("a"))), number)
        codes = [f"sm_{number}", *([f"compute_{ptx}"] if with_ptx else [])]
        flags += [f"-gencode=arch=compute_{ptx},code={code}" for code in codes]
    return flags


def native_library(cuda):
    """Return the arguments of ``setup`` that build ``fastremedy._C``."""
    from torch.utils import cpp_extension

    torch = Path(cpp_extension.TORCH_LIB_PATH).parent
    pybind11 = importlib.util.find_spec("pybind11")  # torch's own copy serves where there is none
    includes = [Path(pybind11.origin).parent / "include"] if pybind11 else []
    cxx = [*CXX_FLAGS, *(f"-isystem{path}" for path in (*includes, torch / "include"))]
    nvcc, link = [*NVCC_FLAGS, *arch_flags(CUDA_ARCHS)], [f"-L{torch}/lib", *LINK_FLAGS]
    sources = [*glob("csrc/host/*.cpp"), *glob("csrc/cpu/*.cpp"), *glob("csrc/ops/*.cpp")]
    if cuda:
        sources += glob("csrc/cuda/*.cu")
        cxx += ["-DFASTREMEDY_WITH_CUDA", f'-DFASTREMEDY_CUDA_ARCHS="{CUDA_ARCHS}"']
        link += [f"-L{cuda[1]}", "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
        cpp_extension.CUDA_HOME = str(cuda[0])  # a CPU build of torch does not look for it
        cpp_extension._check_cuda_version = lambda *_: None  # the kernels know no torch
        cpp_extension.torch.version.cuda = "any"  # without one ninja forgets what kernels include
    flags = {"extra_compile_args": {"cxx": cxx, "nvcc": nvcc}, "extra_link_args": link}
    headers = ["csrc/exports.map", *glob("csrc/*/*.h"), *glob("csrc/*/*.cuh")]
    library = Extension("fastremedy._C", sorted(sources), depends=headers, language="c++", **flags)
    return {"ext_modules": [library], "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


build = os.environ.get("FASTREMEDY_BUILD") or "auto"
cuda = find_cuda() if build in ("auto", "cuda") else None
if build not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"FASTREMEDY_BUILD must be auto, cpu, cuda or none, got {build!r}")
if build == "cuda" and cuda is None:
    raise SystemExit("FASTREMEDY_BUILD=cuda needs nvcc and libcudart_static.a: set CUDA_HOME")
if build == "auto" and not shutil.which(os.environ.get("CXX", "g++")):
    build, lost = "none", "CPU tensors will run plain torch and CUDA tensors Triton, more slowly"
    warnings.warn(f"no C++ compiler, so no native library: {lost}", stacklevel=1)
setup(**({} if build == "none" else native_library(cuda)))
