"""How a program of ours that an engine's process runs gets its settings, and fails. Imports only the stdlib."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, NoReturn

__all__ = ["FAILED", "fail", "read_settings"]

FAILED = 3


def fail(text: str) -> NoReturn:
    """End this process: one line on stderr, exit status 3. Nothing is cleaned up; the kernel frees everything."""
    sys.stderr.write(f"E {text}\n")
    sys.stderr.flush()
    os._exit(FAILED)


def read_settings() -> dict[str, Any]:
    """The first line of stdin, a JSON object, read without a buffer, so that whoever waits for stdin's end sees all
    that follows. Without a line the process ends."""
    line = bytearray()
    while not line.endswith(b"\n"):
        data = os.read(0, 65536)
        if not data:
            os._exit(0)
        line += data
    settings: dict[str, Any] = json.loads(line)
    return settings
