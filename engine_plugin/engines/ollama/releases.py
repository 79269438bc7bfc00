"""Ollama's own releases: what their archives are called, what belongs together, and where the server in them is.

An archive holds bin/ollama and lib/ollama, for macOS and Windows everything beside each other. The same archive
computes on processors and on NVIDIA's graphics cards; what AMD's need lies in a second one, to be unpacked over the
first. `engine.archives` names what does not fit here.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine_plugin.errors import InstallError
from engine_plugin.install.releases import Archive
from engine_plugin.install.software import find_program

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RELEASE", "find_ollama", "release_archives"]

RELEASE = "0.32.15"
"""The release that goes with this version of engine-plugin."""

_DOWNLOADS = "https://github.com/ollama/ollama/releases/download"
_CHECKSUMS = "sha256sum.txt"
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(-rc\d+)?")
_OLDEST = (0, 6, 0)
"""Before that macOS had no archive, and requests lacked what we send."""

_ZSTD_SINCE = (0, 14, 0)

# By system, processor and accelerator: the names without their end. Linux' differ in it from release to release.
_NAMES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("linux", "amd64", "cpu"): ("ollama-linux-amd64",),
    ("linux", "amd64", "cuda"): ("ollama-linux-amd64",),
    ("linux", "amd64", "vulkan"): ("ollama-linux-amd64",),
    ("linux", "amd64", "rocm"): ("ollama-linux-amd64", "ollama-linux-amd64-rocm"),
    ("linux", "arm64", "cpu"): ("ollama-linux-arm64",),
    ("linux", "arm64", "cuda"): ("ollama-linux-arm64",),
    ("linux", "arm64", "jetpack5"): ("ollama-linux-arm64", "ollama-linux-arm64-jetpack5"),
    ("linux", "arm64", "jetpack6"): ("ollama-linux-arm64", "ollama-linux-arm64-jetpack6"),
    ("darwin", "amd64", "cpu"): ("ollama-darwin",),
    ("darwin", "arm64", "cpu"): ("ollama-darwin",),
    ("darwin", "arm64", "metal"): ("ollama-darwin",),
    ("windows", "amd64", "cpu"): ("ollama-windows-amd64",),
    ("windows", "amd64", "cuda"): ("ollama-windows-amd64",),
    ("windows", "amd64", "vulkan"): ("ollama-windows-amd64",),
    ("windows", "amd64", "rocm"): ("ollama-windows-amd64", "ollama-windows-amd64-rocm"),
    ("windows", "arm64", "cpu"): ("ollama-windows-arm64",),
}


def release_archives(version: str, mirror: str, checksums: str) -> tuple[Archive, ...]:
    """The archives of release `version`, such as 0.32.15. Raises InstallError for what is no release known here.

    A `mirror` is laid out as the original: <mirror>/v<version>/<file>. The digests come from `checksums`, else from
    the release's own sha256sum.txt.
    """
    found = _VERSION.fullmatch(version)
    numbers = (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)
    if numbers < _OLDEST:
        raise InstallError(
            f"engine.version: {version} is no release of Ollama that is known here; name one from 0.6.0 on, such as "
            f"{RELEASE}, or the archive itself in engine.archives"
        )
    folder = f"{mirror.rstrip('/') or _DOWNLOADS}/v{version.removeprefix('v')}"
    ends = {"linux": ".tar.zst" if numbers >= _ZSTD_SINCE else ".tgz", "darwin": ".tgz", "windows": ".zip"}
    return tuple(
        Archive(
            f"{folder}/{name}{ends[system]}",
            system,
            machine,
            accelerator,
            checksums=checksums or f"{folder}/{_CHECKSUMS}",
        )
        for (system, machine, accelerator), names in _NAMES.items()
        for name in names
    )


def find_ollama(folder: Path) -> Path:
    """The ollama in what was unpacked. Raises InstallError. Blocking."""
    return find_program(folder, "ollama")
