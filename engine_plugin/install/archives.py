"""Unpacks untrusted release archives (.tar.gz, .tar.zst, .zip).

All members stay below the target directory: absolute paths, `..`, names that differ only by case or are invalid on
another system, devices, and links that lead out are rejected. The bytes are counted as they are unpacked, since
headers can lie. A failure leaves no files. Called by the installer after the digest of the archive was verified.

The `data` filter of tarfile is not used: it covers no .zip, no names of other systems, and no sizes.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import stat
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

from engine_plugin.download.disk import check_room, disk_reason
from engine_plugin.errors import DownloadError, InstallError
from engine_plugin.install.member_names import MemberTree, quoted_name
from engine_plugin.system.files import in_thread
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

__all__ = ["Limits", "unpack"]

_BLOCK = 1024 * 1024
SLICE = 0.1
"""Seconds of work per call in a thread; a cancellation takes effect between two calls. Tests set it."""

_HEADER_LIMIT = 1024 * 1024
"""The most bytes that tarfile may read at once: names and attributes are shorter."""

_DIRECTORY_LIMIT = 4 * 1024 * 1024
"""The most bytes that zipfile may read at once, such as the central directory: 20,000 members take half of it."""

_MOST_EMPTY_READS = 8
"""How many reads at the end of a tar are allowed: only a malicious header causes more."""

_ROOM_EVERY = 64 * 1024 * 1024
_TAR_END = bytes(tarfile.BLOCKSIZE)
_LINK_LIMIT = 4096
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"))


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one installation.

    `size` is in bytes; `ratio` is unpacked to packed bytes and applies above `floor`.
    """

    members: int = 20_000
    size: int = 32 * 1024**3
    ratio: int = 100
    floor: int = 256 * 1024**2


async def unpack(archives: Sequence[Path], target: Path, limits: Limits | None = None) -> None:
    """Unpack archives in order into the new directory `target`, as one tree.

    Files get mode 0644, or 0755 if the archive marks them as executable. Raises InstallError, also for a full disk.
    After a failure or a cancellation `target` does not exist.
    """
    await in_thread(target.mkdir, mode=0o755)
    work = _Unpacker(archives, target, limits or Limits()).steps()
    try:
        while await in_thread(_run_slice, work):
            pass
    except BaseException as error:
        await in_thread(work.close)
        await in_thread(shutil.rmtree, target, ignore_errors=True)
        if isinstance(error, OSError):
            reason = disk_reason(error, target.parent)
            raise InstallError(f"{error.filename or target}: {reason}. Nothing was kept.") from error
        raise


def _run_slice(work: Iterator[None]) -> bool:
    """Run steps for a slice of time; return whether more are left."""
    until = time.monotonic() + SLICE
    return any(time.monotonic() >= until for _ in work)


class _Unpacker:
    """One run of `unpack`, in small blocking steps."""

    def __init__(self, archives: Sequence[Path], target: Path, limits: Limits) -> None:
        self._archives = archives
        self._target = target
        self._limits = limits
        self._tree = MemberTree()
        self._links: list[tuple[Path, str, Path]] = []
        self._packed = 0
        self._size = 0
        self._checked = 0

    def steps(self) -> Generator[None, None, None]:
        """Unpack; yields at each point where it may be interrupted."""
        for archive in self._archives:
            self._packed += archive.stat().st_size
        for archive in self._archives:
            kind = _archive_kind(archive)
            try:
                yield from self._zip(archive) if kind == "zip" else self._tar(archive, kind)
            except Exception as error:  # archive readers raise any type of exception on hostile input
                if isinstance(error, InstallError) or (isinstance(error, OSError) and error.errno is not None):
                    raise
                raise InstallError(
                    f"{archive.name}: the archive is damaged ({error or type(error).__name__}). Install again; "
                    "if the error persists, the release itself is damaged"
                ) from error
        yield from self._make_links()

    # Limits

    def _count(self, size: int) -> None:
        """Count `size` unpacked bytes. Raises InstallError at a limit, or if the disk is nearly full."""
        self._size += size
        allowed = min(self._limits.size, max(self._limits.floor, self._limits.ratio * self._packed))
        if self._size > allowed:
            raise InstallError(
                f"{self._archive_names()}: unpacks to more than {byte_size(allowed)} from "
                f"{byte_size(self._packed)}, like an archive bomb. Nothing was installed; check the source of "
                "the archive"
            )
        if self._size >= self._checked:
            self._checked = self._size + _ROOM_EVERY
            try:
                check_room(self._target, _ROOM_EVERY)
            except DownloadError as error:
                raise InstallError.from_error(error) from error

    def _archive_names(self) -> str:
        return ", ".join(archive.name for archive in self._archives)

    def _place(self, archive: Path, name: str, kind: str) -> Path:
        """The path for a member, with its directories created. Raises InstallError."""
        parts = self._tree.add(name, kind)
        if isinstance(parts, str):
            raise _rejected(archive, name, parts)
        if len(self._tree) > self._limits.members:
            raise InstallError(
                f"{self._archive_names()}: more than {self._limits.members} members, the limit for a release"
            )
        place = self._target.joinpath(*parts)
        (place if kind == "directory" else place.parent).mkdir(mode=0o755, parents=True, exist_ok=True)
        return place

    def _write_file(self, place: Path, source: IO[bytes], *, executable: bool, counted: bool) -> Iterator[None]:
        """Write a new file."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(place, flags, 0o755 if executable else 0o644), "wb", buffering=0) as file:
            while block := source.read(_BLOCK):
                if not counted:
                    self._count(len(block))
                view = memoryview(block)
                while view:
                    view = view[file.write(view) :]
                yield
        yield

    # .tar.gz and .tar.zst

    def _tar(self, archive: Path, kind: str) -> Iterator[None]:
        with archive.open("rb") as packed, _decompressed(packed, kind) as stream:
            tape = _CountingTar(stream, self._count)
            with tarfile.open(fileobj=cast("IO[bytes]", tape), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    yield from self._tar_member(archive, tar, member)
            if tape.last_block != _TAR_END:
                raise InstallError(f"{archive.name}: the archive is truncated or damaged. Install again")
            while tape.read_some(_BLOCK):  # the checksum is at the end
                yield

    def _tar_member(self, archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[None]:
        if member.isdir():
            self._place(archive, member.name, "directory")
        elif member.issym():
            self._links.append((archive, member.linkname, self._place(archive, member.name, "link")))
            self._tree.set_target(member.name, member.linkname)
        elif member.islnk():
            place = self._place(archive, member.name, "copy")
            self._tree.set_target(member.name, member.linkname)
            self._links.append((archive, member.linkname, place))
        elif member.isreg() and not member.issparse():
            place = self._place(archive, member.name, "file")
            source = tar.extractfile(member)
            if source is not None:
                yield from self._write_file(place, source, executable=bool(member.mode & 0o111), counted=True)
        else:
            raise _rejected(archive, member.name, "is a device, a pipe or another special file")
        yield

    # .zip

    def _zip(self, archive: Path) -> Iterator[None]:
        with _BoundedZip(archive) as packed, zipfile.ZipFile(packed) as file:
            for info in file.infolist():
                yield from self._zip_member(archive, file, info)

    def _zip_member(self, archive: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[None]:
        name = info.orig_filename.replace("\\", "/")  # as some tools on Windows write
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InstallError(
                f"{archive.name}: the member {quoted_name(name)} has an unsupported compression method"
            )
        if info.flag_bits & 0x1:
            raise InstallError(
                f"{archive.name}: the member {quoted_name(name)} is encrypted. Name an archive without a password"
            )
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode)
        if name.endswith("/") or kind == stat.S_IFDIR:
            self._place(archive, name, "directory")
        elif kind == stat.S_IFLNK:
            with file.open(info) as source:
                link = source.read(_LINK_LIMIT + 1).decode("utf-8", "replace")
            self._links.append((archive, link, self._place(archive, name, "link")))
            self._tree.set_target(name, link)
        elif kind in (0, stat.S_IFREG):
            place = self._place(archive, name, "file")
            with file.open(info) as source:
                yield from self._write_file(place, source, executable=bool(mode & 0o111), counted=False)
        else:
            raise _rejected(archive, name, "is a device, a pipe or another special file")
        yield

    # Links are created last, when all their targets exist.

    def _make_links(self) -> Iterator[None]:
        for archive, link, place in self._links:
            name = place.relative_to(self._target).as_posix()
            found = self._tree.resolve(name)
            if isinstance(found, str):
                raise _rejected(archive, name, found)
            end = self._target.joinpath(*found)
            if self._tree.kind(name) == "link" and sys.platform != "win32":
                os.symlink(link, place)  # noqa: PTH211  # the link's text, not a path
            elif end.is_file():  # a hard link, or Windows, where symbolic links need a privilege
                with end.open("rb") as source:
                    executable = bool(end.stat().st_mode & 0o111)
                    yield from self._write_file(place, source, executable=executable, counted=False)
            else:
                raise _rejected(archive, name, "is a hard link to a directory")
            yield


def _rejected(archive: Path, name: str, why: str) -> InstallError:
    return InstallError(
        f"{archive.name}: the member {quoted_name(name)} {why}. Nothing was installed; check the source of the "
        "archive"
    )


def _archive_kind(archive: Path) -> str:
    """The kind of an archive, by its first bytes rather than by its name."""
    with archive.open("rb") as file:
        start = file.read(4)
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    raise InstallError(
        f"{archive.name}: not a supported archive (it begins with {start!r}). Name a .tar.gz, .tar.zst or .zip file"
    )


def _decompressed(packed: IO[bytes], kind: str) -> IO[bytes]:
    return cast("IO[bytes]", gzip.GzipFile(fileobj=packed) if kind == "gzip" else _zstd().ZstdFile(packed))


def _zstd() -> Any:
    """The module for Zstandard, imported on demand."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


class _BoundedZip(io.FileIO):
    """The file of a .zip for zipfile, which limits the size of each read and so of the central directory."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _DIRECTORY_LIMIT:
            raise ValueError(f"its central directory has {size} bytes")
        return super().read(_DIRECTORY_LIMIT if size is None or size < 0 else size)


class _CountingTar:
    """A decompressed tar for tarfile, which counts the bytes and limits the size of each read.

    tarfile only moves forward, except by one byte after it has skipped a member.
    """

    def __init__(self, stream: IO[bytes], count: Callable[[int], None]) -> None:
        self.last_block = b""
        """The result of the last read."""
        self._stream = stream
        self._count = count
        self._at = 0
        self._empty_reads = 0

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_LIMIT:
            raise ValueError(f"a header asks for {size} bytes")
        data = b""
        while len(data) < size and (more := self.read_some(size - len(data))):
            data += more
        self.last_block = data
        self._empty_reads += not data and size > 0
        if self._empty_reads > _MOST_EMPTY_READS:
            raise EOFError("it ends within a header")
        return data

    def seek(self, offset: int) -> None:
        if offset < self._at:
            raise ValueError("a header points backwards")
        while self._at < offset and self.read_some(min(_BLOCK, offset - self._at)):
            pass

    def read_some(self, size: int) -> bytes:
        """The next bytes, at most `size`; none at the end."""
        data = self._stream.read(size)
        self._at += len(data)
        self._count(len(data))
        return data
