"""An engine's software below one directory: each version in a directory of its own, one of them switched on.

    <root>/current.json                    names the version that is used
    <root>/versions/<kind>-<version>-…/    a whole, checked version
    <root>/versions/staging-…/             one that is being made, or temporary files of that; removed if that fails,
                                           or by the next installation
    <root>/install.lock                    one installation at a time, between processes too

Knows no engine: what fills a directory, and what proves it, comes from the caller.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import EnginePluginError, InstallError, PreconditionError
from engine_plugin.files import in_thread, private_folder, read_json, sync_folder, write_json
from engine_plugin.manifest.paths import is_directory
from engine_plugin.trust import distrust

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from engine_plugin.engines.base import Progress

__all__ = ["Installation", "Steps", "Version"]

LOCK_TIMEOUT = 1800.0
"""Seconds for which another process's installation is waited for."""

_LOCK_PAUSE = 0.1
_CURRENT = "current.json"
_LOCK = "install.lock"
_STAGING = "staging-"
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")


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

    def __init__(self, root: Path) -> None:
        self.root = root
        self._versions = root / "versions"

    def current(self) -> Version | None:
        """The version that is switched on, None when there is none. Reads a small file.

        Raises PreconditionError when another user could change it, or what it names.
        """
        found = self._pointed()
        while found is not None and not is_directory(found.folder):
            again = self._pointed()
            if again == found:
                return None
            found = again  # another installation ended between our two looks
        return found

    def _pointed(self) -> Version | None:
        pointer = self.root / _CURRENT
        self._require_trust(pointer)
        shape = read_json(pointer) or {}
        name, facts = shape.get("folder"), shape.get("facts")
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            return None
        self._require_trust(self._versions / name)
        known = facts if isinstance(facts, dict) else {}
        return Version(self._versions / name, {str(key): str(value) for key, value in known.items()})

    def _require_trust(self, path: Path) -> None:
        if doubt := distrust(path):
            raise PreconditionError(f"the installation in {self.root} is not used: {doubt}")

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
                    await in_thread(self._remove_all_but, self.current())
                    raise
                return True
        except OSError as error:
            raise InstallError(
                f"{error.filename or self.root}: {error.strerror or error}. Nothing was changed; check the data "
                "directory's permissions and the room on its disk."
            ) from error

    async def _replace(self, steps: Steps, progress: Progress) -> None:
        await in_thread(self._remove_all_but, self.current())  # we hold the lock: nobody works on what else is here
        staging = Path(await in_thread(tempfile.mkdtemp, prefix=_STAGING, dir=self._versions))
        await steps.fill(staging)
        progress("checking that it runs")
        facts = {str(key): str(value) for key, value in (await steps.check(staging)).items()}
        name = _UNSAFE.sub("_", f"{facts.get('kind', 'version')}-{facts.get('version', 'unknown')}")[:80]
        new = Version(self._versions / f"{name}-{staging.name.removeprefix(_STAGING)}", facts)
        await in_thread(staging.rename, new.folder)
        await self._switch(new, steps, progress)
        await in_thread(self._remove_all_but, new)

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

    def _point(self, version: Version | None) -> None:
        """Switch: from one instant to the next, for every process that looks."""
        if version is None:
            (self.root / _CURRENT).unlink(missing_ok=True)
        else:
            shape: dict[str, Any] = {"folder": version.folder.name, "facts": dict(version.facts)}
            write_json(self.root / _CURRENT, shape, self.root)
        sync_folder(self.root)

    def _remove_all_but(self, keep: Version | None) -> None:
        """Remove other versions and what a killed installation left; on Windows files in use stay until next time."""
        for entry in self._versions.iterdir():
            if keep is None or entry != keep.folder:
                shutil.rmtree(entry, ignore_errors=True)

    @asynccontextmanager
    async def _locked(self, progress: Progress) -> AsyncIterator[None]:
        """Hold the installation against other processes."""
        from filelock import FileLock, Timeout  # not before the handshake

        lock = FileLock(self.root / _LOCK, mode=0o600, thread_local=False)
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
