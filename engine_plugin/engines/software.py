"""What engines' drivers share to find, install and try their software.

Knows no engine: a driver says which packages and archives there are, and what makes an installation usable.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from engine_plugin.download.disk import check_room
from engine_plugin.engines.install import Installation, Steps
from engine_plugin.engines.pip import install_packages
from engine_plugin.engines.releases import DownloadRules, Downloads
from engine_plugin.errors import DownloadError, EnginePluginError, InstallError
from engine_plugin.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from engine_plugin.engines.base import Progress
    from engine_plugin.engines.releases import Archive

__all__ = ["Moves", "Workshop", "find_program", "pinned", "version_in"]

_BackendT = TypeVar("_BackendT")
_PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
_BLOCK = re.compile(r"^(?=\S)", re.MULTILINE)


@dataclass(frozen=True)
class Moves(Generic[_BackendT]):
    """What the driver does for an installation."""

    trial: Callable[[_BackendT], Awaitable[None]]
    """Starts new software beside what runs, asks it something, and ends it. Raises EnginePluginError."""

    adopt: Callable[[], Awaitable[None]]
    """Has a running engine use what is installed now. Raises EnginePluginError when it does not come up."""


class Workshop:
    """Fills directories below `root` with software, and switches to it. Owned by a driver's Software.

    `requirements` is the driver's pip file: every package with version and hashes.
    """

    def __init__(
        self, root: Path, requirements: Path, environ: Mapping[str, str], *, offline: bool, verify: bool
    ) -> None:
        self.root = root
        self.installation = Installation(root)
        self._requirements = requirements
        self._environ = environ
        self._offline = offline
        self._verify = verify
        self._shelf = root / "offline"
        self._downloads = Downloads(root / "downloads", DownloadRules(self._shelf, offline, verify))

    async def install_packages(
        self,
        target: Path,
        progress: Progress,
        *,
        only: Collection[str] = (),
        without: Collection[str] = (),
        also: Sequence[str] = (),
    ) -> None:
        """pip's packages of the requirements: all, only some, or all but some. Raises InstallError.

        By hash, except with `also`, which names further ones of any version.
        """
        lines = await in_thread(_some_of, self._requirements, only, without)
        if also:
            lines = "\n".join([*(line.rstrip(" \\") for line in lines.splitlines() if "--hash=" not in line), *also])
        chosen = self.root / f"{target.parent.name}-{target.name}.requirements.txt"
        try:
            await in_thread(chosen.write_text, lines, encoding="utf-8")
            hashes = [] if also else ["--require-hashes"]
            await self.install_named(target, [*hashes, "-r", str(chosen)], progress)
        finally:
            await in_thread(chosen.unlink, missing_ok=True)

    async def install_named(self, target: Path, arguments: Sequence[str], progress: Progress) -> None:
        """What pip makes of `arguments`. Raises InstallError."""
        wheels = self._shelf if self._offline else None
        await install_packages(target, arguments, self._environ, progress, wheels=wheels)

    async def unpack(self, archives: Sequence[Archive], target: Path, progress: Progress) -> None:
        """Fetch and verify archives, and unpack them into the new directory `target`. Raises InstallError."""
        from engine_plugin.engines.archives import unpack  # not before the handshake

        files = [await self._downloads.get(archive, progress) for archive in archives]
        progress(f"unpacking {', '.join(archive.label.rpartition('/')[2] for archive in archives)}")
        try:
            await unpack(files, target)
        except InstallError:
            if not self._verify:  # else what was fetched is what was meant, and serves the next attempt
                await self._downloads.clear()
            raise

    async def require_room(self, folder: Path, size: int, what: str) -> None:
        """Raises InstallError when `folder`'s disk has less than `size` bytes for `what`."""
        try:
            await in_thread(check_room, folder, size, what)
        except DownloadError as error:
            raise InstallError(str(error)) from error

    async def replace(self, steps: Steps, progress: Progress) -> bool:
        """`Installation.replace`, after which what was downloaded is deleted."""

        async def adopt() -> None:
            await steps.adopt()
            await self._downloads.clear()

        return await self.installation.replace(
            Steps(fill=steps.fill, check=steps.check, adopt=adopt, needless=steps.needless), progress
        )

    @staticmethod
    async def proved(
        name: str,
        backend: _BackendT,
        probe: Callable[[_BackendT], Awaitable[dict[str, Any]]],
        moves: Moves[_BackendT],
    ) -> str:
        """Run a new installation, and have it answer: its version. Raises InstallError when it does not."""
        try:
            version = str((await probe(backend))["version"])
            await moves.trial(backend)
        except InstallError:
            raise
        except EnginePluginError as error:
            raise InstallError(f"the new {name} does not run, nothing was changed: {error}") from error
        return version


def find_program(folder: Path, name: str) -> Path:
    """The program `name` in what was unpacked, the one that lies highest, executable. Raises InstallError.

    `name` is without .exe. Blocking.
    """
    name = f"{name}.exe" if sys.platform == "win32" else name
    found = [path for path in folder.rglob(name) if path.is_file()]
    if not found:
        raise InstallError(f"there is no {name} in what was unpacked: engine.archives names something else")
    program = min(found, key=lambda path: (len(path.parts), path))
    program.chmod(program.stat().st_mode | 0o111)  # a .zip may have lost that
    return program


def version_in(path: Sequence[str] | None, name: str) -> str:
    """The version of a distribution in `path` (None: where this Python looks), "" when it is not there. Blocking."""
    places = sys.path if path is None else list(path)
    found = importlib.metadata.distributions(name=name, path=places)
    return next((distribution.version for distribution in found), "")


def pinned(requirements: Path) -> dict[str, str]:
    """The versions in a pip file by name. Blocking."""
    return dict(_PINNED.findall(requirements.read_text(encoding="utf-8")))


def _some_of(requirements: Path, only: Collection[str], without: Collection[str]) -> str:
    blocks = _BLOCK.split(requirements.read_text(encoding="utf-8"))
    named = [(block.partition("==")[0], block) for block in blocks]
    return "".join(block for name, block in named if name not in without and (not only or name in only))
