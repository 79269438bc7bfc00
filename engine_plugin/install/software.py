"""Finds, installs and checks the software of an engine; shared by the drivers.

A driver provides the packages, the archives and the check of an installation.
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
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

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
from engine_plugin.install.options import SoftwareOptions
from engine_plugin.install.pip import install_packages
from engine_plugin.install.releases import Archive, Downloads
from engine_plugin.install.versions import Installation, InstallSteps
from engine_plugin.manifest.paths import is_file
from engine_plugin.process import python
from engine_plugin.protocol.shapes import EngineCheck
from engine_plugin.system.files import in_thread
from engine_plugin.system.programs import noexec_doubt, program_doubt

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence

    from engine_plugin.engines.base import Progress
    from engine_plugin.system.trust import Doubt

__all__ = [
    "Backend",
    "InstallHooks",
    "LocalSoftware",
    "SoftwareOptions",
    "distribution_version",
    "find_unpacked_program",
    "locate_program",
    "pinned_versions",
    "requested_backend",
]

_PINNED = re.compile(r"^([A-Za-z0-9_.-]+)==([^\s;\\]+)", re.MULTILINE)
_BLOCK = re.compile(r"^(?=\S)", re.MULTILINE)
_PROBE_TIMEOUT = 60.0
_OUTPUT_TAIL = 500
_ACQUIRE_ATTEMPTS, _ACQUIRE_PAUSE = 50, 0.1


_OptionsT = TypeVar("_OptionsT", bound=SoftwareOptions)


@dataclass(frozen=True, slots=True)
class Backend:
    """One usable installation of an engine's software."""

    kind: str
    """Which of the engine's programs or packages it is, by the driver's name."""
    version: str
    """Empty while it is unknown."""
    origin: str
    """A description with the location, for messages."""
    executable: str = ""
    """The path of the program; empty for Python packages."""
    site: Path | None = None
    """The directory of installed Python packages, if it needs one."""
    folder: Path | None = None
    """The directory of the installed version that it needs; None if it needs none."""


@dataclass(frozen=True)
class InstallHooks:
    """The driver's part in an installation."""

    trial: Callable[[Backend], Awaitable[None]]
    """Starts the new software beside the running one, sends it a request and stops it. Raises EnginePluginError."""

    adopt: Callable[[], Awaitable[None]]
    """Switches a running engine to the new software. Raises EnginePluginError if it does not start."""


class LocalSoftware(ABC, Generic[_OptionsT]):
    """The software of an engine in one data directory. Owned by the driver."""

    engine: ClassVar[str]
    """The name of the engine in plugin.yaml, under which its versions are recorded in a shared data directory."""

    title: ClassVar[str]
    """The engine's name in messages."""

    program: ClassVar[str]
    """The name of the program in a release, without .exe."""

    requirements: ClassVar[Path]
    """The driver's pip file with the version and hashes of each package."""

    def __init__(self, options: _OptionsT, data_dir: Path, environ: Mapping[str, str]) -> None:
        """No I/O."""
        self._options = options
        self._environ = environ
        self.folder = data_dir / "software"
        """The directory of the installed versions."""
        self._offline = self.folder / "offline"
        self._installation = Installation(self.folder, self.engine)
        self._downloads = Downloads(
            self.folder / "downloads", self._offline, offline=options.offline, verify=options.verify
        )

    # Provided by the driver

    @property
    @abstractmethod
    def wanted_version(self) -> str:
        """The version to install."""

    @abstractmethod
    async def probe(self, backend: Backend) -> dict[str, Any]:
        """Run the software once: {"version": …, "devices": a list, or None if unknown}. Raises EngineStartError."""

    @abstractmethod
    def _candidates(self) -> Iterator[Backend]:
        """The software on this machine that plugin.yaml selects, in order of preference. Blocking."""

    @abstractmethod
    def _missing(self) -> tuple[str, str]:
        """The message for missing software, and how to install what InstallEngine does not; "" if it does."""

    @abstractmethod
    def _up_to_date(self, backend: Backend) -> bool:
        """Whether the present software is `wanted_version`, or none that the plugin upgrades. Blocking."""

    @abstractmethod
    def _kind(self) -> str:
        """What InstallEngine installs, as recorded in the facts of the version. Blocking."""

    @abstractmethod
    def _archives(self) -> tuple[Archive, ...]:
        """The archives of `wanted_version` for this machine, () for packages. Raises InstallError. Blocking."""

    @abstractmethod
    async def _fill(self, folder: Path, archives: tuple[Archive, ...], progress: Progress) -> None:
        """Install into an empty directory. Raises InstallError."""

    @abstractmethod
    def _installed(self, folder: Path, facts: Mapping[str, str]) -> Backend:
        """The backend that uses the version in `folder`, of which `facts` are known. Blocking.

        Raises InstallError.
        """

    def _missing_parts(self, backend: Backend) -> str:  # noqa: ARG002  # for software with packages
        """The parts that the present software lacks, as a clause; "" if complete. Blocking."""
        return ""

    # Called by the driver

    def check(self) -> EngineCheck:
        """Check the software without running it. Blocking.

        Raises PreconditionError for software that another user could change.
        """
        backend = self._find()
        if backend is None:
            return EngineCheck(False, self._missing()[0])
        if doubt := _doubt(backend):
            return EngineCheck(False, f"{backend.origin} cannot be used: {doubt}")
        if backend.folder is not None and (damage := self._installation.damage(backend.folder)):
            return EngineCheck(False, f"{backend.origin} cannot run: {damage}")
        if lacking := self._missing_parts(backend):
            return EngineCheck(False, f"{backend.origin} is incomplete: {lacking}")
        return EngineCheck(True, f"{backend.origin}, version {backend.version or 'unknown until it runs'}")

    def find(self) -> Backend:
        """The backend to run. Raises EngineNotInstalledError, or PreconditionError if it cannot or must not be run.

        Blocking.
        """
        backend, check = self._find(), self.check()
        if backend is not None and _doubt(backend):
            raise PreconditionError(check.detail)
        if backend is None or not check.installed:
            advice = "" if backend else self._missing()[1]  # InstallEngine adds what a present one lacks
            if advice:
                raise catalogue.OWN_SOFTWARE_UNUSABLE.error(found=check.detail, advice=advice)
            raise catalogue.ENGINE_NOT_INSTALLED.error(found=check.detail)
        return backend

    def acquire(self) -> tuple[Backend, Hold]:
        """The backend to run, with a hold on its version while it runs.

        Raises EngineNotInstalledError, PreconditionError or UnavailableError. Blocking.
        """
        for _ in range(_ACQUIRE_ATTEMPTS):
            backend = self.find()
            hold = Hold() if backend.folder is None else self._installation.hold(backend.folder)
            if hold is not None:
                return backend, hold
            time.sleep(_ACQUIRE_PAUSE)  # a switch or a removal is in progress
        raise UnavailableError(f"{backend.origin} is locked by another program; call StartEngine again later")

    async def sweep(self) -> None:
        """Remove the remains of killed installations, also downloads, and versions that are no longer in use."""
        await in_thread(self._installation.sweep, self._downloads.remove_older)

    async def install(self, progress: Progress, hooks: InstallHooks, *, cover: bool) -> str:
        """Install into the data directory unless usable software is present. Returns a description of the software.

        `cover`: install in any case. Raises InstallError.
        """
        await in_thread(self._require_executable_disk)
        before = self._installation.current()  # read first, to detect an installation by another process
        check = await in_thread(self.check)
        if check.installed and not cover:
            await self.sweep()
            return check.detail
        present = await in_thread(self._find)
        if present is not None and present.folder is None and (await in_thread(_doubt, present)) is not None:
            raise InstallError(check.detail)  # InstallEngine cannot replace it
        missing, advice = self._missing()
        if present is None and advice:
            raise InstallError(
                f"{missing}. InstallEngine does not install the backend that plugin.yaml selects. {advice}"
            )

        def is_done() -> bool:
            return self.check().installed and self._installation.current() != before

        await self._replace(progress, hooks, is_done)
        return (await in_thread(self.check)).detail

    async def upgrade(self, progress: Progress, hooks: InstallHooks) -> bool:
        """Install `wanted_version`; False if it is installed already. Raises InstallError."""
        await in_thread(self._require_executable_disk)

        def is_done() -> bool:
            backend = self._find()
            return backend is not None and self.check().installed and self._up_to_date(backend)

        if await in_thread(is_done):
            await self.sweep()
            return False
        return await self._replace(progress, hooks, is_done)

    # Steps of `_fill`

    async def install_packages(
        self,
        target: Path,
        progress: Progress,
        *,
        only: Collection[str] = (),
        without: Collection[str] = (),
        also: Sequence[str] = (),
    ) -> None:
        """Install the packages of the requirements file, or a selection of them. Raises InstallError.

        pip checks their hashes, except with `also`, which names additional packages of any version.
        """
        lines = await in_thread(_select, self.requirements, only, without)
        if also:
            lines = "\n".join([*(line.rstrip(" \\") for line in lines.splitlines() if "--hash=" not in line), *also])
        async with self._installation.scratch() as scratch:
            chosen = scratch / "requirements.txt"
            await in_thread(chosen.write_text, lines, encoding="utf-8")
            arguments = [*([] if also else ["--require-hashes"]), "-r", str(chosen)]
            wheels = self._offline if self._options.offline else None
            await install_packages(target, arguments, self._environ, progress, scratch=scratch, wheels=wheels)

    async def _unpack(self, archives: Sequence[Archive], target: Path, progress: Progress) -> None:
        """Download, verify and unpack archives into the new directory `target`. Raises InstallError."""
        from engine_plugin.install.archives import unpack  # not before the handshake

        files = [await self._downloads.get(archive, progress) for archive in archives]
        progress(f"unpacking {', '.join(archive.label.rpartition('/')[2] for archive in archives)}")
        try:
            await unpack(files, target)
        except InstallError:
            if not self._options.verify:  # verified files are kept for the next attempt
                await self._downloads.clear()
            raise

    async def _require_room(self, folder: Path, size: int, what: str) -> None:
        """Raise InstallError if the disk of `folder` has less than `size` free bytes for `what`."""
        try:
            await in_thread(check_room, folder, size, what)
        except DownloadError as error:
            raise InstallError.from_error(error) from error

    # Internals

    def _find(self) -> Backend | None:
        return next(self._candidates(), None)

    async def _install_distribution(self, folder: Path, progress: Progress, name: str, *also_unpinned: str) -> None:
        """Install the requirements: as pinned, or with the version of `name` that plugin.yaml sets.

        `also_unpinned` are packages that `name` then chooses the versions of. Raises InstallError.
        """
        progress(f"installing {name} {self.wanted_version} into {self.folder}")
        if version := self._options.version:
            without, also = (name, *also_unpinned), [f"{name}=={version}"]
            await self.install_packages(folder, progress, without=without, also=also)
        else:
            await self.install_packages(folder, progress)

    async def _replace(self, progress: Progress, hooks: InstallHooks, is_done: Callable[[], bool]) -> bool:
        """Install `wanted_version` beside the present one, try it, and switch to it. False if `is_done`.

        Raises InstallError.
        """
        kind = await in_thread(self._kind)
        archives = await in_thread(self._archives)

        async def fill(folder: Path) -> None:
            await self._fill(folder, archives, progress)

        async def check(folder: Path) -> Mapping[str, str]:
            facts = {"kind": kind}
            if archives:
                program = await in_thread(find_unpacked_program, folder, self.program)
                facts |= {"executable": program.relative_to(folder).as_posix(), "source": self._release_id(archives)}
            return {**facts, "version": await self._verified_version(folder, facts, hooks)}

        async def adopt() -> None:
            await hooks.adopt()
            await self._downloads.clear()

        return await self._installation.replace(InstallSteps(fill, check, adopt, is_done), progress)

    async def _verified_version(self, folder: Path, facts: Mapping[str, str], hooks: InstallHooks) -> str:
        """Run a new installation and return its version. Raises InstallError if it does not answer."""
        try:
            backend = await in_thread(self._installed, folder, facts)
            version = str((await self.probe(backend))["version"])
            await hooks.trial(backend)
        except InstallError:
            raise
        except EnginePluginError as error:
            raise InstallError(
                f"the new {self.title} does not run; the installation was not changed: {error}"
            ) from error
        return version

    def _require_executable_disk(self) -> None:
        """Raise InstallError, before any download, for a data directory on a disk mounted noexec."""
        if doubt := noexec_doubt(self.folder):
            raise InstallError(str(doubt))

    def _release_id(self, archives: Sequence[Archive]) -> str:
        """The identity of a release, as recorded with the installation: location and digest of the user's own
        archives, else the file names, which every mirror keeps."""
        if self._options.archives:
            return " ".join(f"{archive.label}#{archive.sha256}" for archive in archives)
        return " ".join(archive.label.rpartition("/")[2] for archive in archives)

    def _has_wanted_release(self) -> bool:
        """Whether the wanted archives are the installed ones. Raises InstallError. Blocking."""
        current = self._installation.current()
        return current is not None and current.facts.get("source") == self._release_id(self._archives())

    async def _run(self, backend: Backend, argv: Sequence[str], env: Mapping[str, str]) -> tuple[bytes, bytes]:
        """Run the software once; return its stdout and stderr. Raises EngineStartError."""
        try:
            status, out, err = await python.run_briefly(argv, env, timeout=_PROBE_TIMEOUT)
        except OSError as error:
            why = f"cannot be run: {error.strerror or error}"
            raise EngineStartError(f"{backend.origin} {why}{self._repair_advice(backend)}") from error
        if status != 0:
            words = (err.strip() or out).decode("utf-8", "replace").strip()
            why = f"does not run {self._exit_reason(status, words)}"
            raise EngineStartError(f"{backend.origin} {why}{self._repair_advice(backend)}")
        return out, err

    def _repair_advice(self, backend: Backend) -> str:
        """The advice for an installed version that does not run, as the end of a message."""
        current = self._installation.current()
        if backend.folder is None or current is None or backend.folder != current.folder:
            return ""
        return ". If the installation is damaged, call InstallEngine with cover"

    def _exit_reason(self, status: int, words: str) -> str:
        """Why the software does not run, by its exit status and the end of its output, as the end of a sentence."""
        return f"(exit code {status}): {words[-_OUTPUT_TAIL:]}"


def requested_backend(asked: str, named: Mapping[str, object]) -> str:
    """The backend that `engine.backend` selects.

    For "auto" it is the first one in `named` for which plugin.yaml has a setting, else "auto".
    """
    return asked if asked != "auto" else next((kind for kind, what in named.items() if what), "auto")


def locate_program(name: str, environ: Mapping[str, str]) -> str:
    """The absolute path of the program `name`, a path or a name on PATH; "" if missing. Blocking.

    A path to a file that is not executable is returned too; `_doubt` explains it. On Windows the working directory,
    which may belong to another user, is not searched for a name.
    """
    found = shutil.which(name, path=environ.get("PATH"))
    if found is None:
        named = Path(name)
        return str(named.absolute()) if named.parent.parts and is_file(named) else ""
    program = Path(found).absolute()
    if sys.platform == "win32" and not Path(name).parent.parts and program.parent == Path.cwd():
        return ""
    return str(program)


def _doubt(backend: Backend) -> Doubt | None:
    """Why the software cannot be used: its owner, permissions or mount options."""
    if backend.executable:
        return program_doubt(Path(backend.executable))
    return None if backend.site is None else noexec_doubt(backend.site)


def find_unpacked_program(folder: Path, name: str) -> Path:
    """The program `name`, without .exe, in an unpacked release; the topmost one, made executable. Blocking.

    Raises InstallError.
    """
    name = f"{name}.exe" if sys.platform == "win32" else name
    found = [path for path in folder.rglob(name) if path.is_file()]
    if not found:
        raise InstallError(f"the archive contains no {name}. Correct engine.archives")
    program = min(found, key=lambda path: (len(path.parts), path))
    program.chmod(program.stat().st_mode | 0o111)  # a .zip may lack the mode
    return program


def distribution_version(path: Sequence[str] | None, name: str) -> str:
    """The version of a distribution in `path` (None: sys.path), "" if it is not installed. Blocking."""
    places = sys.path if path is None else list(path)
    found = importlib.metadata.distributions(name=name, path=places)
    return next((distribution.version for distribution in found), "")


def pinned_versions(requirements: Path) -> dict[str, str]:
    """The pinned versions of a pip file by package. Blocking."""
    return dict(_PINNED.findall(requirements.read_text(encoding="utf-8")))


def _select(requirements: Path, only: Collection[str], without: Collection[str]) -> str:
    blocks = _BLOCK.split(requirements.read_text(encoding="utf-8"))
    named = [(block.partition("==")[0], block) for block in blocks]
    return "".join(block for name, block in named if name not in without and (not only or name in only))
