"""The archives of Ollama's releases for each system, processor and accelerator.

An archive has bin/ollama and lib/ollama; for macOS and Windows all files are in one directory. The main archive
supports CPUs, NVIDIA GPUs and Vulkan. AMD GPUs and Jetson need a second archive, unpacked over the first. Other
archives can be given as `engine.archives`.
"""

from __future__ import annotations

import re

from engine_plugin.errors import InstallError
from engine_plugin.install.releases import Archive

__all__ = ["RELEASE", "release_archives"]

RELEASE = "0.32.15"
"""The release that this version of engine-plugin installs."""

_DOWNLOADS = "https://github.com/ollama/ollama/releases/download"
_CHECKSUMS = "sha256sum.txt"
_VERSION = re.compile(r"v?(\d+)\.(\d+)\.(\d+)(-rc\d+)?")
_OLDEST = (0, 6, 0)
"""Older releases have no archive for macOS and lack fields that this driver sends."""

_ZSTD_SINCE = (0, 14, 0)

# By system, processor and accelerator: names without the suffix, which for Linux depends on the release.
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
    """The archives of release `version`, such as 0.32.15. Raises InstallError for an invalid or unsupported version.

    A `mirror` has the original's layout, <mirror>/v<version>/<file>. The digests are from `checksums` (a URL or
    path), else from the release's sha256sum.txt.
    """
    found = _VERSION.fullmatch(version)
    numbers = (int(found[1]), int(found[2]), int(found[3])) if found else (0, 0, 0)
    if numbers < _OLDEST:
        raise InstallError(
            f"engine.version: {version} is not a supported release of Ollama; use 0.6.0 or newer, such as {RELEASE}, "
            "or name the archives in engine.archives"
        )
    folder = f"{mirror.rstrip('/') or _DOWNLOADS}/v{version.removeprefix('v')}"
    suffixes = {"linux": ".tar.zst" if numbers >= _ZSTD_SINCE else ".tgz", "darwin": ".tgz", "windows": ".zip"}
    return tuple(
        Archive(
            f"{folder}/{name}{suffixes[system]}",
            system,
            machine,
            accelerator,
            checksums=checksums or f"{folder}/{_CHECKSUMS}",
        )
        for (system, machine, accelerator), names in _NAMES.items()
        for name in names
    )
