"""The releases of OpenVINO Model Server: the names of their archives, and the one that this machine can run.

A release has one archive for each of a few systems (flavours), each with or without the Python that renders chat
templates with Jinja. The names are those since release 2026.1; `engine.archives` names other archives.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.errors import InstallError
from engine_plugin.install.releases import Archive

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["RELEASE", "Machine", "missing_library", "release_archive"]

RELEASE = "2026.3"
"""The release that goes with this version of engine-plugin."""

_DOWNLOADS = "https://github.com/openvinotoolkit/model_server/releases/download"
_DIGESTS = "https://api.github.com/repos/openvinotoolkit/model_server/releases/tags"
"""The project publishes no checksum file; GitHub's API has each file's SHA-256."""

_VERSION = re.compile(r"v?(\d{4})\.(\d+)(?:\.(\d+))?")
_OLDEST = (2026, 1, 0)
_RED_HATS = {"rhel", "fedora", "centos"}
_LIBRARIES = ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")


@dataclass(frozen=True, slots=True)
class _Flavour:
    """What an archive was built on: the C library that it needs, and the Python that it loads when it has one."""

    glibc: tuple[int, int]
    python: str


# In order of preference for any other system.
_FLAVOURS = {
    "ubuntu24": _Flavour((2, 39), "libpython3.12.so.1.0"),
    "ubuntu22": _Flavour((2, 35), "libpython3.10.so.1.0"),
    "redhat": _Flavour((2, 34), "libpython3.12.so.1.0"),
}

# Libraries that an archive expects in the system, and the packages that contain them.
_PACKAGES = {
    "libxml2.so.2": (
        "libxml2 (Debian, Ubuntu, Fedora); on a system that has only a newer one, such as Ubuntu 26.04, set "
        "engine.backend to embedded"
    ),
    "libssl.so.1.1": "compat-openssl11 (Red Hat)",
    "libtbb.so.12": "libtbb12 (Debian, Ubuntu) or tbb (Fedora, Red Hat)",
}
_UNLOADED = re.compile(r"error while loading shared libraries: (\S+?):")
_TOO_OLD = re.compile(r"version `(GLIBC(?:XX)?_[\d.]+)' not found")


@dataclass(frozen=True, slots=True)
class Machine:
    """The properties of a machine that decide which archive it can run. `glibc` is (0, 0) without glibc."""

    system: str
    processor: str
    glibc: tuple[int, int] = (0, 0)
    distributions: frozenset[str] = frozenset()
    """ID and ID_LIKE of os-release."""
    libraries: tuple[Path, ...] = field(default=(), compare=False)
    """Where shared libraries are looked for."""

    @classmethod
    def this(cls, environ: Mapping[str, str]) -> Machine:
        """This machine. Blocking."""
        places = [entry for entry in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
        return cls(
            sys.platform,
            platform.machine().lower(),
            _glibc(),
            _distributions(),
            tuple(map(Path, [*places, *_LIBRARIES])),
        )

    def flavour(self) -> str:
        """The flavour for this machine. Raises InstallError."""
        if self.processor not in ("x86_64", "amd64") or self.system not in ("linux", "win32"):
            raise InstallError(
                f"there is no release of OpenVINO Model Server for {self.system} on {self.processor}, only for Linux "
                "and Windows on x86-64. Set engine.backend to embedded"
            )
        if self.system == "win32":
            return "windows"
        able = [name for name, flavour in _FLAVOURS.items() if flavour.glibc <= self.glibc]
        if not able:
            raise InstallError(
                f"OpenVINO Model Server needs glibc 2.34 or newer; this machine has {self.glibc[0]}.{self.glibc[1]}. "
                "Set engine.backend to embedded, or name a build of your own in engine.archives"
            )
        return "redhat" if self.distributions & _RED_HATS else able[0]

    def has_python_for(self, flavour: str) -> bool:
        """Whether the machine has the Python library that the archive loads. On Windows the archive contains it."""
        known = _FLAVOURS.get(flavour)
        return known is None or any((place / known.python).exists() for place in self.libraries)


def release_archive(version: str, flavour: str, mirror: str, checksums: str, *, with_python: bool) -> Archive:
    """The archive of release `version`, such as 2026.3. Raises InstallError.

    A `mirror` is laid out as the original: <mirror>/v<version>/<file>. The digest comes from `checksums`, else from a
    mirror's v<version>/SHA256SUMS, else from GitHub.
    """
    found = _VERSION.fullmatch(version)
    numbers = (int(found[1]), int(found[2]), int(found[3] or 0)) if found else (0, 0, 0)
    if numbers < _OLDEST:
        raise InstallError(
            f"engine.version: {version} is not a known release of OpenVINO Model Server; name one from "
            f"2026.1 on, such as {RELEASE}, or the archive itself in engine.archives"
        )
    tag = "v" + ".".join(map(str, numbers if numbers[2] else numbers[:2]))
    base = mirror.rstrip("/") or _DOWNLOADS
    end = "zip" if flavour == "windows" else "tar.gz"
    name = f"ovms_{flavour}_{'.'.join(map(str, numbers))}_python_{'on' if with_python else 'off'}.{end}"
    digests = checksums or (f"{base}/{tag}/SHA256SUMS" if mirror else f"{_DIGESTS}/{tag}")
    system = "windows" if flavour == "windows" else "linux"
    return Archive(f"{base}/{tag}/{name}", system, "amd64", checksums=digests)


def missing_library(words: str) -> str:
    """The remedy for an error of the system's loader in the output `words`; "" if it has no such error."""
    if lacking := _UNLOADED.search(words):
        name = lacking[1]
        if name.startswith("libpython"):
            package = name.removesuffix(".so.1.0")
            return (
                f"{name} is missing on this machine. Install {package} (Debian, Ubuntu) or {package[3:]}-libs (Red "
                "Hat), or set engine.ovms_python to off"
            )
        return f"{name} is missing on this machine. Install the package {_PACKAGES.get(name, 'that has it')}"
    if older := _TOO_OLD.search(words):
        return f"it needs {older[1]}, and this system is older. Choose another engine.ovms_flavour"
    return ""


def _glibc() -> tuple[int, int]:
    name, version = platform.libc_ver()
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found and name == "glibc" else (0, 0)


def _distributions() -> frozenset[str]:
    try:
        fields = platform.freedesktop_os_release()
    except OSError:
        return frozenset()
    return frozenset(f"{fields['ID']} {fields.get('ID_LIKE', '')}".lower().split())
