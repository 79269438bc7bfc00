"""A command on a pseudo-terminal: keys in, a screen out, and Ctrl-C sent by the terminal."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Self

from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"

_WHERE = b"\x1b[6n"  # a terminal is asked for the place of its cursor
_ASKING = b"\x1b[?2004h"  # who reads a line wants pastes to be marked
_STYLE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|\][^\x07]*\x07)")
# The terminal becomes that of the process which takes it after it has left its old session.
_TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Screen:
    """A context manager: the command runs on a terminal of its own; leaving it kills what still runs."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, columns: int = 100) -> None:
        self._ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (40, columns))
        self.modes = termios.tcgetattr(theirs)
        self.raw = b""
        """All that was written to the terminal."""
        self._seen = self._prompts = 0
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _TAKE, *command],
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                env={**env, "TERM": "xterm-256color"},
                cwd=cwd,
                start_new_session=True,
            )
        finally:
            self._theirs = theirs  # kept open: the modes can be asked for when the command has ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            if self.process.poll() is None:  # a test has failed
                self.process.terminate()
            self.process.wait(LIMIT)
        finally:
            os.close(self._theirs)
            os.close(self._ours)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def until(self, text: str, seconds: float = LIMIT) -> str:
        """Read until `text` appears (styles aside) behind what the last call has seen; what appeared till then."""
        ends = time.monotonic() + seconds
        while (place := self.plain.find(text, self._seen)) < 0:
            left = ends - time.monotonic()
            assert left > 0, f"{text!r} did not appear: {self._last()}"
            self._read(left)
        seen, self._seen = self._seen, place + len(text)
        return self.plain[seen : self._seen]

    def more(self, count: int, seconds: float = LIMIT) -> None:
        """Wait until so many more bytes have been written, whatever they are."""
        wanted, ends = len(self.raw) + count, time.monotonic() + seconds
        while len(self.raw) < wanted:
            left = ends - time.monotonic()
            assert left > 0, f"it is silent: {self._last()}"
            self._read(left)

    def prompt(self, seconds: float = LIMIT) -> None:
        """Wait until one more line than at the last call has been asked for: what is typed is its then."""
        ends = time.monotonic() + seconds
        while self.raw.count(_ASKING) <= self._prompts:
            left = ends - time.monotonic()
            assert left > 0, f"no prompt: {self._last()}"
            self._read(left)
        self._prompts += 1

    def end(self, seconds: float = LIMIT) -> int:
        """Wait for the command's end; its status. All that it wrote has been read then."""
        ends = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < ends, f"it does not end: {self._last()}"
            self._read(0.02)
        while self._read(0):
            pass
        return self.process.returncode

    @property
    def plain(self) -> str:
        """What was written, without styles and movements of the cursor."""
        return _STYLE.sub("", self.raw.decode(errors="replace"))

    @property
    def modes_now(self) -> list[object]:
        """The terminal's modes, to be compared with `modes`."""
        return termios.tcgetattr(self._theirs)

    def _last(self) -> str:
        return repr(self.plain[self._seen :][-1000:])

    def _read(self, seconds: float) -> bool:
        if not select.select([self._ours], [], [], seconds)[0]:
            return False
        data = os.read(self._ours, 65536)
        self.raw += data
        for _ in range(data.count(_WHERE)):
            os.write(self._ours, b"\x1b[1;1R")
        return True
