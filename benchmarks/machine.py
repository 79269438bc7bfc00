"""What the figures were measured on; nothing that names the machine."""

from __future__ import annotations

import asyncio
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

__all__ = ["busy", "describe"]


def describe() -> dict[str, str]:
    """The machine and the versions that matter, in words."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        **{name: _version(name) for name in ("ngh2", "grpcio", "protobuf", "xllamacpp", "openvino-genai", "aiohttp")},
    }


async def busy(seconds: float) -> float:
    """Percent of the whole processor that is in use, watched for so long."""
    psutil.cpu_percent()
    await asyncio.sleep(seconds)
    return psutil.cpu_percent()


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
