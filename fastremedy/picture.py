"""Where the examples draw."""

from __future__ import annotations

import sys
from pathlib import Path


def can_be_written(path: Path) -> bool:
    """Whether a picture can be written there; print why not, before training for minutes."""
    reason = _reason_against(path)
    if reason is not None:
        print(f"--out must {reason}", file=sys.stderr)
    return reason is None


def _reason_against(path: Path) -> str | None:
    from matplotlib.figure import Figure

    endings = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in endings:  # matplotlib would add one
        return f"end in .png or another of {', '.join(endings)}, got {path}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        path.open("ab").close()
    except OSError as error:
        return f"be a file that can be written, got {error}"
    if is_new:
        path.unlink()
    return None
