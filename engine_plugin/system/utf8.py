"""File names and output in UTF-8, whatever the locale says."""

from __future__ import annotations

import io
import os
import sys

__all__ = ["begin_in_utf8", "speak_utf8"]


def begin_in_utf8() -> None:
    """Begin this process anew in Python's UTF-8 mode where its locale gave file names another encoding.

    In such a one (LC_ALL=C with PYTHONUTF8=0) paths with other than ASCII letters can be in no message. Called first
    thing by a program. The process keeps its number.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def speak_utf8() -> None:
    """Read and write UTF-8 at pipes and files (Windows' code pages lack most letters); a terminal keeps its encoding.

    What an encoding lacks is written as a question mark.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
