"""Runs the plugin from the directory that it was built into. The launcher in bin/ starts this file."""

import os
import sys

BUILT_FOR = "@MINOR@"
PACKAGES = r"@PACKAGES@"


def main() -> int:
    """Serve the host that started this process; the exit code."""
    running = "{}.{}".format(*sys.version_info[:2])
    if running != BUILT_FOR:
        sys.exit(f"[ERROR] this plugin was built for Python {BUILT_FOR}, not {running} ({sys.executable})")
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, os.path.normpath(os.path.join(here, PACKAGES)))
    from engine_plugin.app import main as serve

    return serve(os.path.dirname(here))


if __name__ == "__main__":
    sys.exit(main())
