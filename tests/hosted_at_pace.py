"""`python -m tests.hosted_at_pace` is engine_plugin.app, with the time limits of its end times TEST_PACE.

A plugin cuts itself off before a go-plugin host would kill it, two seconds after the host has asked for the end. On a
machine that has other work to do, the clock says nothing about the plugin.
"""

from __future__ import annotations

import os
import sys

from engine_plugin.app import main
from tests.goplugin.plugin import set_pace

__all__ = ["HOSTED"]

HOSTED = [sys.executable, "-m", "tests.hosted_at_pace"]

if __name__ == "__main__":
    set_pace(float(os.environ["TEST_PACE"]))
    sys.exit(main(os.getcwd()))  # noqa: PTH109  # else the manifest above this file counts first
