"""Kernels in Triton: one file per operator, each with its kernels first and its launchers last.

The folder is installed as ``fastremedy.triton_kernels``: several projects have a top-level package
of the name ``triton_kernels``.
"""

if __name__ == "triton_kernels":  # the repository root is on sys.path
    raise ImportError("this folder is imported as fastremedy.triton_kernels")
