"""An engine's software below one directory: each version in a directory of its own, one of them switched on.

    <root>/current-<engine>.json           names the version that an engine uses
    <root>/versions/<kind>-<version>-…/    a whole, checked version; `.installed.json` in it lists its files' sizes
    <root>/versions/staging-…/             one that is being made, or temporary files of that; removed if that fails,
                                           or by the next installation
    <root>/install.lock                    one installation at a time, between processes too

A version is on the disk itself before it is switched on, and the switch before the old version goes, so that a loss
of power leaves one of them whole. Versions in use stay (holds.py) until a later installation or start.

Knows no engine: what fills a directory, and what proves it, comes from the caller.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shutil
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.download.disk import disk_reason
from engine_plugin.errors import EnginePluginError, InstallError, PreconditionError
from engine_plugin.install.holds import Hold, hold, remove_unless_held
from engine_plugin.manifest.paths import is_directory
from engine_plugin.system.files import in_thread, private_folder, read_json, sync_folder, sync_tree, write_json
from engine_plugin.system.trust import distrust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    from filelock import FileLock

    from engine_plugin.engines.base import Progress

__all__ = ["Installation", "Steps", "Version"]

log = logging.getLogger(__name__)

LOCK_TIMEOUT = 1800.0
"""Seconds for which another process's installation is waited for."""

_LOCK_PAUSE = 0.1
_CURRENT = "current"
_LOCK = "install.lock"
_STAGING = "staging-"
_FILES = ".installed.json"
_CACHES = ".pyc"  # Python recreates damaged ones
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_FOLDER = re.compile(r"[A-Za-z0-9._+-]{1,255}")


@dataclass(frozen=True, slots=True)
class Version:
    """An installed version: where it lies, and what `Steps.check` said of it (`kind`, `version`, …)."""

    folder: Path
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Steps:
    """What one installation is made of. What they raise ends it."""

    fill: Callable[[Path], Awaitable[None]]
    """Puts the software into a new, empty directory. It is moved later, so nothing in it may name the directory."""

    check: Callable[[Path], Awaitable[Mapping[str, str]]]
    """Runs what is in the directory, and returns its facts; `kind` and `version` name the directory."""

    adopt: Callable[[], Awaitable[None]]
    """Called when the new version is switched on, and again if that failed and the old one is switched on again:
    moves a running engine over, and proves it."""

    needless: Callable[[], bool] = lambda: False
    """Asked once nobody else installs any more: whether somebody has done meanwhile what is wanted here."""


class Installation:
    """The software below `root`. Used by one event loop; other processes may use the same directory."""

    def __init__(self, root: Path, engine: str = "") -> None:
        """`engine` owns the versions: several engines may use the same data directory. No I/O."""
        self.root = root
        self._versions = root / "versions"
        self._pointer = root / (f"{_CURRENT}-{engine}.json" if engine else f"{_CURRENT}.json")

    def current(self) -> Version | None:
        """The version that is switched on, None when there is none. Reads a small file.

        Raises PreconditionError when another user could change it, or what it names.
        """
        found = self._pointed(self._pointer)
        while found is not None and not is_directory(found.folder):
            again = self._pointed(self._pointer)
            if again == found:
                return None
            found = again  # another installation ended between our two looks
        return found

    def _pointed(self, pointer: Path) -> Version | None:
        self._require_trust(pointer)
        shape = read_json(pointer) or {}
        name, facts = shape.get("folder"), shape.get("facts")
        if not isinstance(name, str) or not _FOLDER.fullmatch(name) or name in (".", ".."):
            return None
        self._require_trust(self._versions / name)
        known = facts if isinstance(facts, dict) else {}
        return Version(self._versions / name, {str(key): str(value) for key, value in known.items()})

    def _require_trust(self, path: Path) -> None:
        if doubt := distrust(path):
            raise PreconditionError(f"the installation in {self.root} is not used: {doubt}")

    def hold(self, folder: Path) -> Hold | None:
        """Keep an installed version from being removed while it runs; None when it is gone already. Blocking."""
        return hold(folder, _FILES)

    def damage(self, folder: Path) -> str:
        """What is wrong with an installed version's files, "" when all have the sizes that they were installed with.

        Blocking: one stat for each file.
        """
        listed = folder / _FILES
        if not listed.exists():
            return ""
        sizes = (read_json(listed) or {}).get("files")
        if not isinstance(sizes, dict):
            return f"{listed} cannot be read"
        wrong = [(name, size) for name, size in sizes.items() if _size_of(folder / name) != size]
        if not wrong:
            return ""
        name, size = wrong[0]
        found = _size_of(folder / name)
        has = "is missing" if found is None else f"has {found} of {size} bytes"
        return f"{folder / name} {has} ({len(wrong)} of {len(sizes)} files are damaged)"

    async def replace(self, steps: Steps, progress: Progress) -> bool:
        """Install a version beside what is there, prove it, switch to it, remove the others.

        False when another process has done it meanwhile. Whatever fails, and after a cancellation too, what was there
        is there, switched on, and the new version is gone. Raises InstallError, and what `fill` and `check` raise.
        """
        try:
            await in_thread(private_folder, self._versions)
            async with self._locked(progress):
                if steps.needless():
                    return False
                try:
                    await self._replace(steps, progress)
                except BaseException:  # a cancellation, too
                    await in_thread(self._remove_unused)
                    raise
                return True
        except OSError as error:
            raise InstallError(
                f"{error.filename or self.root}: {disk_reason(error, self.root)}. Nothing was changed; check the "
                "data directory's permissions and the room on its disk."
            ) from error

    async def _replace(self, steps: Steps, progress: Progress) -> None:
        await in_thread(self._remove_unused)  # we hold the lock: no other installation works on what else is here
        staging = Path(await in_thread(tempfile.mkdtemp, prefix=_STAGING, dir=self._versions))
        await steps.fill(staging)
        progress("checking that it runs")
        facts = {str(key): str(value) for key, value in (await steps.check(staging)).items()}
        name = _UNSAFE.sub("_", f"{facts.get('kind', 'version')}-{facts.get('version', 'unknown')}")[:80]
        new = Version(self._versions / f"{name}-{staging.name.removeprefix(_STAGING)}", facts)
        progress("writing it to the disk")
        await in_thread(self._settle, staging, new.folder)
        await self._switch(new, steps, progress)
        await in_thread(self._remove_unused)

    async def _switch(self, new: Version, steps: Steps, progress: Progress) -> None:
        old = self.current()
        try:
            await in_thread(self._point, new)
            await steps.adopt()
        except BaseException as error:
            if self.current() != old:
                await in_thread(self._point, old)
            if isinstance(error, Exception):  # a cancellation leaves no time to move an engine: it is stopping
                raise await self._rolled_back(error, old, steps, progress) from error
            raise

    async def _rolled_back(
        self, error: Exception, old: Version | None, steps: Steps, progress: Progress
    ) -> InstallError:
        """Have what was used before be used again, and say so."""
        before = f"version {old.facts.get('version', 'unknown')}" if old else "what was there before"
        progress(f"the new version failed; going back to {before}")
        try:
            await steps.adopt()
        except EnginePluginError as second:
            return InstallError(
                f"the new version failed: {error}. {before} is switched on again, but the engine did not come back "
                f"with it: {second}. Call StartEngine."
            )
        return InstallError(f"the new version failed, {before} is used again: {error}")

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """A directory for temporary files on the versions' disk, for what `Steps.fill` runs."""
        folder = Path(await in_thread(tempfile.mkdtemp, prefix=_STAGING, dir=self._versions))
        try:
            yield folder
        finally:
            await in_thread(shutil.rmtree, folder, ignore_errors=True)

    # Blocking

    def _settle(self, staging: Path, folder: Path) -> None:
        """List the files, have all of them on the disk itself, and only then give the directory its name."""
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in _files(staging)}
        write_json(staging / _FILES, {"files": sizes}, staging)
        sync_tree(staging)
        staging.rename(folder)
        sync_folder(self._versions)

    def _point(self, version: Version | None) -> None:
        """Switch: from one instant to the next, for every process that looks."""
        if version is None:
            self._pointer.unlink(missing_ok=True)
            sync_folder(self.root)
        else:
            shape: dict[str, Any] = {"folder": version.folder.name, "facts": dict(version.facts)}
            write_json(self._pointer, shape, self.root)

    def sweep(self, forget: Callable[[float], None]) -> None:
        """Remove what a killed installation left, and versions that were still in use when they were replaced.

        `forget` removes what was downloaded before a time (seconds since the epoch), that of the last switch. Does
        nothing while there is an installation, or on a disk that cannot be written.
        """
        from filelock import Timeout  # not before the handshake

        if not self._versions.is_dir():
            return
        try:
            with self._lock().acquire(blocking=False):
                self._remove_unused()
                if self._pointer.exists():
                    forget(self._pointer.stat().st_mtime)
        except Timeout:
            return
        except OSError as error:
            log.info("%s is not swept: %s", self.root, error)

    def _remove_unused(self) -> None:
        """Remove what a killed installation left, and the versions that are neither switched on nor in use."""
        pointers = [self._pointer, *self.root.glob(f"{_CURRENT}-*.json")]
        wanted = {version.folder for version in map(self._pointed, pointers) if version is not None}
        entries = list(self._versions.iterdir())
        for entry in entries:
            if entry.name.startswith(_STAGING) or not entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
        for entry in entries:
            if not entry.name.startswith(_STAGING) and entry not in wanted:
                remove_unless_held(entry, entry.with_name(f"{_STAGING}{entry.name}"))

    def _lock(self) -> FileLock:
        from filelock import FileLock

        return FileLock(self.root / _LOCK, mode=0o600, thread_local=False)

    @asynccontextmanager
    async def _locked(self, progress: Progress) -> AsyncIterator[None]:
        """Hold the installation against other processes."""
        from filelock import Timeout  # not before the handshake

        lock = self._lock()
        told = False
        give_up = asyncio.get_running_loop().time() + LOCK_TIMEOUT
        while True:
            with suppress(Timeout):
                lock.acquire(blocking=False)
                break
            if not told:
                told = True
                progress("waiting for another installation")
            if asyncio.get_running_loop().time() > give_up:
                raise InstallError(f"another installation holds {lock.lock_file} for {LOCK_TIMEOUT:g} s")
            await asyncio.sleep(_LOCK_PAUSE)
        try:
            yield
        finally:
            lock.release()


def _files(folder: Path) -> Iterator[Path]:
    """The files below a version's directory by which it can be told to be whole. Blocking."""
    for here, _, names in os.walk(folder):
        for path in map(Path(here).joinpath, names):
            if path.suffix != _CACHES and path.is_file():
                yield path


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
