"""Builds the plugin: plugin.yaml → engine → Plugin → gRPC services.

A host spawns `python -m engine_plugin.app` (by the launcher in bin/<os>-<arch>/); `engine-plugin serve` calls
`build`.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin import PLUGIN_DIR
from engine_plugin.goplugin import serve
from engine_plugin.protocol.handshake import COOKIE
from engine_plugin.server.seam import HostedPlugin
from engine_plugin.system.deferred import UNUSED, defer
from engine_plugin.system.utf8 import begin_in_utf8

if TYPE_CHECKING:
    from engine_plugin.goplugin.early import EarlyListener
    from engine_plugin.manifest import Manifest

__all__ = ["build", "from_here", "main"]


def build(manifest: Manifest) -> HostedPlugin:
    """Build the plugin that a manifest describes. Starts no process.

    Raises ManifestError, UnsupportedError, or PreconditionError for a data directory that cannot be trusted.
    """
    from engine_plugin.engines.base import engine_class
    from engine_plugin.plugin import Plugin
    from engine_plugin.server.hosts import host_of
    from engine_plugin.server.servicer import provider_service
    from engine_plugin.system.trust import require_data_dir

    require_data_dir(manifest.data_dir)
    plugin = Plugin(manifest, engine_class(manifest.engine_name)(manifest))
    return HostedPlugin((provider_service(plugin, host_of(os.environ)),), plugin.aclose)


def from_here(plugin_dir: Path | None, parsed: Path | None = None) -> HostedPlugin:
    """Build the plugin of this program; `plugin_dir` is its directory, if known. Blocks for some milliseconds.

    `parsed` is the content of the manifest in that directory, if known. Raises ManifestError or UnsupportedError.
    """
    from engine_plugin.goplugin.handshake import engine_environ
    from engine_plugin.manifest import load_manifest

    # The host's variables for the plugin are not for the engine, which inherits this environment.
    for name in set(os.environ) - set(engine_environ(os.environ, COOKIE)):
        del os.environ[name]
    file = _manifest_file(plugin_dir)
    return build(load_manifest(file, parsed=parsed if file.parent == plugin_dir else None))


def _manifest_file(plugin_dir: Path | None) -> Path:
    """The manifest to serve. The working directory comes last: it may belong to another plugin or user."""
    from engine_plugin.manifest import find_manifest, manifest_file

    log = logging.getLogger(__name__)
    override = Path(os.environ.get(PLUGIN_DIR, ""))
    if override.is_absolute():  # a plugin's name, which only the command line accepts
        log.info("serving %s, which %s names", override, PLUGIN_DIR)
        return manifest_file(override) or override / "plugin.yaml"
    if plugin_dir is not None and (own := manifest_file(plugin_dir)):
        return own
    package = Path(__file__).parent
    program = Path(sys.argv[0]).resolve().parent
    # `python -m engine_plugin.app` belongs to no plugin; beside it lies only the default plugin's manifest.
    places = (Path.cwd(), program) if program == package else (program, Path.cwd())
    return find_manifest(places, passed_over=log.warning)


def main(plugin_dir: str = "", early: EarlyListener | None = None, parsed: str = "") -> int:
    """Serve a host. Returns the exit status.

    `plugin_dir` is the plugin's directory, which the launcher of a built plugin passes. Without it, the manifest is
    searched from the program's directory upwards. `early` is where the plugin listens if it is announced already, and
    `parsed` the file of `manifest.write_parsed`, if plugin.yaml has not changed since that was written.
    """
    begin_in_utf8()
    defer(*UNUSED)
    gc.disable()
    os.umask(0o077)  # all files created from here on, also by engines, are for this user only

    async def load() -> HostedPlugin:
        try:
            return from_here(Path(plugin_dir) if plugin_dir else None, Path(parsed) if parsed else None)
        finally:  # what was imported stays, so no collection needs to look at it
            gc.freeze()
            gc.enable()

    return serve.run(load, COOKIE, early)


if __name__ == "__main__":
    sys.exit(main())
