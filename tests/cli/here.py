"""Runs a command in the tests' own process, without a start of Python each time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from io import TextIOWrapper
from typing import TYPE_CHECKING

import pytest

from engine_plugin import waiting
from engine_plugin.cli import advice, main
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["run_here"]


def run_here(
    arguments: Sequence[str], env: Mapping[str, str], cwd: Path, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, with files for its standard streams. What it spawns are processes as ever.

    Not for `-v`, which sets up logging, nor for `serve`, which takes the signals.
    """
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
        pytest.MonkeyPatch.context() as patch,
    ):
        given.write(stdin)
        given.seek(0)
        streams = [TextIOWrapper(file, encoding="utf-8", newline="") for file in (given, stdout, stderr)]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        patch.chdir(cwd)
        for name in set(os.environ) - set(env):
            patch.delenv(name)
        for name, value in env.items():
            patch.setenv(name, value)
        places = env.get("PYTHONPATH", "").split(os.pathsep)
        patch.setattr(sys, "path", [*filter(None, places), *sys.path])
        patch.setattr(sys, "argv", [main.__file__, *arguments])
        # `serve` would install a child watcher that forgets the children of every loop but the latest.
        patch.setattr(waiting, "watch_children_without_threads", lambda: None)
        advice.program.cache_clear()
        try:
            with pytest.raises(SystemExit) as end:
                main.main(arguments)
        finally:
            advice.program.cache_clear()
            _wait_for_readers()
            for stream in streams:
                stream.detach()
        stdout.seek(0)
        stderr.seek(0)
        said = stdout.read(), stderr.read()
    return subprocess.CompletedProcess(["engine-plugin", *arguments], _status(end.value), *said)


def _status(end: SystemExit) -> int:
    assert isinstance(end.code, int)
    return end.code


def _wait_for_readers() -> None:
    """The thread that reads a command's standard input ends with the process, elsewhere."""
    for thread in threading.enumerate():
        if thread.name == "read input":
            thread.join(LIMIT)
