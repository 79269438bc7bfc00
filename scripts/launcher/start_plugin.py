"""Runs the plugin from the directory that it was built into. The launcher in bin/ starts this file."""

import os
import sys

BUILT_FOR = "@MINOR@"
PACKAGES = r"@PACKAGES@"
CHECKED, PARSED = "checked-plugin.yaml", "checked-plugin.json"


def main() -> int:
    """Serve the host that started this process; the exit code."""
    running = "{}.{}".format(*sys.version_info[:2])
    if running != BUILT_FOR:
        sys.exit(f"[ERROR] this plugin was built for Python {BUILT_FOR}, not {running} ({sys.executable})")
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.normpath(os.path.join(here, PACKAGES)))
    plugin_dir = os.path.dirname(here)
    early, parsed = None, ""
    if is_as_built(plugin_dir, here):
        from engine_plugin.goplugin.early import announce_early

        early = announce_early(os.environ)
        parsed = f"{here}/{PARSED}"
    try:
        from engine_plugin.system.deferred import UNUSED, defer

        defer(*UNUSED)
        from engine_plugin.app import main as serve

        return serve(plugin_dir, early, parsed)
    except ImportError as error:
        sys.exit(f"[ERROR] the plugin is incomplete: {error}. Build or install it again")
    finally:
        if early is not None:
            early.close()


def is_as_built(plugin_dir: str, lib: str) -> bool:
    """Whether plugin.yaml is the one that was checked when the plugin was built, to the byte."""
    try:
        with (
            open(os.path.join(plugin_dir, "plugin.yaml"), "rb") as now,
            open(os.path.join(lib, CHECKED), "rb") as then,
        ):
            return now.read() == then.read()
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(main())
