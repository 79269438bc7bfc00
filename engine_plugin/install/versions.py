"""The installed versions of an engine's software, each in a directory of its own; one of them is current.

    <root>/current-<engine>.json           names the current version of an engine
    <root>/versions/<kind>-<version>-…/    a complete, checked version; its `.installed.json` lists the sizes of files
    <root>/versions/staging-…/             a version in progress, or its temporary files; removed after a failure, or
                                           by the next installation
    <root>/install.lock                    allows one installation at a time, also between processes

A new version is synced to the disk before it becomes current, and the old version is removed after that, so one
complete version survives a loss of power. Versions in use (install.holds) stay until a later installation or start.

The caller provides the functions that fill and check a directory.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.download.disk import disk_reason
from engine_plugin.errors import EnginePluginError, InstallError, PreconditionError
from engine_plugin.install.holds import Hold, hold_version, remove_unless_held
from engine_plugin.manifest.paths import is_directory
from engine_plugin.system.files import (
    in_thread,
    private_folder,
    read_json,
    sync_folder,
    sync_tree,
    take_lock,
    write_json,
)
from engine_plugin.system.trust import distrust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    from engine_plugin.engines.base import Progress

__all__ = ["InstallSteps", "Installation", "InstalledVersion"]

log = logging.getLogger(__name__)

LOCK_TIMEOUT = 1800.0
"""Seconds to wait for the installation of another process."""

_CURRENT = "current"
_LOCK = "install.lock"
_STAGING = "staging-"
_FILES = ".installed.json"
_CACHES = ".pyc"  # Python recreates these
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_FOLDER = re.compile(r"[A-Za-z0-9._+-]{1,255}")


@dataclass(frozen=True, slots=True)
class InstalledVersion:
    """An installed version: its directory and the facts from `InstallSteps.check` (`kind`, `version`, …)."""

    folder: Path
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InstallSteps:
    """The steps of one installation. An exception in a step aborts it."""

    fill: Callable[[Path], Awaitable[None]]
    """Fills a new, empty directory. The directory is renamed later, so no file in it may contain its path."""

    check: Callable[[Path], Awaitable[Mapping[str, str]]]
    """Runs the software in the directory and returns its facts; `kind` and `version` name the directory."""

    adopt: Callable[[], Awaitable[None]]
    """Switches a running engine to the current version and checks it. Called after the switch to the new version and
    again after a switch back."""

    is_done: Callable[[], bool] = lambda: False
    """Whether another process has completed the same installation. Called with the lock held."""


class Installation:
    """The versions below `root`. Used from one event loop; other processes may use the same directory."""

    def __init__(self, root: Path, engine: str = "") -> None:
        """`engine` owns the versions, because several engines can share a data directory. No I/O."""
        self.root = root
        self._versions = root / "versions"
        self._pointer = root / (f"{_CURRENT}-{engine}.json" if engine else f"{_CURRENT}.json")

    def current(self) -> InstalledVersion | None:
        """The current version, None without one. Reads a small file.

        Raises PreconditionError if another user could change the file or the version.
        """
        found = self._read_pointer(self._pointer)
        while found is not None and not is_directory(found.folder):
            again = self._read_pointer(self._pointer)
            if again == found:
                return None
            found = again  # another installation ended in between
        return found

    def _read_pointer(self, pointer: Path) -> InstalledVersion | None:
        self._require_trust(pointer)
        shape = read_json(pointer) or {}
        name, facts = shape.get("folder"), shape.get("facts")
        if not isinstance(name, str) or not _FOLDER.fullmatch(name) or name in (".", ".."):
            return None
        self._require_trust(self._versions / name)
        known = facts if isinstance(facts, dict) else {}
        return InstalledVersion(self._versions / name, {str(key): str(value) for key, value in known.items()})

    def _require_trust(self, path: Path) -> None:
        if doubt := distrust(path):
            raise PreconditionError(f"the installation in {self.root} cannot be trusted: {doubt}")

    def hold(self, folder: Path) -> Hold | None:
        """Hold an installed version while it runs; None if it was removed. Blocking."""
        return hold_version(folder, _FILES)

    def damage(self, folder: Path) -> str:
        """Describe missing or truncated files of an installed version, "" without any.

        Blocking: one stat per file.
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

    async def replace(self, steps: InstallSteps, progress: Progress) -> bool:
        """Install a version beside the present ones, check it, switch to it and remove the others.

        Returns False if another process has done so. After a failure or a cancellation the old version is current and
        the new one is removed. Raises InstallError, and the errors of `fill` and `check`.
        """
        try:
            await in_thread(private_folder, self._versions)
            async with self._locked(progress):
                if steps.is_done():
                    return False
                try:
                    await self._replace(steps, progress)
                except BaseException:  # a cancellation, too
                    await in_thread(self._remove_unused)
                    raise
                return True
        except OSError as error:
            raise InstallError(
                f"{error.filename or self.root}: {disk_reason(error, self.root)}. The installation was not "
                "changed. Check the permissions of the data directory and the free space on its disk"
            ) from error

    async def _replace(self, steps: InstallSteps, progress: Progress) -> None:
        await in_thread(self._remove_unused)  # with the lock held, no other installation uses these
        staging = Path(await in_thread(tempfile.mkdtemp, prefix=_STAGING, dir=self._versions))
        await steps.fill(staging)
        progress("checking that it runs")
        facts = {str(key): str(value) for key, value in (await steps.check(staging)).items()}
        name = _UNSAFE.sub("_", f"{facts.get('kind', 'version')}-{facts.get('version', 'unknown')}")[:80]
        new = InstalledVersion(self._versions / f"{name}-{staging.name.removeprefix(_STAGING)}", facts)
        progress("syncing it to the disk")
        await in_thread(self._publish, staging, new.folder)
        await self._switch(new, steps, progress)
        await in_thread(self._remove_unused)

    async def _switch(self, new: InstalledVersion, steps: InstallSteps, progress: Progress) -> None:
        old = self.current()
        try:
            await in_thread(self._point, new)
            await steps.adopt()
        except BaseException as error:
            if self.current() != old:
                await in_thread(self._point, old)
            if isinstance(error, Exception):  # after a cancellation the engine is stopping
                raise await self._rolled_back(error, old, steps, progress) from error
            raise

    async def _rolled_back(
        self, error: Exception, old: InstalledVersion | None, steps: InstallSteps, progress: Progress
    ) -> InstallError:
        """Switch the engine back to the old version; return the error to raise."""
        before = f"version {old.facts.get('version', 'unknown')}" if old else "the previous software"
        progress(f"the new version failed; switching back to {before}")
        try:
            await steps.adopt()
        except EnginePluginError as second:
            return InstallError(
                f"the new version failed: {error}. {before} is current again, but the engine did not start with it: "
                f"{second}. Call StartEngine"
            )
        return InstallError(f"the new version failed; {before} is used again: {error}")

    @asynccontextmanager
    async def scratch(self) -> AsyncIterator[Path]:
        """A directory for the temporary files of `InstallSteps.fill`, on the disk of the versions."""
        folder = Path(await in_thread(tempfile.mkdtemp, prefix=_STAGING, dir=self._versions))
        try:
            yield folder
        finally:
            await in_thread(shutil.rmtree, folder, ignore_errors=True)

    # Blocking

    def _publish(self, staging: Path, folder: Path) -> None:
        """List the files, sync them to the disk, then rename the directory."""
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in _installed_files(staging)}
        write_json(staging / _FILES, {"files": sizes}, staging)
        sync_tree(staging)
        staging.rename(folder)
        sync_folder(self._versions)

    def _point(self, version: InstalledVersion | None) -> None:
        """Make a version current, atomically for all processes."""
        if version is None:
            self._pointer.unlink(missing_ok=True)
            sync_folder(self.root)
        else:
            shape: dict[str, Any] = {"folder": version.folder.name, "facts": dict(version.facts)}
            write_json(self._pointer, shape, self.root)

    def sweep(self, remove_older: Callable[[float], None]) -> None:
        """Remove the remains of killed installations, and versions that were in use when they were replaced.

        `remove_older` deletes the downloads from before a time (seconds since the epoch), that of the last switch.
        Does nothing during an installation, or on a read-only disk.
        """
        from filelock import FileLock, Timeout  # not before the handshake

        if not self._versions.is_dir():
            return
        try:
            with FileLock(self.root / _LOCK, 0, mode=0o600):
                self._remove_unused()
                if self._pointer.exists():
                    remove_older(self._pointer.stat().st_mtime)
        except Timeout:
            return
        except OSError as error:
            log.info("cannot clean up %s: %s", self.root, error)

    def _remove_unused(self) -> None:
        """Remove the remains of killed installations, and versions that are neither current nor in use."""
        pointers = [self._pointer, *self.root.glob(f"{_CURRENT}-*.json")]
        wanted = {version.folder for version in map(self._read_pointer, pointers) if version is not None}
        entries = list(self._versions.iterdir())
        for entry in entries:
            if entry.name.startswith(_STAGING) or not entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
        for entry in entries:
            if not entry.name.startswith(_STAGING) and entry not in wanted:
                remove_unless_held(entry, entry.with_name(f"{_STAGING}{entry.name}"))

    @asynccontextmanager
    async def _locked(self, progress: Progress) -> AsyncIterator[None]:
        """Hold the installation lock."""
        path = self.root / _LOCK
        try:
            lock = await take_lock(path, lambda: progress("waiting for another installation"), LOCK_TIMEOUT)
        except TimeoutError:
            raise InstallError(
                f"another installation has held {path} for {LOCK_TIMEOUT:g} s. Wait for its end and try again"
            ) from None
        with lock:
            yield


def _installed_files(folder: Path) -> Iterator[Path]:
    """The files of a version that must be present. Blocking."""
    for here, _, names in os.walk(folder):
        for path in map(Path(here).joinpath, names):
            if path.suffix != _CACHES and path.is_file():
                yield path


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
