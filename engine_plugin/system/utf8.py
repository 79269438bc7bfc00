"""File names and output in UTF-8, whatever the locale says."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["begin_in_utf8", "speak_utf8"]


def begin_in_utf8() -> None:
    """Restart this process in Python's UTF-8 mode if its locale gives file names another encoding.

    In such a locale (LC_ALL=C with PYTHONUTF8=0) messages could not quote paths beyond ASCII. Called first by a
    program. The process keeps its pid.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def speak_utf8() -> None:
    """Read and write UTF-8 at pipes and files (Windows' code pages lack most letters). A terminal keeps its encoding.

    Characters that its encoding lacks are written as question marks.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
