"""Release archives of engines: selection for this machine, download and verification.

A file comes from a URL, from a path or, with `engine.offline`, from one directory. Only a file with the expected
SHA-256 is used. The drivers provide the lists of archives.
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from engine_plugin import catalogue
from engine_plugin.download.disk import disk_error
from engine_plugin.download.events import ChunkProgress, StepStarted
from engine_plugin.download.fetch import Fetch, ProgressReport
from engine_plugin.download.partial import Partial
from engine_plugin.download.remote import FetchPolicy
from engine_plugin.download.source import HttpSource, file_path, without_secrets
from engine_plugin.errors import AuthError, DownloadError, InstallError, NotFoundError
from engine_plugin.install.options import Archive
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.manifest import platform_key
from engine_plugin.system.files import in_thread, sha256_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.base import Progress

__all__ = ["Archive", "Downloads", "find_digest", "likely_accelerators", "select_archives"]

_HEX64 = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})")
_LISTED = re.compile(r"(?:sha256:)?([0-9a-fA-F]{64})\s+[ *]?(\S.*)")
_BSD = re.compile(r"SHA256\s*\((.+)\)\s*=\s*([0-9a-fA-F]{64})", re.IGNORECASE)
CHECKSUMS_LIMIT = 8 * 1024 * 1024
"""The most bytes of a checksum file. Tests set it."""
_CHECKSUMS_TIMEOUT = 300.0
"""Seconds for a checksum file, so that a slow server cannot block an installation forever."""
_CHECKSUM_FILES = ("SHA256SUMS", "checksums.txt")
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
NVIDIA = Path("/proc/driver/nvidia/version")
"""What exists where NVIDIA's driver is loaded. Tests set it."""


def likely_accelerators(platform: str) -> tuple[str, ...]:
    """The accelerators that `auto` tries, best first. Only those that are detected without a driver, and the CPU."""
    if platform == "darwin_arm64":
        return ("metal", "cpu")  # each of these machines has Metal
    if platform.startswith("linux_") and sys.platform == "linux" and NVIDIA.exists():
        return ("cuda", "cpu")
    return ("cpu",)


def select_archives(archives: Sequence[Archive], accelerator: str, platform: str = "") -> tuple[Archive, ...]:
    """The archives to install on this machine. Raises InstallError with the available ones."""
    platform = platform or platform_key()
    system, _, machine = platform.partition("_")
    fitting = [entry for entry in archives if entry.os in ("", system) and entry.arch in ("", machine)]
    for wanted in likely_accelerators(platform) if accelerator == "auto" else (accelerator,):
        if found := tuple(entry for entry in fitting if entry.accelerator == wanted):
            return found
    available = ", ".join(sorted({entry.accelerator for entry in fitting}))
    if available:
        raise InstallError(
            f"engine.accelerator: no archive for {accelerator} on {platform}. Set one of {available}, or add an "
            "archive to engine.archives"
        )
    raise InstallError(
        f"engine.archives: no archive for this machine ({platform}). Add one, or set another engine.backend"
    )


def find_digest(content: bytes, name: str) -> str:
    """The SHA-256 of the file `name` in a checksum file, as 64 hex digits; "" if it is missing.

    Supported are lines `HEX  name`, `HEX *name` and `SHA256 (name) = HEX`, a single digest, and GitHub's JSON
    description of a release.
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
class Downloads:
    """Downloads and verifies archives. The caller holds the lock of the installation.

    Archives that plugin.yaml names by a path are not copied.
    """

    folder: Path
    """It keeps downloaded files, also partial ones, until `clear`."""

    offline_dir: Path
    """The only place that files are taken from with `offline`."""

    offline: bool = False
    verify: bool = True
    """Whether a file whose SHA-256 is unknown is refused."""

    policy: FetchPolicy = field(default_factory=FetchPolicy)

    async def clear(self) -> None:
        """Delete all downloaded files."""
        await in_thread(self.remove_older, math.inf)

    def remove_older(self, than: float) -> None:
        """Delete the files from before `than`, in seconds since the epoch: a later switch has used them. Blocking."""
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.stat().st_mtime <= than:
                    entry.unlink(missing_ok=True)
            with suppress(OSError):  # newer files are left
                self.folder.rmdir()

    async def get(self, archive: Archive, progress: Progress) -> Path:
        """The complete and verified file of an archive. Raises InstallError or AuthError."""
        try:
            source = self._source(archive.url)
            if isinstance(source, Path):
                return await self._verify_local(source, archive, progress)
            return await self._download(source, archive, progress)
        except AuthError as error:
            raise AuthError.from_error(
                error,
                f"{error} Put the credentials for an installation into the URL, https://user:password@host/…; if the "
                "server limits requests, try again later",
            ) from error
        except (DownloadError, NotFoundError) as error:
            raise InstallError.from_error(error) from error
        except OSError as error:
            raise InstallError(f"{error.filename or archive.label}: {error.strerror or error}") from error

    def _source(self, url: str) -> HttpSource | Path:
        """Where a file comes from. Raises InstallError."""
        source = _parse(url)
        return self.offline_dir / source.file_name if self.offline and isinstance(source, HttpSource) else source

    def _size(self, path: Path, archive: Archive) -> int:
        if path.is_file():
            return path.stat().st_size
        if path.parent == self.offline_dir:
            raise InstallError(
                f"engine.offline is true, but {path} is missing. Download {archive.label} on another machine and "
                f"copy it there, with its SHA-256 as {path.name}.sha256 (or in engine.archives)"
            )
        raise InstallError(f"{path}: the file does not exist. Correct the path in engine.archives")

    async def _verify_local(self, path: Path, archive: Archive, progress: Progress) -> Path:
        size = await in_thread(self._size, path, archive)
        if archive.size and size != archive.size:
            raise InstallError(f"{path}: size mismatch: expected {archive.size} bytes, got {size}")
        beside = [f"{path}.sha256", *(str(path.parent / name) for name in _CHECKSUM_FILES)]
        expected = await self._expected_digest(archive, path.name, beside, progress)
        progress(f"verifying {path}")
        digest = (await sha256_of(path)).removeprefix("sha256:")
        if expected and digest != expected:
            raise _mismatch(str(path), digest, expected, "Replace the file")
        return path

    async def _download(self, source: HttpSource, archive: Archive, progress: Progress) -> Path:
        name = source.file_name
        expected = await self._expected_digest(archive, name, [_digest_url(archive.url)], progress)
        partial = await self._downloaded(source, name, progress, expected, archive.size)
        digest = partial.hexdigest()
        if not expected or digest == expected:
            return partial.path
        await in_thread(partial.discard)
        fix = "The download was deleted. Try again; if the error persists, correct the digest or the source"
        raise _mismatch(source.label, digest, expected, fix)

    async def _expected_digest(
        self, archive: Archive, name: str, candidates: Sequence[str], progress: Progress
    ) -> str:
        """The digest that the file must have, "" if unknown. Raises InstallError if it is unknown but required."""
        if archive.sha256:
            return archive.sha256.lower().removeprefix("sha256:")
        for place in (archive.checksums,) if archive.checksums else candidates:
            listed = await self._read_checksums(place, progress, needed=bool(archive.checksums))
            found = await in_thread(find_digest, listed, name)
            if found:
                return found
        if not self.verify:
            progress(f"{name} is not verified: its SHA-256 is unknown, and engine.verify is false")
            return ""
        where = without_secrets(archive.checksums) or " or ".join(without_secrets(guess) for guess in candidates)
        raise InstallError(
            f"{name}: the SHA-256 is unknown and not in {where}. Set it in engine.archives (sha256), name a checksum "
            "file (checksums), or set engine.verify to false"
        )

    async def _read_checksums(self, place: str, progress: Progress, *, needed: bool) -> bytes:
        """The content of a checksum file; empty if it is missing and not `needed`."""
        source = self._source(place)
        if isinstance(source, Path):
            return await in_thread(_head, source) if source.is_file() else b""
        try:
            async with asyncio.timeout(_CHECKSUMS_TIMEOUT):
                partial = await self._downloaded(source, "checksums", progress, limit=CHECKSUMS_LIMIT)
                try:
                    return await in_thread(_head, partial.path) if partial.size else b""
                finally:
                    await in_thread(partial.discard)
        except TimeoutError:
            raise InstallError(
                f"{source.label}: the download took more than {_CHECKSUMS_TIMEOUT:g} s. Check the network and "
                "try again"
            ) from None
        except NotFoundError:
            if needed:
                raise
            return b""

    async def _downloaded(
        self, source: HttpSource, name: str, progress: Progress, sha256: str = "", size: int = 0, limit: int = 0
    ) -> Partial:
        """Download a file into a partial, which is kept after a failure.

        A file with a `limit` in bytes is small, so its bytes are not reported.
        """
        partial = Partial(self.folder, _UNSAFE.sub("_", name)[-100:] or "archive")

        def publish(event: PullEvent) -> None:
            if isinstance(event, ChunkProgress) and not limit:
                progress(event)
            elif isinstance(event, StepStarted):
                progress(event.text)

        try:
            report = ProgressReport(publish, sha256)
            await Fetch(source, partial, report, self.policy, wanted=sha256, size=size, limit=limit).run()
        except OSError as error:
            raise disk_error(error, self.folder, partial.size, partial.state.total) from error
        return partial


def _parse(url: str) -> HttpSource | Path:
    """Parse a URL or a path. Raises InstallError."""
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
        f"{without_secrets(url)}: neither an http(s) or file:// URL nor an absolute path. ${{PLUGIN_DIR}} stands for "
        "the plugin's directory"
    )


def _digest_url(url: str) -> str:
    """The URL at which many projects publish the digest of a file."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path}.sha256"))


def _mismatch(place: str, digest: str, expected: str, fix: str) -> InstallError:
    return catalogue.CHECKSUM_MISMATCH.error_as(
        InstallError, place=f"{place}: the file", found=f"sha256:{digest}", wanted=f"sha256:{expected}", fix=fix
    )


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(CHECKSUMS_LIMIT)
