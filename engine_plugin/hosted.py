"""Where the parts are put together: plugin.yaml → engine → Plugin → services.

`python -m engine_plugin.hosted` is what a host spawns (by the launcher in bin/<os>-<arch>/); `build` is for whoever
serves the same plugin in another way (`engine-plugin serve`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.goplugin import serve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.goplugin.handshake import HostEnv
    from engine_plugin.manifest import Manifest
    from engine_plugin.plugin import Plugin
    from engine_plugin.rpc.server import RpcService

__all__ = ["BuiltPlugin", "build", "main"]


class BuiltPlugin:
    """A plugin ready to be served; `aclose` stops its engine."""

    def __init__(self, plugin: Plugin, services: Sequence[RpcService]) -> None:
        self.plugin = plugin
        self.services = services

    async def aclose(self) -> None:
        """Stop the engine for good."""
        await self.plugin.aclose()


def build(manifest: Manifest) -> BuiltPlugin:
    """The plugin that a manifest describes. Raises ManifestError or UnsupportedError; starts nothing."""
    from engine_plugin.engines.base import engine_class
    from engine_plugin.plugin import Plugin
    from engine_plugin.rpc.servicer import provider_service

    plugin = Plugin(manifest, engine_class(manifest.engine_name)(manifest))
    return BuiltPlugin(plugin, (provider_service(plugin),))


async def _load(_host: HostEnv) -> BuiltPlugin:
    return _from_here()


def _from_here() -> BuiltPlugin:
    """The plugin of the nearest plugin.yaml. Blocks for some milliseconds, before anything is served."""
    from engine_plugin.goplugin.handshake import engine_environ
    from engine_plugin.manifest import find_manifest, load_manifest

    # What the host told the plugin is not for the engine, which inherits our environment.
    for name in set(os.environ) - set(engine_environ(os.environ)):
        del os.environ[name]
    # AOG runs us in <plugin>/bin; a host of another mind may run us anywhere.
    return build(load_manifest(find_manifest((Path.cwd(), Path(sys.argv[0]).resolve().parent))))


def main() -> int:
    """Be a host's plugin. Returns the exit status."""
    return serve.run(_load)


if __name__ == "__main__":
    sys.exit(main())
