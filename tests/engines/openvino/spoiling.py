"""Models that are damaged after their check."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["spoil"]


def spoil(path: Path) -> None:
    """Damage a file as a failing disk leaves it: its size and time are as they were."""
    info = path.stat()
    path.unlink()  # it may be a second name of another model's file
    path.write_bytes(b"x" * info.st_size)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
