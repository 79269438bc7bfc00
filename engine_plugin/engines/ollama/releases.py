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

_ACCELERATORS = {
    ("linux", "amd64"): ("cpu", "cuda", "vulkan", "rocm"),
    ("linux", "arm64"): ("cpu", "cuda", "jetpack5", "jetpack6"),
    ("darwin", "amd64"): ("cpu",),
    ("darwin", "arm64"): ("cpu", "metal"),
    ("windows", "amd64"): ("cpu", "cuda", "vulkan", "rocm"),
    ("windows", "arm64"): ("cpu",),
}
"""The accelerators that the archives of each system and processor support."""

_SECOND = ("rocm", "jetpack5", "jetpack6")
"""The accelerators that need a second archive."""


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
        for (system, machine), accelerators in _ACCELERATORS.items()
        for accelerator in accelerators
        for name in _names(system, machine, accelerator)
    )


def _names(system: str, machine: str, accelerator: str) -> tuple[str, ...]:
    """The names of the archives without their suffix, which for Linux depends on the release."""
    main = "ollama-darwin" if system == "darwin" else f"ollama-{system}-{machine}"
    return (main, f"{main}-{accelerator}") if accelerator in _SECOND else (main,)
