"""Installing Python packages into a directory of their own, with the pip that comes with us. Never with sudo."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.engines.processes import python
from engine_plugin.errors import InstallError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.base import Progress

__all__ = ["install_packages"]

_TOLD = ("Collecting", "Downloading", "Installing", "Using cached")
_LAST_WORDS = 4


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
    said: list[str] = []

    def tell(line: str) -> None:
        text = line.strip()
        if text:
            said.append(text)
        if text.startswith(_TOLD):
            progress(text.partition(" (from")[0])

    try:
        status = await python.run_telling([*argv, *requirements], python.module_environ(environ, _pip_home()), tell)
    except OSError as error:
        raise InstallError(f"pip cannot be run: {error.strerror or error}") from error
    if status != 0:
        fix = f"Put the wheels into {wheels}" if wheels else "Check the network, or pip's own settings (`pip config`)"
        raise InstallError(f"pip could not install it: {' | '.join(said[-_LAST_WORDS:])}. {fix}")


def _pip_home() -> Path:
    """The directory that holds pip, which may lie beside this package only (a built plugin directory)."""
    spec = importlib.util.find_spec("pip")
    if spec is None or spec.origin is None:
        raise InstallError(
            f"pip is missing in {sys.executable}: install it (python -m ensurepip), or the packages themselves"
        )
    return Path(os.fspath(spec.origin)).parent.parent
