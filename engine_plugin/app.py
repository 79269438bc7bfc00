"""Where the parts are put together: plugin.yaml → engine → Plugin → services.

`python -m engine_plugin.app` is what a host spawns (by the launcher in bin/<os>-<arch>/); `build` is for whoever
serves the same plugin in another way (`engine-plugin serve`).
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import PLUGIN_DIR
from engine_plugin.goplugin import serve
from engine_plugin.system.utf8 import begin_in_utf8

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.goplugin.handshake import HostEnv
    from engine_plugin.manifest import Manifest
    from engine_plugin.plugin import Plugin
    from engine_plugin.server.seam import RpcService

__all__ = ["BuiltPlugin", "build", "from_here", "main"]


class BuiltPlugin:
    """A plugin ready to be served; `aclose` stops its engine."""

    def __init__(self, plugin: Plugin, services: Sequence[RpcService]) -> None:
        self.plugin = plugin
        self.services = services

    async def aclose(self) -> None:
        """Stop the engine for good."""
        await self.plugin.aclose()


def build(manifest: Manifest) -> BuiltPlugin:
    """The plugin that a manifest describes; starts nothing.

    Raises ManifestError, UnsupportedError, or PreconditionError for a data directory that cannot be trusted.
    """
    from engine_plugin.engines.base import engine_class
    from engine_plugin.plugin import Plugin
    from engine_plugin.server.hosts import host_of
    from engine_plugin.server.servicer import provider_service
    from engine_plugin.system.trust import require_data_dir

    require_data_dir(manifest.data_dir)
    plugin = Plugin(manifest, engine_class(manifest.engine_name)(manifest))
    return BuiltPlugin(plugin, (provider_service(plugin, host_of(os.environ)),))


def from_here(plugin_dir: Path | None) -> BuiltPlugin:
    """The plugin of this program; `plugin_dir` is its directory, if known. Blocks for some milliseconds.

    Raises ManifestError or UnsupportedError.
    """
    from engine_plugin.goplugin.handshake import engine_environ
    from engine_plugin.manifest import load_manifest

    # What the host told the plugin is not for the engine, which inherits our environment.
    for name in set(os.environ) - set(engine_environ(os.environ)):
        del os.environ[name]
    return build(load_manifest(_manifest_file(plugin_dir)))


def _manifest_file(plugin_dir: Path | None) -> Path:
    """The manifest to serve. The working directory counts last: it may be another plugin's or user's."""
    from engine_plugin.manifest import find_manifest, manifest_file

    log = logging.getLogger(__name__)
    override = Path(os.environ.get(PLUGIN_DIR, ""))
    if override.is_absolute():  # a mere name is meant for the command line
        log.info("serving %s, which %s names", override, PLUGIN_DIR)
        return manifest_file(override) or override / "plugin.yaml"
    if plugin_dir is not None and (own := manifest_file(plugin_dir)):
        return own
    package = Path(__file__).parent
    program = Path(sys.argv[0]).resolve().parent
    # `python -m engine_plugin.app` is no plugin's program; its own place has only the default plugin's manifest.
    places = (Path.cwd(), program) if program == package else (program, Path.cwd())
    return find_manifest(places, passed_over=log.warning)


def main(plugin_dir: str = "") -> int:
    """Be a host's plugin. Returns the exit status.

    `plugin_dir` is the plugin's directory; the launcher of a built plugin knows it. Without one, the manifest is
    looked for from the program on upwards.
    """

    begin_in_utf8()
    os.umask(0o077)  # whatever is made from here on, by engines too, is for this user only

    async def load(_host: HostEnv) -> BuiltPlugin:
        return from_here(Path(plugin_dir) if plugin_dir else None)

    return serve.run(load)


if __name__ == "__main__":
    sys.exit(main())
