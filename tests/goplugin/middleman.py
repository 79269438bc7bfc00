"""A host for the tests to kill: starts the plugin, prints its first line and waits for ever."""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    plugin = subprocess.Popen([sys.executable, "-m", "tests.goplugin.plugin"], stdout=subprocess.PIPE)
    if plugin.stdout is None:
        raise SystemExit("no pipe")
    sys.stdout.buffer.write(plugin.stdout.readline())
    sys.stdout.buffer.flush()
    plugin.wait()
