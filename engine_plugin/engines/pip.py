"""Installing Python packages into a directory of their own, with the pip that comes with us. Never with sudo."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.engines import python
from engine_plugin.engines.child import ChildProcess
from engine_plugin.errors import InstallError
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.base import Progress

__all__ = ["install_packages"]

_TOLD = ("Collecting", "Downloading", "Installing", "Using cached")
_LAST_WORDS = 4
_DRAIN = 0.5


async def install_packages(
    target: Path,
    requirements: Sequence[str],
    environ: Mapping[str, str],
    progress: Progress,
    *,
    wheels: Path | None = None,
) -> None:
    """Install wheels into `target`. `requirements` are pip's arguments: names, or `-r` and a file.

    With `wheels` nothing but that directory is looked at. Raises InstallError with pip's last words.
    """
    argv = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "--target"]
    argv += [str(target), "--only-binary", ":all:", "--progress-bar", "off", "--no-warn-conflicts"]
    if wheels is not None:
        argv += ["--no-index", "--find-links", str(wheels)]
    said = _Said(progress)
    try:
        status = await _run([*argv, *requirements], python.module_environ(environ, _pip_home()), said)
    except OSError as error:
        raise InstallError(f"pip cannot be run: {error.strerror or error}") from error
    if status != 0:
        fix = f"Put the wheels into {wheels}" if wheels else "Check the network, or pip's own settings (`pip config`)"
        raise InstallError(f"pip could not install it: {' | '.join(said.lines[-_LAST_WORDS:])}. {fix}")


async def _run(argv: Sequence[str], environ: Mapping[str, str], said: _Said) -> int:
    child = await ChildProcess.spawn(argv, environ, said.take)
    try:
        child.close_stdin()
        await asyncio.wait({child.exited})
        await comes_true(child.drained.wait(), within=_DRAIN)
    finally:
        await child.kill()
    return child.exited.result()


class _Said:
    """What pip prints, line by line; some of it is progress."""

    def __init__(self, progress: Progress) -> None:
        self.lines: list[str] = []
        self._progress = progress
        self._rest: dict[int, bytes] = {}

    def take(self, stream: int, data: bytes) -> None:
        """Take bytes as they come."""
        *lines, self._rest[stream] = (self._rest.get(stream, b"") + data).split(b"\n")
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if text:
                self.lines.append(text)
            if text.startswith(_TOLD):
                self._progress(text.partition(" (from")[0])


def _pip_home() -> Path:
    """The directory that holds pip, which may lie beside this package only (a built plugin directory)."""
    spec = importlib.util.find_spec("pip")
    if spec is None or spec.origin is None:
        raise InstallError(
            f"pip is missing in {sys.executable}: install it (python -m ensurepip), or the packages themselves"
        )
    return Path(os.fspath(spec.origin)).parent.parent
