"""Unpacking release archives (.tar.gz, .tar.zst, .zip) that nobody need trust.

What is unpacked stays below its directory: no absolute or climbing path, no name that another system takes for
another one, no device, no link that leads out. Sizes are counted while they arrive, whatever the headers say. A
failure leaves nothing. Called by installers, after the archive's digest was verified.
"""

from __future__ import annotations

import contextlib
import gzip
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
from engine_plugin.download.sizes import byte_size
from engine_plugin.errors import DownloadError, InstallError
from engine_plugin.install.member_names import Tree, refusal
from engine_plugin.system.files import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from pathlib import Path

__all__ = ["Limits", "unpack"]

_BLOCK = 1024 * 1024
_TURN_S = 0.1
"""How long one call in a thread works: then whoever cancels is heard."""

_HEADER_LIMIT = 1024 * 1024
"""Longest piece that a tar's reader may ask for at once: names and attributes are shorter."""

_DIRECTORY_LIMIT = 4 * 1024 * 1024
"""Longest list of members that a .zip may have, or piece that its reader may ask for: 20,000 take half of that."""

_MOST_ENDS = 8
"""How often the end of a tar may be met: a reader that goes on asking is lost in a hostile header."""

_ROOM_EVERY = 64 * 1024 * 1024
_TAR_END = bytes(tarfile.BLOCKSIZE)
_LINK_LIMIT = 4096
_MAGIC = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"))


@dataclass(frozen=True, slots=True)
class Limits:
    """What one installation may unpack at most. `ratio` is unpacked to packed bytes, and counts from `floor` on."""

    members: int = 20_000
    size: int = 32 * 1024**3
    ratio: int = 100
    floor: int = 256 * 1024**2


async def unpack(archives: Sequence[Path], target: Path, limits: Limits | None = None) -> None:
    """Unpack archives one after the other into the new directory `target`; together they are one tree.

    Files may be read by all, written by their owner, and run when the archive says so. Raises InstallError, also for
    a full disk. However it fails, or is cancelled, `target` is gone again.
    """
    await in_thread(target.mkdir, mode=0o755)
    work = _Unpacking(archives, target, limits or Limits()).steps()
    try:
        while await in_thread(_turn, work):
            pass
    except BaseException as error:
        await in_thread(work.close)
        await in_thread(shutil.rmtree, target, ignore_errors=True)
        if isinstance(error, OSError):
            reason = disk_reason(error, target.parent)
            raise InstallError(f"{error.filename or target}: {reason}. Nothing was kept.") from error
        raise


def _turn(work: Iterator[None]) -> bool:
    """Work for a moment; whether there is more to do."""
    until = time.monotonic() + _TURN_S
    return any(time.monotonic() >= until for _ in work)


class _Unpacking:
    """One run of `unpack`. Blocking, in small steps."""

    def __init__(self, archives: Sequence[Path], target: Path, limits: Limits) -> None:
        self._archives = archives
        self._target = target
        self._limits = limits
        self._tree = Tree()
        self._links: list[tuple[Path, str, Path]] = []
        self._packed = 0
        self._size = 0
        self._checked = 0

    def steps(self) -> Generator[None, None, None]:
        """Do it; yields where it may be interrupted."""
        for archive in self._archives:
            self._packed += archive.stat().st_size
        for archive in self._archives:
            kind = _kind(archive)
            try:
                yield from self._zip(archive) if kind == "zip" else self._tar(archive, kind)
            except Exception as error:  # archive readers raise any type of exception on hostile input
                if isinstance(error, InstallError) or (isinstance(error, OSError) and error.errno is not None):
                    raise
                raise InstallError(
                    f"{archive.name}: the archive is damaged ({error or type(error).__name__}). Install again; if it "
                    "stays so, the release itself is damaged."
                ) from error
        yield from self._make_links()

    # What is counted

    def _count(self, size: int) -> None:
        """`size` more bytes came out. Raises InstallError at a limit, or when the disk is about to be full."""
        self._size += size
        allowed = min(self._limits.size, max(self._limits.floor, self._limits.ratio * self._packed))
        if self._size > allowed:
            raise InstallError(
                f"{self._names()}: more than {byte_size(allowed)} come out of {byte_size(self._packed)}: this is no "
                "release but a bomb. Nothing was kept; check where the archive comes from."
            )
        if self._size >= self._checked:
            self._checked = self._size + _ROOM_EVERY
            try:
                check_room(self._target, _ROOM_EVERY)
            except DownloadError as error:
                raise InstallError.retold(error) from error

    def _names(self) -> str:
        return ", ".join(archive.name for archive in self._archives)

    def _enter(self, archive: Path, name: str, kind: str) -> Path:
        """Where a member comes to lie, its directories made. Raises InstallError."""
        parts = self._tree.add(name, kind)
        if isinstance(parts, str):
            raise _refused(archive, name, parts)
        if len(self._tree) > self._limits.members:
            raise InstallError(f"{self._names()}: more than {self._limits.members} members: this is no release.")
        place = self._target.joinpath(*parts)
        (place if kind == "directory" else place.parent).mkdir(mode=0o755, parents=True, exist_ok=True)
        return place

    def _file(self, place: Path, source: IO[bytes], *, executable: bool, counted: bool) -> Iterator[None]:
        """Write one new file."""
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
            tape = _Tape(stream, self._count)
            with tarfile.open(fileobj=cast("IO[bytes]", tape), mode="r:") as tar:
                while (member := tar.next()) is not None:
                    yield from self._tar_member(archive, tar, member)
            if tape.last != _TAR_END:
                raise InstallError(f"{archive.name}: the archive is cut off or damaged. Install again.")
            while tape.skip(_BLOCK):  # up to the checksum at the end
                yield

    def _tar_member(self, archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[None]:
        if member.isdir():
            self._enter(archive, member.name, "directory")
        elif member.issym():
            self._links.append((archive, member.linkname, self._enter(archive, member.name, "link")))
            self._tree.point(member.name, member.linkname)
        elif member.islnk():
            place = self._enter(archive, member.name, "copy")
            self._tree.point(member.name, member.linkname)
            self._links.append((archive, member.linkname, place))
        elif member.isreg() and not member.issparse():
            place = self._enter(archive, member.name, "file")
            source = tar.extractfile(member)
            if source is not None:
                yield from self._file(place, source, executable=bool(member.mode & 0o111), counted=True)
        else:
            raise _refused(archive, member.name, "is a device, a pipe or something else that no release needs")
        yield

    # .zip

    def _zip(self, archive: Path) -> Iterator[None]:
        with archive.open("rb") as packed, zipfile.ZipFile(cast("IO[bytes]", _Directory(packed))) as file:
            for info in file.infolist():
                yield from self._zip_member(archive, file, info)

    def _zip_member(self, archive: Path, file: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[None]:
        name = info.orig_filename.replace("\\", "/")  # some tools on Windows write it so
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InstallError(f"{archive.name}: {refusal(name)} is packed in a way that cannot be read here.")
        if info.flag_bits & 0x1:
            raise InstallError(f"{archive.name}: {refusal(name)} is encrypted. Name an archive without a password.")
        mode = info.external_attr >> 16
        kind = stat.S_IFMT(mode)
        if name.endswith("/") or kind == stat.S_IFDIR:
            self._enter(archive, name, "directory")
        elif kind == stat.S_IFLNK:
            with file.open(info) as source:
                link = source.read(_LINK_LIMIT + 1).decode("utf-8", "replace")
            self._links.append((archive, link, self._enter(archive, name, "link")))
            self._tree.point(name, link)
        elif kind in (0, stat.S_IFREG):
            place = self._enter(archive, name, "file")
            with file.open(info) as source:
                yield from self._file(place, source, executable=bool(mode & 0o111), counted=False)
        else:
            raise _refused(archive, name, "is a device, a pipe or something else that no release needs")
        yield

    # Links come last, when it is known what is there.

    def _make_links(self) -> Iterator[None]:
        for archive, link, place in self._links:
            name = place.relative_to(self._target).as_posix()
            found = self._tree.follow(name)
            if isinstance(found, str):
                raise _refused(archive, name, found)
            end = self._target.joinpath(*found)
            if self._tree.kind(name) == "link" and sys.platform != "win32":
                os.symlink(link, place)  # noqa: PTH211  # the text as it came, not a path of ours
            elif end.is_file():  # a hard link; and Windows lets only some users make symbolic ones
                with end.open("rb") as source:
                    executable = bool(end.stat().st_mode & 0o111)
                    yield from self._file(place, source, executable=executable, counted=False)
            else:
                raise _refused(archive, name, "leads to a directory, which such a link cannot")
            yield


def _refused(archive: Path, name: str, why: str) -> InstallError:
    return InstallError(
        f"{archive.name}: the member {refusal(name)} {why}. Nothing was kept; check where the archive comes from."
    )


def _kind(archive: Path) -> str:
    """What an archive is by its first bytes: names lie more often."""
    with archive.open("rb") as file:
        start = file.read(4)
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    raise InstallError(
        f"{archive.name}: this is no archive of a kind that can be unpacked; it begins with {start!r}. "
        "Name a .tar.gz, .tar.zst or .zip."
    )


@contextlib.contextmanager
def _decompressed(packed: IO[bytes], kind: str) -> Iterator[IO[bytes]]:
    if kind == "gzip":
        with gzip.GzipFile(fileobj=packed, mode="rb") as plain:
            yield cast("IO[bytes]", plain)
        return
    with _zstd().ZstdFile(packed, mode="rb") as plain:
        yield plain


def _zstd() -> Any:
    """The module for Zstandard, imported only for an archive that needs it."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


class _BrokenError(Exception):
    """The archive contradicts itself."""


class _Directory:
    """The file of a .zip as zipfile wants it, whose list of members is not read whole if it is longer than any
    release's."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_LIMIT:
            raise _BrokenError(f"its list of members has {size} bytes")
        return self._file.read(_DIRECTORY_LIMIT if size < 0 else size)


class _Tape:
    """A decompressed tar as tarfile wants it: bytes are counted, and nothing is read whole because a header says so.

    tarfile goes forward only, but for one byte when it has skipped a member.
    """

    def __init__(self, stream: IO[bytes], count: Callable[[int], None]) -> None:
        self.last = b""
        """What the last read gave."""
        self._stream = stream
        self._count = count
        self._at = 0
        self._ends = 0

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _HEADER_LIMIT:
            raise _BrokenError(f"a header asks for {size} bytes")
        data = b""
        while len(data) < size and (more := self._pull(size - len(data))):
            data += more
        self.last = data
        self._ends += not data and size > 0
        if self._ends > _MOST_ENDS:
            raise EOFError("it ends inside a header")
        return data

    def seek(self, offset: int) -> None:
        if offset < self._at:
            raise _BrokenError("a header points backwards")
        while self._at < offset and self.skip(min(_BLOCK, offset - self._at)):
            pass

    def skip(self, size: int) -> bool:
        """Pass over some bytes; False at the end."""
        return bool(self._pull(size))

    def _pull(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._at += len(data)
        self._count(len(data))
        return data
