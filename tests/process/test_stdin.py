"""The package's programs read their stdin from a descriptor that no library uses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import engine_plugin

pytestmark = pytest.mark.promise("U11")

ENGINES = Path(engine_plugin.__file__).parent / "engines"
READS_STDIN = re.compile(r"\bsys\.stdin\b|\b(?:os\.read|receive|Inbox)\(0\b")
PROGRAM = """
import os, sys, threading
from engine_plugin.process.entry import own_stdin, read_settings

stdin = own_stdin()
settings = read_settings(stdin)
heard = []
reader = threading.Thread(target=lambda: heard.append(os.read(stdin, 100)))
reader.start()
standard, null = os.fstat(0), os.stat(os.devnull)
print(os.read(0, 1) == b"" and (standard.st_mode, standard.st_rdev) == (null.st_mode, null.st_rdev), flush=True)
reader.join()
print(settings["a"], heard[0].decode(), sys.stdin.read() == "")
"""


def test_standard_input_becomes_the_null_device_while_a_thread_reads_the_original() -> None:
    command = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write(b'{"a": 1}\n')
        program.stdin.flush()
        assert program.stdout.readline().split() == [b"True"]  # and the thread waits in its read meanwhile
        program.stdin.write(b"later")
        program.stdin.flush()
        assert program.stdout.read().split() == [b"1", b"later", b"True"]


def test_engine_programs_do_not_read_descriptor_0() -> None:
    """Except the guard, which runs on systems that do not need this."""
    reading = [path.name for path in ENGINES.rglob("*.py") if READS_STDIN.search(path.read_text(encoding="utf-8"))]
    assert reading == []
