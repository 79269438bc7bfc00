"""The options of engines whose software this plugin installs, in plugin.yaml's `engine:` section."""

from __future__ import annotations

from dataclasses import dataclass

from engine_plugin.engines.local.server import ServerOptions
from engine_plugin.install.releases import Archive  # noqa: TC001  # read_options evaluates the hints

__all__ = ["SoftwareOptions"]


@dataclass(frozen=True, slots=True)
class SoftwareOptions(ServerOptions):
    """What to install and where it comes from: the same keys for every engine."""

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
