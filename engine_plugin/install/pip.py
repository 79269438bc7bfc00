"""Installing Python packages into a directory of their own, with the pip that comes with us. Never with sudo."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.download.disk import NO_ROOM, disk_reason
from engine_plugin.download.events import ChunkProgress
from engine_plugin.errors import InstallError
from engine_plugin.install.pipsettings import pip_environ
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.base import Progress

__all__ = ["install_packages"]

_LAST_WORDS = 4
_FILE = re.compile(r"Downloading (?:\S*/)?([^\s/]+)")
_ARRIVED = re.compile(r"Progress (\d{1,18}) of (\d{1,18})")
_INSTALLING = re.compile(r"Installing collected packages: (.+)")
_ERRNO = re.compile(r"\[Errno (\d{1,4})\]")


async def install_packages(
    target: Path,
    requirements: Sequence[str],
    environ: Mapping[str, str],
    progress: Progress,
    *,
    scratch: Path,
    wheels: Path | None = None,
) -> None:
    """Install wheels into `target`. `requirements` are pip's arguments: names, or `-r` and a file.

    pip keeps its temporary files in `scratch`, a directory on the same disk that the caller removes. With `wheels`
    nothing but that directory is looked at. `progress` gets the bytes of each download, by the file's name.
    Raises InstallError with pip's last words.
    """
    home = _pip_home()
    argv = python.module_command("pip", "install", "--no-input", "--disable-pip-version-check", "--target")
    argv += [str(target), "--only-binary", ":all:", "--progress-bar", "raw", "--no-warn-conflicts"]
    if wheels is not None:
        argv += ["--no-index", "--find-links", str(wheels)]
    output = _Output(progress)
    try:
        env = {**await pip_environ(environ, home), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
        status = await python.run_telling([*argv, *requirements], env, output.take)
    except OSError as error:
        raise InstallError(f"pip cannot be run: {error.strerror or error}") from error
    if status != 0:
        fix = f"Put the wheels into {wheels}" if wheels else "Check the network, or pip's own settings (`pip config`)"
        if full := output.errnos & NO_ROOM:
            number = full.pop()
            reason = disk_reason(OSError(number, os.strerror(number)), scratch)
            fix = f"{target}: {reason}. Free some space there or in pip's cache, or move the data directory"
        raise InstallError(f"pip could not install it: {output.last_words()}. {fix}")


class _Output:
    """pip's output, line by line: its downloads become progress, its last lines the reason of a failure."""

    def __init__(self, progress: Progress) -> None:
        self.errnos: set[int] = set()
        self._progress = progress
        self._file = ""
        self._said: list[str] = []

    def take(self, line: str) -> None:
        """Called with each line of stdout and stderr."""
        text = line.strip()
        if arrived := _ARRIVED.fullmatch(text):
            self._progress(ChunkProgress(self._file, int(arrived[1]), int(arrived[2])))
            return
        if file := _FILE.match(text):
            self._file = file[1]
        elif packages := _INSTALLING.fullmatch(text):
            self._progress(f"installing {packages[1]}")
        if text:
            self._said = [*self._said[1 - _LAST_WORDS :], text]
            self.errnos |= {int(number) for number in _ERRNO.findall(text)}

    def last_words(self) -> str:
        """What pip said at the end."""
        return " | ".join(self._said)


def _pip_home() -> Path:
    """The directory that holds pip, which may lie beside this package only (a built plugin directory)."""
    spec = importlib.util.find_spec("pip")
    if spec is None or spec.origin is None:
        raise InstallError(
            f"pip, which engine-plugin depends on, is not beside it ({sys.executable}). Install engine-plugin again, "
            "with its dependencies"
        )
    return Path(os.fspath(spec.origin)).parent.parent
