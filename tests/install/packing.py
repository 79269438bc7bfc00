"""Archives for tests, good and evil ones."""

from __future__ import annotations

import gzip
import io
import stat
import sys
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Member", "pack", "tar_bytes", "zip_bytes"]


@dataclass(frozen=True)
class Member:
    """One member: a file unless `link` (symbolic), `hard` or `kind` (a type of tarfile's) says otherwise."""

    name: str
    data: bytes = b""
    mode: int = 0o644
    link: str = ""
    hard: str = ""
    kind: bytes = b""


def _zstd() -> Any:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd


def tar_bytes(members: Sequence[Member]) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.mode, info.size = member.mode, len(member.data)
            if member.link or member.hard:
                info.type = tarfile.SYMTYPE if member.link else tarfile.LNKTYPE
                info.linkname = member.link or member.hard
            elif member.kind:
                info.type = member.kind
            elif member.name.endswith("/"):
                info.type = tarfile.DIRTYPE
            tar.addfile(info, io.BytesIO(member.data))
    return plain.getvalue()


def zip_bytes(members: Sequence[Member]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for member in members:
            info = zipfile.ZipInfo("x")
            info.filename = member.name  # past what the constructor makes of it
            info.create_system = 3
            info.compress_type = zipfile.ZIP_DEFLATED
            kind = stat.S_IFLNK if member.link else stat.S_IFDIR if member.name.endswith("/") else stat.S_IFREG
            kind = stat.S_IFIFO if member.kind == tarfile.FIFOTYPE else kind
            info.external_attr = (kind | member.mode) << 16
            with warnings.catch_warnings(action="ignore"):  # of names that occur twice
                file.writestr(info, member.link.encode() if member.link else member.data)
    return packed.getvalue()


def pack(path: Path, members: Sequence[Member]) -> Path:
    """Write an archive of the kind that the path's end says."""
    if path.name.endswith(".zip"):
        data = zip_bytes(members)
    elif path.name.endswith(".tar.zst"):
        zstd = _zstd()
        data = zstd.compress(tar_bytes(members), options={zstd.CompressionParameter.checksum_flag: 1})
    else:
        data = gzip.compress(tar_bytes(members), compresslevel=1)
    path.write_bytes(data)
    return path
