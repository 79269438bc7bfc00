"""The options in plugin.yaml's `engine:` section for the software of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine_plugin.download.source import without_secrets

__all__ = ["Archive", "SoftwareOptions"]


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive of a release. All archives for the same machine and accelerator are installed together.

    Also an entry of `engine.archives` in plugin.yaml. `os` and `arch` have the values of `platforms`.
    """

    url: str
    """An http(s) or file:// URL, or a path."""
    os: str = field(default="", metadata={"choices": ("", "linux", "darwin", "windows")})
    """Empty: any."""
    arch: str = field(default="", metadata={"choices": ("", "amd64", "arm64")})
    """Empty: any."""
    accelerator: str = "cpu"
    sha256: str = field(default="", metadata={"pattern": r"(sha256:)?[0-9a-fA-F]{64}", "form": "64 hex digits"})
    size: int = field(default=0, metadata={"min": 0})
    """The size in bytes; 0: unknown."""
    checksums: str = ""
    """URL or path of a checksum file, for an archive without `sha256`; empty: URL.sha256."""

    @property
    def label(self) -> str:
        """The URL without credentials, for messages and records."""
        return without_secrets(self.url)


@dataclass(frozen=True, slots=True)
class SoftwareOptions:
    """What to install and where it comes from: the same keys of plugin.yaml for every engine."""

    version: str = ""
    """What InstallEngine and UpgradeEngine install; empty: the one that goes with this version of engine-plugin."""

    archives: tuple[Archive, ...] = ()
    """A release of one's own in the place of the project's: what to install on which machine."""

    mirror: str = ""
    """Where the project's releases are copied to, as <mirror>/<tag>/<file>."""

    checksums: str = ""
    """URL or path of a file with the SHA-256 of a release's archives; empty: where the project, or the mirror, has
    them."""

    verify: bool = True
    """Whether an archive without a known SHA-256 is refused."""

    offline: bool = False
    """Never touch the network to install: everything is looked for in <data_dir>/software/offline."""
