"""What engines' drivers share to find, install and try their software.

Knows no engine: a driver says which packages and archives there are, and what makes an installation usable.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import sys
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from engine_plugin import catalogue
from engine_plugin.download.disk import check_room
from engine_plugin.errors import (
    DownloadError,
    EnginePluginError,
    EngineStartError,
    InstallError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.install.holds import Hold
from engine_plugin.install.pip import install_packages
from engine_plugin.install.releases import DownloadRules, Downloads
from engine_plugin.install.versions import Installation, Steps
from engine_plugin.manifest.paths import is_file
from engine_plugin.process import python
from engine_plugin.protocol.shapes import EngineCheck
from engine_plugin.system.files import in_thread
from engine_plugin.system.programs import noexec_doubt, program_doubt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.install.releases import Archive
    from engine_plugin.system.trust import Doubt

__all__ = [
    "LocalBackend",
    "LocalSoftware",
    "Moves",
    "Workshop",
    "find_program",
    "on_this_machine",
    "pinned",
    "sources",
    "version_in",
    "wanted_backend",
]

_PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
_BLOCK = re.compile(r"^(?=\S)", re.MULTILINE)
_PROBE_TIMEOUT = 60.0
_LAST_WORDS = 500
_TAKES, _TAKE_PAUSE = 50, 0.1


class LocalBackend(Protocol):
    """One usable installation of an engine's software."""

    @property
    def version(self) -> str:
        """Its version, "" while it has not been asked."""

    @property
    def origin(self) -> str:
        """What and where it is, in words."""

    @property
    def executable(self) -> str:
        """The program's path, "" for Python packages."""

    @property
    def site(self) -> Path | None:
        """The directory of Python packages that an installation gave it."""

    @property
    def folder(self) -> Path | None:
        """The installed version of which it needs anything, None when it needs none."""


_BackendT = TypeVar("_BackendT", bound=LocalBackend)


@dataclass(frozen=True)
class Moves(Generic[_BackendT]):
    """What the driver does for an installation."""

    trial: Callable[[_BackendT], Awaitable[None]]
    """Starts new software beside what runs, asks it something, and ends it. Raises EnginePluginError."""

    adopt: Callable[[], Awaitable[None]]
    """Has a running engine use what is installed now. Raises EnginePluginError when it does not come up."""


class LocalSoftware(ABC, Generic[_BackendT]):
    """Finds, installs and probes an engine's software for one data directory. Owned by the engine's driver."""

    engine: ClassVar[str]
    """The engine's name in plugin.yaml, by which it finds its own versions in a data directory of several."""

    def __init__(
        self,
        data_dir: Path,
        requirements: Path,
        environ: Mapping[str, str],
        *,
        offline: bool,
        verify: bool,
        own_archives: bool,
    ) -> None:
        """`requirements` is the driver's pip file: every package with version and hashes. No I/O.

        The others are keys of plugin.yaml (`engines.local.options.SoftwareOptions`).
        """
        self._environ = environ
        self._workshop = Workshop(
            data_dir / "software",
            self.engine,
            requirements,
            environ,
            offline=offline,
            verify=verify,
        )
        self._installation = self._workshop.installation
        self._own_archives = own_archives

    # What a driver says

    @property
    @abstractmethod
    def wanted_version(self) -> str:
        """The version that an installation gives."""

    @abstractmethod
    async def probe(self, backend: _BackendT) -> dict[str, Any]:
        """Run the software once: {"version": …, "devices": a list, or None when it tells none}.

        Raises EngineStartError.
        """

    @abstractmethod
    def _find(self) -> _BackendT | None:
        """The software that plugin.yaml asks for, when it is here. Blocking."""

    @abstractmethod
    def _missing(self) -> str:
        """What is missing when there is none, in words."""

    @abstractmethod
    def _lacks(self, backend: _BackendT) -> str:
        """What keeps the one that is here from being used, in words; "" for nothing. Blocking."""

    @abstractmethod
    def _not_ours(self) -> str:
        """What to do when plugin.yaml asks for software that we do not install; "" when we do."""

    @abstractmethod
    def _archives(self) -> tuple[Archive, ...]:
        """The archives of the wanted release for this machine. Raises InstallError. Blocking."""

    @abstractmethod
    def _up_to_date(self) -> bool:
        """Whether an upgrade has nothing to do. Blocking."""

    @abstractmethod
    async def _replace(self, progress: Progress, moves: Moves[_BackendT], needless: Callable[[], bool]) -> bool:
        """Install the wanted version beside what is here and switch to it. Raises InstallError."""

    # What the driver asks

    @property
    def folder(self) -> Path:
        """Where InstallEngine puts versions."""
        return self._workshop.root

    def check(self) -> EngineCheck:
        """Look for the software without running it. Blocking. Raises PreconditionError as `_find`."""
        backend = self._find()
        if backend is None:
            return EngineCheck(False, self._missing())
        if doubt := _unfit(backend):
            return EngineCheck(False, f"{backend.origin} cannot be used: {doubt}")
        if backend.folder is not None and (damage := self._installation.damage(backend.folder)):
            return EngineCheck(False, f"{backend.origin} cannot run: {damage}")
        if lacking := self._lacks(backend):
            return EngineCheck(False, f"{backend.origin} is here, but {lacking}")
        return EngineCheck(True, f"{backend.origin}, version {backend.version or 'unknown until it runs'}")

    def find(self) -> _BackendT:
        """The backend to run. Raises EngineNotInstalledError, PreconditionError when it cannot or must not be run.

        Blocking.
        """
        backend, check = self._find(), self.check()
        if _unfit(backend):
            raise PreconditionError(check.detail)
        if backend is None or not check.installed:
            advice = "" if backend else self._not_ours()  # what comes with one that is here, we install
            if advice:
                raise catalogue.OWN_SOFTWARE_UNUSABLE.error(found=check.detail, advice=advice)
            raise catalogue.ENGINE_NOT_INSTALLED.error(found=check.detail)
        return backend

    def take(self) -> tuple[_BackendT, Hold]:
        """The backend to run, and what keeps others from removing it while it runs.

        Raises EngineNotInstalledError, PreconditionError, UnavailableError. Blocking.
        """
        for _ in range(_TAKES):
            backend = self.find()
            hold = Hold() if backend.folder is None else self._installation.hold(backend.folder)
            if hold is not None:
                return backend, hold
            time.sleep(_TAKE_PAUSE)  # another version was just switched on, or this one is looked at for removal
        raise UnavailableError(f"{backend.origin} is locked by another program; call StartEngine again later")

    async def sweep(self) -> None:
        """Remove what a killed installation left and versions that are no longer in use."""
        await self._workshop.sweep()

    async def install(self, progress: Progress, moves: Moves[_BackendT], *, cover: bool) -> str:
        """Install below the data directory unless something usable is here. Returns what is usable now.

        Raises InstallError.
        """
        await in_thread(self._require_executable_disk)
        before = self._installation.current()  # read first: what changes after this was done by another process
        check = await in_thread(self.check)
        if check.installed and not cover:
            await self.sweep()
            return check.detail
        present = await in_thread(self._find)
        doubt = await in_thread(_unfit, present)
        if doubt and present is not None and present.folder is None:  # the plugin can replace its own installation
            raise InstallError(check.detail)
        if (advice := self._not_ours()) and present is None:
            raise InstallError(f"{self._missing()}. plugin.yaml asks for one that is here already. {advice}")

        def needless() -> bool:
            return self.check().installed and self._installation.current() != before

        await self._replace(progress, moves, needless)
        return (await in_thread(self.check)).detail

    async def upgrade(self, progress: Progress, moves: Moves[_BackendT]) -> bool:
        """Bring it to the wanted version; False when there was nothing to do. Raises InstallError."""
        await in_thread(self._require_executable_disk)

        def needless() -> bool:
            return self.check().installed and self._up_to_date()

        if await in_thread(needless):
            await self.sweep()
            return False
        return await self._replace(progress, moves, needless)

    # How it is done

    def _require_executable_disk(self) -> None:
        """Refuse, before anything is fetched, a data directory in which nothing could run. Raises InstallError."""
        if doubt := noexec_doubt(self.folder):
            raise InstallError(str(doubt))

    def _source_of(self, archives: Sequence[Archive]) -> str:
        """What is remembered of an installed release, to tell it from another one."""
        return sources(archives, own=self._own_archives)

    def _has_wanted_release(self) -> bool:
        """Whether the archives that are wanted are those installed last. Raises InstallError. Blocking."""
        current = self._installation.current()
        return current is not None and current.facts.get("source") == self._source_of(self._archives())

    async def _run(self, backend: _BackendT, argv: Sequence[str], env: Mapping[str, str]) -> tuple[bytes, bytes]:
        """What the software prints, and complains of, when it is run once. Raises EngineStartError."""
        try:
            status, out, err = await python.run_briefly(argv, env, timeout=_PROBE_TIMEOUT)
        except OSError as error:
            why = f"cannot be run: {error.strerror or error}"
            raise EngineStartError(f"{backend.origin} {why}{self._mending(backend)}") from error
        if status != 0:
            words = (err.strip() or out).decode("utf-8", "replace").strip()
            why = f"does not run {self._explained(status, words)}"
            raise EngineStartError(f"{backend.origin} {why}{self._mending(backend)}")
        return out, err

    def _mending(self, backend: _BackendT) -> str:
        """What to do about an installed version that does not run, as the sentence goes on."""
        current = self._installation.current()
        if backend.folder is None or current is None or backend.folder != current.folder:
            return ""
        return ". If it is damaged, call InstallEngine with cover"

    def _explained(self, status: int, words: str) -> str:
        """Why it does not run, by its exit status and its last words, as the sentence goes on."""
        return f"(exit code {status}): {words[-_LAST_WORDS:]}"


class Workshop:
    """Fills directories below `root` with software, and switches to it. Owned by a driver's Software."""

    def __init__(
        self,
        root: Path,
        engine: str,
        requirements: Path,
        environ: Mapping[str, str],
        *,
        offline: bool,
        verify: bool,
    ) -> None:
        self.root = root
        self.installation = Installation(root, engine)
        self._requirements = requirements
        self._environ = environ
        self._offline = offline
        self._verify = verify
        self._shelf = root / "offline"
        self._downloads = Downloads(root / "downloads", DownloadRules(self._shelf, offline, verify))

    async def sweep(self) -> None:
        """Remove what a killed installation left, downloads too, and versions that are no longer in use."""
        await in_thread(self.installation.sweep, self._downloads.forget_older)

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
        async with self.installation.scratch() as scratch:
            chosen = scratch / "requirements.txt"
            await in_thread(chosen.write_text, lines, encoding="utf-8")
            hashes = [] if also else ["--require-hashes"]
            await self.install_named(target, [*hashes, "-r", str(chosen)], progress)

    async def install_named(self, target: Path, arguments: Sequence[str], progress: Progress) -> None:
        """What pip makes of `arguments`. Raises InstallError."""
        wheels = self._shelf if self._offline else None
        async with self.installation.scratch() as scratch:
            await install_packages(target, arguments, self._environ, progress, scratch=scratch, wheels=wheels)

    async def unpack(self, archives: Sequence[Archive], target: Path, progress: Progress) -> None:
        """Fetch and verify archives, and unpack them into the new directory `target`. Raises InstallError."""
        from engine_plugin.install.archives import unpack  # not before the handshake

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
            raise InstallError.retold(error) from error

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


def wanted_backend(asked: str, named: Mapping[str, object]) -> str:
    """The kind of software that `engine.backend` asks for; in mode auto, what plugin.yaml names is not passed over.

    `named` has what it names by its kind, the first before the second. "auto" when it names nothing.
    """
    return asked if asked != "auto" else next((kind for kind, what in named.items() if what), "auto")


def on_this_machine(name: str, environ: Mapping[str, str]) -> str:
    """The absolute path of the program `name`, a path or a name on PATH; "" when there is none. Blocking.

    A file that is named by its path is found even if it may not be executed: `_unfit` says why. On Windows the
    working directory, which may belong to another user, is not searched for a mere name.
    """
    found = shutil.which(name, path=environ.get("PATH"))
    if found is None:
        named = Path(name)
        return str(named.absolute()) if named.parent.parts and is_file(named) else ""
    program = Path(found).absolute()
    if sys.platform == "win32" and not Path(name).parent.parts and program.parent == Path.cwd():
        return ""
    return str(program)


def _unfit(backend: LocalBackend | None) -> Doubt | None:
    """Why the software cannot be used: its owner, its permissions, or its mount."""
    if backend is None:
        return None
    if backend.executable:
        return program_doubt(Path(backend.executable))
    return None if backend.site is None else noexec_doubt(backend.site)


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


def sources(archives: Sequence[Archive], *, own: bool) -> str:
    """What tells one release from another: `own` archives by place and digest, a project's by its files' names, which
    stay the same by whatever way they come here."""
    if own:
        return " ".join(f"{archive.label}#{archive.sha256}" for archive in archives)
    return " ".join(archive.label.rpartition("/")[2] for archive in archives)


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
