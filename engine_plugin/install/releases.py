"""Release archives of an engine: which one fits this machine, its digest, and the file itself, verified.

A file comes from its URL, from a path, or, for a machine that must not touch a network, from one directory. It is
used only if its SHA-256 is the expected one. Knows no engine; drivers say which archives there are.
"""

from __future__ import annotations

import asyncio
import re
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from engine_plugin import catalogue
from engine_plugin.download.disk import disk_error
from engine_plugin.download.events import ChunkProgress, Status
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.download.remote import FetchPolicy
from engine_plugin.download.source import HttpSource, file_path, without_secrets
from engine_plugin.errors import AuthError, DownloadError, InstallError, NotFoundError
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.manifest import platform_key
from engine_plugin.system.files import in_thread, private_folder, sha256_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress

__all__ = ["Archive", "DownloadRules", "Downloads", "choose", "digest_in", "likely_accelerators"]

_HEX64 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_LISTED = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})\s+[ *]?(\S.*)")
_BSD = re.compile(r"SHA256\s*\((.+)\)\s*=\s*([0-9a-fA-F]{64})", re.IGNORECASE)
_CHECKSUMS_LIMIT = 8 * 1024 * 1024
_CHECKSUMS_PATIENCE = 300.0
"""Seconds in which it must have arrived: a dripping server could block an installation for ever."""
_BESIDE = ("SHA256SUMS", "checksums.txt")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_NVIDIA = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Archive:
    """One archive of a release. Several for the same machine and accelerator belong together.

    Also an entry of `engine.archives` in plugin.yaml. `os` and `arch` are in the words of `platforms`.
    """

    url: str
    """An http(s) or file:// URL, or a path."""
    os: str = field(default="", metadata={"choices": ("", "linux", "darwin", "windows")})
    """Empty: any."""
    arch: str = field(default="", metadata={"choices": ("", "amd64", "arm64")})
    """Empty: any."""
    accelerator: str = "cpu"
    sha256: str = field(default="", metadata={"pattern": r"(sha256:)?[0-9a-fA-F]{64}", "form": "64 hex digits"})
    size: int = field(default=0, metadata={"min": 0})
    """Bytes; 0: unknown."""
    checksums: str = ""
    """URL or path of a file with the digest, for an archive without `sha256`; empty: URL.sha256 is tried."""

    @property
    def label(self) -> str:
        """The archive for people and records: no credentials."""
        return without_secrets(self.url)


def likely_accelerators(platform: str) -> tuple[str, ...]:
    """What `auto` tries, best first: only what can be known without asking a driver; the processor always."""
    if platform == "darwin_arm64":
        return ("metal", "cpu")  # each such machine has it
    if platform.startswith("linux_") and sys.platform == "linux" and _NVIDIA.exists():
        return ("cuda", "cpu")
    return ("cpu",)


def choose(archives: Sequence[Archive], accelerator: str, platform: str = "") -> tuple[Archive, ...]:
    """The archives to install on this machine. Raises InstallError listing what there is."""
    platform = platform or platform_key()
    system, _, machine = platform.partition("_")
    fitting = [entry for entry in archives if entry.os in ("", system) and entry.arch in ("", machine)]
    for wanted in likely_accelerators(platform) if accelerator == "auto" else (accelerator,):
        if found := tuple(entry for entry in fitting if entry.accelerator == wanted):
            return found
    there = ", ".join(sorted({entry.accelerator for entry in fitting}))
    if there:
        raise InstallError(
            f"engine.accelerator: there is no archive for {accelerator} on {platform}, only for {there}. Name one of "
            "these, or add an archive to engine.archives"
        )
    raise InstallError(
        f"engine.archives: there is no archive for this machine ({platform}). Add one, or choose another "
        "engine.backend"
    )


def digest_in(content: bytes, name: str) -> str:
    """The SHA-256 of the file `name` in a checksum file, 64 hex digits; "" when it has none.

    Lines `HEX  name` and `HEX *name`, `SHA256 (name) = HEX`, a digest alone, or the JSON with which GitHub describes
    a release.
    """
    text = content.decode("utf-8", "replace").strip().removeprefix("\ufeff")
    if text.startswith("{"):
        return _digest_in_json(text, name)
    if alone := _HEX64.fullmatch(text):
        return alone[1].lower()
    for line in text.splitlines():
        listed, bsd = _LISTED.fullmatch(line.strip()), _BSD.fullmatch(line.strip())
        digest, file = (listed[1], listed[2]) if listed else (bsd[2], bsd[1]) if bsd else ("", "")
        if file.replace("\\", "/").rpartition("/")[2] == name:
            return digest.lower()
    return ""


def _digest_in_json(text: str, name: str) -> str:
    try:
        assets = read_json(text.encode())["assets"]
    except (JsonError, LookupError):
        return ""
    for asset in assets if isinstance(assets, list) else ():
        if isinstance(asset, dict) and asset.get("name") == name:
            found = _HEX64.fullmatch(str(asset.get("digest")))
            return found[1].lower() if found else ""
    return ""


@dataclass(frozen=True, slots=True)
class DownloadRules:
    """What plugin.yaml allows. `shelf` is the directory in which files are looked for when `offline`."""

    shelf: Path
    offline: bool = False
    verify: bool = True
    policy: FetchPolicy = field(default_factory=FetchPolicy)


class Downloads:
    """Archives on this machine. `folder` keeps what has arrived, over restarts, until `clear`.

    Used while the installation's lock is held. Files that are somewhere on this machine already stay there.
    """

    def __init__(self, folder: Path, rules: DownloadRules) -> None:
        self._folder = folder
        self._rules = rules

    async def clear(self) -> None:
        """Forget everything that was downloaded."""
        await in_thread(_remove_files, self._folder)

    def forget_older(self, than: float) -> None:
        """Delete what arrived before a time, in seconds since the epoch: a switch since has used it. Blocking."""
        if self._folder.is_dir():
            for entry in self._folder.iterdir():
                if entry.stat().st_mtime <= than:
                    entry.unlink(missing_ok=True)

    async def get(self, archive: Archive, progress: Progress) -> Path:
        """The archive's file, whole and verified. Raises InstallError or AuthError."""
        try:
            source = _source(archive.url)
            if isinstance(source, HttpSource) and self._rules.offline:
                source = self._on_shelf(source, archive)
            if isinstance(source, Path):
                return await self._local(source, archive, progress)
            return await self._fetched(source, archive, progress)
        except AuthError as error:
            raise AuthError.retold(
                error,
                f"{error} Credentials for an installation stand in the URL, https://user:password@host/…; a server "
                "that was only asked too often answers again later",
            ) from error
        except (DownloadError, NotFoundError) as error:
            raise InstallError.retold(error) from error
        except OSError as error:
            raise InstallError(f"{error.filename or archive.label}: {error.strerror or error}") from error

    def _on_shelf(self, source: HttpSource, archive: Archive) -> Path:
        path = self._rules.shelf / source.file_name
        if path.is_file():
            return path
        raise InstallError(
            f"engine.offline is true, and {path} is not there. Fetch {archive.label} on a machine with a network and "
            f"put it there, and its SHA-256 beside it as {path.name}.sha256 (or in engine.archives)"
        )

    async def _local(self, path: Path, archive: Archive, progress: Progress) -> Path:
        size = await in_thread(_size, path)
        if archive.size and size != archive.size:
            raise InstallError(f"{path}: the file has {size} bytes, expected are {archive.size}")
        beside = [f"{path}.sha256", *(str(path.parent / name) for name in _BESIDE)]
        expected = await self._digest(archive, path.name, beside, progress)
        progress(f"verifying {path}")
        digest = (await sha256_of(path)).removeprefix("sha256:")
        if expected and digest != expected:
            raise catalogue.CHECKSUM_MISMATCH.error_as(
                InstallError,
                place=f"{path}: the file",
                found=f"sha256:{digest}",
                wanted=f"sha256:{expected}",
                fix="Replace it by the right one",
            )
        return path

    async def _fetched(self, source: HttpSource, archive: Archive, progress: Progress) -> Path:
        name = source.file_name
        expected = await self._digest(archive, name, [_beside(archive.url)], progress)
        async with self._arrived(source, name, progress, expected, archive.size) as partial:
            digest = partial.hexdigest()
            if not expected or digest == expected:
                return partial.path
            await in_thread(partial.discard)
            raise catalogue.CHECKSUM_MISMATCH.error_as(
                InstallError,
                place=f"{source.label}: the file",
                found=f"sha256:{digest}",
                wanted=f"sha256:{expected}",
                fix="What arrived was deleted; try again, and correct the digest or the source if it stays so",
            )

    async def _digest(self, archive: Archive, name: str, guesses: Sequence[str], progress: Progress) -> str:
        """What the file must have. Raises InstallError when that is nowhere to be found and must be."""
        if archive.sha256:
            return archive.sha256.lower().removeprefix("sha256:")
        for place in (archive.checksums,) if archive.checksums else guesses:
            listed = await self._small(place, progress, needed=bool(archive.checksums))
            found = await in_thread(digest_in, listed, name)
            if found:
                return found
        if not self._rules.verify:
            progress(f"{name} is not verified: no SHA-256 of it is known, and engine.verify is false")
            return ""
        where = without_secrets(archive.checksums) or " or ".join(without_secrets(guess) for guess in guesses)
        raise InstallError(
            f"no SHA-256 of {name} is known, nor found in {where}, so it is not used. Give it in engine.archives "
            "(sha256), name a file with it (checksums), or set engine.verify to false if you must"
        )

    async def _small(self, place: str, progress: Progress, *, needed: bool) -> bytes:
        """A checksum file's content; nothing when it is absent and need not be there."""

        def words_only(step: str | ChunkProgress) -> None:
            if isinstance(step, str):
                progress(step)

        source = _source(place)
        if isinstance(source, HttpSource) and self._rules.offline:
            source = self._rules.shelf / source.file_name
        if isinstance(source, Path):
            return await in_thread(_head, source) if source.is_file() else b""
        try:
            async with (
                asyncio.timeout(_CHECKSUMS_PATIENCE),
                self._arrived(source, "checksums", words_only, limit=_CHECKSUMS_LIMIT) as partial,
            ):
                try:
                    return await in_thread(_head, partial.path)
                finally:
                    await in_thread(partial.discard)
        except TimeoutError:
            raise InstallError(
                f"{source.label}: the file did not arrive in {_CHECKSUMS_PATIENCE:g} s. Check the network and try "
                "again"
            ) from None
        except NotFoundError:
            if needed:
                raise
            return b""

    @asynccontextmanager
    async def _arrived(
        self, source: HttpSource, name: str, progress: Progress, sha256: str = "", size: int = 0, limit: int = 0
    ) -> AsyncIterator[Partial]:
        """A file from the network in an open partial, which outlives a failure."""
        partial = Partial(self._folder, _UNSAFE.sub("_", name)[-100:] or "archive")

        def publish(event: PullEvent) -> None:
            if isinstance(event, ChunkProgress):
                progress(event)
            elif isinstance(event, Status):
                progress(event.text)

        try:
            await in_thread(private_folder, self._folder)
            async with partial.opened():
                report = ProgressReport(publish, sha256)
                fetch = Fetch(
                    source, partial, report, sha256=sha256, size=size, limit=limit, policy=self._rules.policy
                )
                try:
                    await fetch.run()
                    await in_thread(partial.sync)
                    yield partial
                finally:
                    if not partial.size:
                        await in_thread(partial.discard)
        except OSError as error:
            raise disk_error(error, self._folder, partial.size, partial.state.total) from error


def _source(url: str) -> HttpSource | Path:
    """Where a URL or a path leads. Raises InstallError."""
    scheme = url.partition("://")[0].lower() if "://" in url else ""
    try:
        if scheme in ("http", "https"):
            return HttpSource.parse(url)
        if scheme == "file":
            return file_path(url)
        if not scheme and Path(url).expanduser().is_absolute():
            return Path(url).expanduser()
    except (ValueError, RuntimeError) as error:
        raise InstallError(f"{without_secrets(url)}: {error}") from error
    raise InstallError(
        f"{without_secrets(url)}: this is neither an http(s) or file:// URL nor an absolute path (which "
        "${PLUGIN_DIR} begins)"
    )


def _beside(url: str) -> str:
    """Where many projects put a file's digest."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path}.sha256"))


def _size(path: Path) -> int:
    if not path.is_file():
        raise InstallError(f"{path}: there is no such file. Correct the path in engine.archives")
    return path.stat().st_size


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_CHECKSUMS_LIMIT)


def _remove_files(folder: Path) -> None:
    if folder.is_dir():
        for entry in folder.iterdir():
            entry.unlink(missing_ok=True)
        folder.rmdir()
