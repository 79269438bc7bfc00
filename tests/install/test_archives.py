"""Unpacking of archives: releases are unpacked completely, malicious archives are rejected without remains."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import shutil
import stat
import sys
import tarfile
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InstallError
from engine_plugin.install import archives
from engine_plugin.install.archives import Limits, unpack
from engine_plugin.system.files import in_thread
from tests.install.packing import Member, pack, tar_bytes, zip_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

KINDS = ("tar.gz", "tar.zst", "zip")
posix = pytest.mark.skipif(sys.platform == "win32", reason="modes and symbolic links as POSIX has them")


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


async def refused(tmp_path: Path, archive: Path, match: str, limits: Limits | None = None) -> None:
    """Assert that the archive is rejected and leaves no file in its directory or beside it."""
    before = everything(tmp_path)
    with pytest.raises(InstallError, match=match) as caught:
        await unpack([archive], tmp_path / "target", limits)
    assert "Traceback" not in str(caught.value)
    assert everything(tmp_path) == before


@posix
@pytest.mark.parametrize("kind", KINDS)
async def test_release_is_unpacked_completely(tmp_path: Path, kind: str) -> None:
    """Links to shared libraries form chains, and a link may precede its target."""
    members = [
        Member("llama-b1/"),
        Member("llama-b1/libggml.so", link="libggml.so.0"),
        Member("llama-b1/libggml.so.0", link="./libggml.so.0.1"),
        Member("llama-b1/libggml.so.0.1", b"library" * 300_000),
        Member("llama-b1/llama-server", b"#!/bin/sh\n", mode=0o4755),
        Member("llama-b1/share/readme.txt", "grüße".encode(), mode=0o666),
        Member("llama-b1/share/up", link="../llama-server"),
        Member("llama-b1/empty", b""),
        Member("./llama-b1/Ünïcode", b"x"),
    ]
    archive = pack(tmp_path / f"release.{kind}", members)
    await unpack([archive], tmp_path / "target")
    root = tmp_path / "target" / "llama-b1"
    assert (root / "libggml.so").read_bytes() == b"library" * 300_000
    assert (root / "libggml.so").readlink() == Path("libggml.so.0")
    assert (root / "share" / "up").read_bytes() == b"#!/bin/sh\n"
    assert (root / "Ünïcode").read_bytes() == b"x"
    server = (root / "llama-server").stat().st_mode
    assert server & stat.S_IXUSR
    assert not server & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH)
    readme = (root / "share" / "readme.txt").stat().st_mode
    assert not readme & (stat.S_IXUSR | stat.S_IWOTH)


@pytest.mark.promise("P15")
async def test_hard_links_become_files(tmp_path: Path) -> None:
    members = [Member("d/copy", hard="./d/real"), Member("d/real", b"content", mode=0o755)]
    await unpack([pack(tmp_path / "a.tar.gz", members)], tmp_path / "target")
    assert tree(tmp_path / "target") == {"d/copy": b"content", "d/real": b"content"}


async def test_several_archives_make_one_tree(tmp_path: Path) -> None:
    first = pack(tmp_path / "first.zip", [Member("server.exe", b"1"), Member("lib/a.dll", b"2")])
    second = pack(tmp_path / "second.zip", [Member("cuda.dll", b"3"), Member("lib/b.dll", b"4")])
    await unpack([first, second], tmp_path / "target")
    expected = {"server.exe": b"1", "lib/a.dll": b"2", "cuda.dll": b"3", "lib/b.dll": b"4"}
    assert tree(tmp_path / "target") == expected
    with pytest.raises(InstallError, match=r"second.zip: the member 'cuda.dll' occurs twice"):
        await unpack([first, second, second], tmp_path / "again")
    assert not (tmp_path / "again").exists()


async def test_backslashes_in_zip_names_separate_directories(tmp_path: Path) -> None:
    await unpack([pack(tmp_path / "a.zip", [Member("bin\\llama-server.exe", b"x")])], tmp_path / "target")
    assert tree(tmp_path / "target") == {"bin/llama-server.exe": b"x"}


EVIL_NAMES = [
    ("../evil", "leads out"),
    ("a/../../evil", "leads out"),
    ("/etc/evil", "absolute path"),
    ("C:/evil", "invalid on some systems"),
    ("a/con.txt", "invalid on some systems"),
    ("a/LPT1", "invalid on some systems"),
    ("a/b?", "invalid on some systems"),
    ("a/b ", "invalid on some systems"),
    ("a/b.", "invalid on some systems"),
    ("a/b\x1b[31m", "invalid on some systems"),
    ("a/" + "n" * 300, "a name of more than"),
    ("/".join(["deep"] * 300), "a path of more than"),
    ("/".join(["d"] * 100), "more than 64 levels"),
]


@pytest.mark.promise("P15")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "why"), EVIL_NAMES, ids=[repr(name)[:20] for name, _ in EVIL_NAMES])
async def test_member_with_an_unsafe_name_is_rejected(tmp_path: Path, kind: str, name: str, why: str) -> None:
    archive = pack(tmp_path / f"evil.{kind}", [Member("good", b"good"), Member(name, b"evil")])
    await refused(tmp_path, archive, why)


@pytest.mark.promise("P15")
async def test_member_with_backslashes_that_leads_out_is_rejected(tmp_path: Path) -> None:
    await refused(tmp_path, pack(tmp_path / "evil.zip", [Member("..\\..\\evil", b"x")]), "leads out")
    await refused(tmp_path, pack(tmp_path / "evil.tar.gz", [Member("..\\evil", b"x")]), "invalid on some systems")


@pytest.mark.promise("P15")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([Member("out", link="/etc")], "not a path in the archive"),
        ([Member("out", link="../..")], "out of its directory"),
        ([Member("a/out", link="../../etc/passwd")], "out of its directory"),
        ([Member("out", link="absent")], "not in the archive"),
        ([Member("one", link="two"), Member("two", link="one")], "cycle of links"),
        ([Member("self", link="self")], "cycle of links"),
        ([Member("d/"), Member("ln", link="d"), Member("ln/evil", b"x")], "another member, a link"),
        ([Member("d/x", b""), Member("ln", link="d"), Member("far", link="ln/../../etc")], "through another one"),
        ([Member("f", b"x"), Member("f/evil", b"x")], "another member, a file"),
        ([Member("f", b"x"), Member("f", b"y")], "occurs twice"),
        ([Member("Read", b"x"), Member("read", b"y")], "differs only by case"),
        ([Member("Dir/a", b"x"), Member("dir/b", b"y")], "differs only by case"),
        ([Member("\u00e9", b"x"), Member("e\u0301", b"y")], "differs only by case"),
        ([Member("pipe", kind=tarfile.FIFOTYPE)], "a device, a pipe"),
    ],
)
async def test_unsafe_links_and_duplicate_members_are_rejected(
    tmp_path: Path, kind: str, members: list[Member], why: str
) -> None:
    await refused(tmp_path, pack(tmp_path / f"evil.{kind}", members), why)


@pytest.mark.promise("P15")
@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.GNUTYPE_SPARSE])
async def test_devices_and_sparse_files_are_rejected(tmp_path: Path, kind: bytes) -> None:
    archive = pack(tmp_path / "evil.tar.gz", [Member("dev", kind=kind)])
    await refused(tmp_path, archive, "a device, a pipe|damaged")


@pytest.mark.promise("P15")
@pytest.mark.parametrize(("hard", "why"), [("../../etc/passwd", "out of its"), ("/etc/passwd", "not a path"),
                                           ("absent", "not in the archive"), ("d", "to a directory")])  # fmt: skip
async def test_hard_link_that_leads_out_is_rejected(tmp_path: Path, hard: str, why: str) -> None:
    await refused(tmp_path, pack(tmp_path / "evil.tar.gz", [Member("d/"), Member("copy", hard=hard)]), why)


@pytest.mark.promise("P15")
@pytest.mark.parametrize("kind", KINDS)
async def test_archive_bomb_is_rejected(tmp_path: Path, kind: str) -> None:
    archive = pack(tmp_path / f"bomb.{kind}", [Member("zeros", bytes(8 << 20))])
    await refused(tmp_path, archive, "archive bomb", Limits(floor=1 << 20))
    await refused(tmp_path, archive, "archive bomb", Limits(size=1 << 20))
    await unpack([archive], tmp_path / "target")


@pytest.mark.promise("P15")
async def test_archive_bomb_with_a_false_size_is_rejected(tmp_path: Path) -> None:
    data = bytearray(zip_bytes([Member("zeros", bytes(4 << 20))]))
    for signature, place in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + place
        data[at : at + 4] = (1000).to_bytes(4, "little")
    (tmp_path / "bomb.zip").write_bytes(data)
    await refused(tmp_path, tmp_path / "bomb.zip", "damaged", Limits(floor=1 << 20))


async def test_archive_with_too_many_members_is_rejected(tmp_path: Path) -> None:
    archive = pack(tmp_path / "many.zip", [Member(f"{number}", b"") for number in range(30)])
    await refused(tmp_path, archive, "more than 20 members", Limits(members=20))
    deep = pack(tmp_path / "deep.tar.gz", [Member("a/b/c/d/e/f", b"")])
    await refused(tmp_path, deep, "more than 5 members", Limits(members=5))


@pytest.mark.promise("P15")
async def test_header_that_requests_all_memory_is_rejected(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = tarfile.XHDTYPE, 5 << 30
    (tmp_path / "evil.tar.gz").write_bytes(gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(10_000)))
    await refused(tmp_path, tmp_path / "evil.tar.gz", r"damaged \(a header asks for")


@pytest.mark.parametrize("kind", KINDS)
async def test_truncated_archive_is_rejected(tmp_path: Path, kind: str) -> None:
    whole = pack(tmp_path / f"whole.{kind}", [Member("a", os.urandom(200_000)), Member("b", b"x")])
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{kind}"
    for size in (len(data) - 1, len(data) // 2, 100, 5):
        cut.write_bytes(data[:size])
        await refused(tmp_path, cut, "damaged|truncated")


async def test_tar_without_end_marker_is_rejected(tmp_path: Path) -> None:
    data = tar_bytes([Member("a", b"x" * 512)])[: 2 * 512]
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(data))
    await refused(tmp_path, tmp_path / "cut.tar.gz", "truncated or damaged")


@pytest.mark.parametrize("kind", KINDS)
async def test_flipped_byte_is_detected_or_harmless(tmp_path: Path, kind: str) -> None:
    """No changed byte causes another exception or leaves a file."""
    dice = random.Random(kind)  # noqa: S311  # the same at each run
    whole = pack(tmp_path / f"whole.{kind}", [Member("a/b", dice.randbytes(3000)), Member("l", link="a/b")])
    data = whole.read_bytes()
    broken = tmp_path / f"broken.{kind}"
    found = 0
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 1, 5))):
            damaged[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        broken.write_bytes(damaged)
        try:
            await unpack([broken], tmp_path / "target")
        except InstallError:
            found += 1
            assert not (tmp_path / "target").exists()
        else:
            shutil.rmtree(tmp_path / "target")
    assert found > 75


async def test_file_that_is_not_an_archive_is_rejected(tmp_path: Path) -> None:
    page = tmp_path / "release.tar.gz"
    page.write_bytes(b"<html>Sign in first</html>")
    await refused(tmp_path, page, r"not a supported archive .* begins with b'<htm'.* Name a .tar.gz")
    page.write_bytes(b"")
    await refused(tmp_path, page, "not a supported archive")


async def test_encrypted_zip_is_rejected(tmp_path: Path) -> None:
    data = bytearray(zip_bytes([Member("secret", b"x")]))
    data[data.index(b"PK\x03\x04") + 6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(data)
    await refused(tmp_path, tmp_path / "locked.zip", "'secret' is encrypted")


async def test_unsupported_compression_is_rejected(tmp_path: Path) -> None:
    data = bytearray(zip_bytes([Member("odd", b"x")]))
    for signature, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = data.index(signature) + place
        data[at : at + 2] = (99).to_bytes(2, "little")
    (tmp_path / "odd.zip").write_bytes(data)
    await refused(tmp_path, tmp_path / "odd.zip", "unsupported compression method")


def chained(kind: bytes, data: bytes, depth: int) -> bytes:
    """A tar of headers that extend the next header: tarfile reads them recursively."""
    header = tarfile.TarInfo("././@LongLink" if kind == tarfile.GNUTYPE_LONGNAME else "pax")
    header.type, header.size = kind, len(data)
    block = header.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
    return block * depth + tar_bytes([Member("x", b"x")])


@pytest.mark.promise("X15")
@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
async def test_chain_of_headers_is_rejected_as_damaged(tmp_path: Path, kind: bytes) -> None:
    data = b"12 path=abc\n" if kind in (tarfile.XHDTYPE, tarfile.XGLTYPE) else b"name\0"
    (tmp_path / "chain.tar.gz").write_bytes(gzip.compress(chained(kind, data, 5000)))
    await refused(
        tmp_path, tmp_path / "chain.tar.gz", r"chain\.tar\.gz: the archive is damaged \(.+\)\. Install again"
    )


@pytest.mark.promise("X15")
@pytest.mark.parametrize(
    ("place", "bits", "why"),
    [(4, 112, "zip file version"), (6, 0x20, "patch"), (6, 0x40, "encrypt")],
    ids=["version needed", "patch data", "strong encryption"],
)
async def test_zip_of_an_unsupported_version_is_rejected_as_damaged(
    tmp_path: Path, place: int, bits: int, why: str
) -> None:
    """`place` is a byte in the local header of a member; in the central directory it is two bytes later."""
    data = bytearray(zip_bytes([Member("odd", b"x")]))
    data[data.index(b"PK\x03\x04") + place] |= bits
    data[data.index(b"PK\x01\x02") + place + 2] |= bits
    (tmp_path / "odd.zip").write_bytes(data)
    await refused(tmp_path, tmp_path / "odd.zip", rf"odd\.zip: the archive is damaged \(.*{why}")


@pytest.mark.promise("X15")
async def test_zip_with_an_oversized_central_directory_is_rejected(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
        file.writestr("x", b"")
        file.filelist *= 90_000
    await refused(tmp_path, tmp_path / "many.zip", r"many\.zip: the archive is damaged \(its central directory has")


@posix
@pytest.mark.promise("X15")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("link", [".", "./", "a/..", "a/../."])
async def test_link_to_the_root_is_a_link_to_a_directory(tmp_path: Path, kind: str, link: str) -> None:
    await unpack(
        [pack(tmp_path / f"x.{kind}", [Member("a/f", b"x"), Member("here", link=link)])], tmp_path / "target"
    )
    assert (tmp_path / "target" / "here" / "a" / "f").read_bytes() == b"x"


@pytest.mark.promise("X15")
async def test_hard_link_to_the_root_is_rejected(tmp_path: Path) -> None:
    await refused(tmp_path, pack(tmp_path / "x.tar.gz", [Member("here", hard=".")]), "hard link to a directory")


MUTABLE = {
    kind: [
        Member("a/"),
        Member("a/lib.so", link="lib.so.1"),
        Member("a/lib.so.1", b"library" * 40),
        Member("ü/" + "long" * 60, b"x"),
    ]
    for kind in KINDS
}


@pytest.mark.promise("X15")
@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=5))
def test_mutated_archive_is_unpacked_or_rejected(kind: str, cuts: list[tuple[float, int, bytes]]) -> None:
    """Replace, remove and insert bytes in the archive or in its tar; only InstallError may be raised."""
    with tempfile.TemporaryDirectory() as folder:
        archive, target = Path(folder, f"x.{kind}"), Path(folder, "target")
        pack(archive, MUTABLE[kind])
        data = archive.read_bytes() if kind != "tar.gz" else gzip.decompress(archive.read_bytes())
        for where, length, new in cuts:
            at = int(where * len(data))
            data = data[:at] + new + data[at + length :]
        archive.write_bytes(data if kind != "tar.gz" else gzip.compress(data))
        with suppress(InstallError):
            asyncio.run(unpack([archive], target))
        if target.exists():
            shutil.rmtree(target)
        assert [path.name for path in Path(folder).iterdir()] == [archive.name]


async def test_nearly_full_disk_is_reported_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(tmp_path / "a.tar.gz", [Member("a", b"x")])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    await refused(tmp_path, archive, "has 1 MiB free")


@pytest.mark.promise("P13", "P19")
async def test_full_disk_while_unpacking_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: str, flags: int, *arguments: Any, **more: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(28, "No space left on device", "the disk")
        return real(path, flags, *arguments, **more)

    archive = pack(tmp_path / "a.zip", [Member("a", b"x")])
    monkeypatch.setattr(os, "open", full)
    await refused(tmp_path, archive, "the disk: No space left on device. Nothing was kept")


@pytest.mark.promise("P13")
async def test_cancelled_unpacking_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "SLICE", 0.0)
    archive = pack(tmp_path / "a.tar.gz", [Member(f"{number}", bytes(2000)) for number in range(2000)])
    turns = 0

    async def counted(work: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
        nonlocal turns
        turns += 1
        if turns == 10:
            loop.call_soon(unpacking.cancel)
        return await in_thread(work, *arguments, **more)

    monkeypatch.setattr(archives, "in_thread", counted)
    loop = asyncio.get_running_loop()
    unpacking = asyncio.create_task(unpack([archive], tmp_path / "target"))
    with pytest.raises(asyncio.CancelledError):
        await unpacking
    assert turns < 100
    assert not (tmp_path / "target").exists()


async def test_existing_directory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "mine").write_text("mine")
    with pytest.raises(FileExistsError):
        await unpack([pack(tmp_path / "a.zip", [Member("a", b"")])], tmp_path / "target")
    assert os.listdir(tmp_path / "target") == ["mine"]  # noqa: PTH208  # names only
