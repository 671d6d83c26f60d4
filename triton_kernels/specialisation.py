"""What to compile ahead of time: a kernel with the types and constants of one of its launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .multi_tensor import LAUNCH_OPTIONS


@dataclass(frozen=True)
class Specialisation:
    """One compiled form of a kernel, named as in ``kernel[constants]``."""

    kernel: Any
    types: Mapping[str, str]  # of the runtime arguments, as Triton spells them: "*fp32", "i32"
    constants: Mapping[str, Any]
    wide_accesses: int = 0  # 16-byte loads and stores in the loops over full, aligned blocks
    options: Mapping[str, Any] = field(default_factory=LAUNCH_OPTIONS.copy)  # of the launch

    @property
    def name(self) -> str:
        """Return the kernel with the constants that tell its forms apart."""
        hidden = ("ACC", "OPMATH", "CHUNK", "BLOCK", "ROWS", "COLS", "VEC", "SLOPE")
        shown = [
            self._shown(key, value)
            for key, value in self.constants.items()
            if value is not False and not key.endswith(hidden)
        ]
        return f"{self.kernel.__name__}[{', '.join(shown)}]"

    @staticmethod
    def _shown(key: str, value: object) -> str:
        if value is None:
            return f"no {key.removesuffix('_ptr')}"
        return key.lower() if value is True else str(value)

    @property
    def signature(self) -> dict[str, str]:
        """Return the type of every argument, constants included."""
        return {**self.types, **dict.fromkeys(self.constants, "constexpr")}
