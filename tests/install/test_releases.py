"""Release archives: selection, digests, and downloads from faulty servers, paths and the offline directory."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.download import fetch
from engine_plugin.download.disk import disk_error, disk_reason
from engine_plugin.download.events import ChunkProgress
from engine_plugin.download.partial import Partial
from engine_plugin.download.remote import FetchPolicy
from engine_plugin.errors import AuthError, InstallError
from engine_plugin.install import releases
from engine_plugin.install.releases import (
    Archive,
    Downloads,
    find_digest,
    likely_accelerators,
    select_archives,
)
from tests.models.server import FileServer, Script, file_server, without_proxies
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DATA = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(DATA).hexdigest()
NAME = "engine-1.tar.gz"
POLICY = FetchPolicy(connect_s=5, stall_s=5, attempts=3, backoff_s=0.01, longest_wait_s=2)


# Selection of archives

ARCHIVES = (
    Archive("linux-cpu", "linux", "amd64"),
    Archive("linux-cuda", "linux", "amd64", "cuda"),
    Archive("linux-cuda-libraries", "linux", "amd64", "cuda"),
    Archive("mac", "darwin", "arm64", "metal"),
    Archive("any-vulkan", accelerator="vulkan"),
)


@pytest.mark.parametrize(
    ("platform", "accelerator", "chosen"),
    [
        ("linux_amd64", "auto", ["linux-cpu"]),
        ("linux_amd64", "cuda", ["linux-cuda", "linux-cuda-libraries"]),
        ("linux_amd64", "vulkan", ["any-vulkan"]),
        ("windows_amd64", "vulkan", ["any-vulkan"]),
        ("darwin_arm64", "auto", ["mac"]),
    ],
)
def test_archives_are_selected_for_the_machine(
    monkeypatch: pytest.MonkeyPatch, platform: str, accelerator: str, chosen: list[str]
) -> None:
    monkeypatch.setattr(releases, "NVIDIA", Path("/nowhere/at/all"))
    assert [archive.url for archive in select_archives(ARCHIVES, accelerator, platform)] == chosen


def test_nvidia_driver_is_detected_without_calling_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(releases, "NVIDIA", tmp_path)
    monkeypatch.setattr("sys.platform", "linux")
    assert likely_accelerators("linux_amd64") == ("cuda", "cpu")
    assert select_archives(ARCHIVES, "auto", "linux_amd64")[0].url == "linux-cuda"
    assert [archive.url for archive in select_archives(ARCHIVES[:1], "auto", "linux_amd64")] == ["linux-cpu"]
    assert likely_accelerators("windows_amd64") == ("cpu",)


def test_missing_archive_lists_the_available_ones() -> None:
    with pytest.raises(InstallError, match=r"no archive for cuda on darwin_arm64\. Set one of metal, vulkan"):
        select_archives(ARCHIVES, "cuda", "darwin_arm64")
    with pytest.raises(InstallError, match=r"no archive for this machine \(darwin_amd64\)"):
        select_archives(ARCHIVES[:4], "auto", "darwin_amd64")


# Digests


@pytest.mark.parametrize(
    "text",
    [
        f"{SHA256}  {NAME}\n",
        f"{'0' * 64}  other\r\n{SHA256.upper()} *{NAME}\r\n",
        f"{SHA256}  ./dist/{NAME}",
        f"SHA256 ({NAME}) = {SHA256}\n",
        f"sha256 (other) = {'0' * 64}\nSHA256({NAME})= {SHA256}\n",
        f"sha256:{SHA256}  {NAME}",
        f"  {SHA256}\n",
        f"\ufeffsha256:{SHA256}",
        json.dumps({"assets": [{"name": "x", "digest": None}, {"name": NAME, "digest": f"sha256:{SHA256}"}]}),
    ],
)
def test_digest_is_found_in_each_format(text: str) -> None:
    assert find_digest(text.encode(), NAME) == SHA256


@pytest.mark.parametrize(
    "text",
    [
        "",
        f"{SHA256}  other-{NAME}",
        f"{SHA256[:-1]}  {NAME}",
        f"MD5 ({NAME}) = {SHA256}",
        f"# {NAME}",
        "{",
        "{}",
        '{"assets": 7}',
        json.dumps({"assets": [7, {"name": NAME}, {"name": NAME, "digest": f"sha256:{SHA256}"}]}),
        json.dumps({"assets": [{"name": NAME, "digest": f"md5:{SHA256[:32]}"}]}),
        "\xff\xfe",
    ],
)
def test_missing_digest_is_empty(text: str) -> None:
    assert find_digest(text.encode("latin-1"), NAME) == ""


# Downloads


class Place:
    """Downloads below a directory, with the reported progress."""

    def __init__(self, root: Path, **rules: bool) -> None:
        self.folder = root / "downloads"
        self.offline_dir = root / "offline"
        self.told: list[str | ChunkProgress] = []
        self.downloads = Downloads(self.folder, self.offline_dir, policy=POLICY, **rules)

    async def get(self, archive: Archive) -> Path:
        async with asyncio.timeout(LIMIT):
            return await self.downloads.get(archive, self.told.append)

    def left(self) -> set[str]:
        return {path.name for path in self.folder.glob("*")}


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def server() -> AsyncIterator[FileServer]:
    async with file_server(DATA) as server:
        yield server


def archive_at(server: FileServer, sha256: str = "", checksums: str = "") -> Archive:
    return Archive(server.url(f"/v1/{NAME}"), sha256=sha256, checksums=checksums)


async def test_digest_from_plugin_yaml_is_checked(place: Place, server: FileServer) -> None:
    path = await place.get(archive_at(server, sha256=f"SHA256:{SHA256.upper()}".replace("SHA256:", "sha256:")))
    assert path.read_bytes() == DATA
    assert [request.path for request in server.requests] == [f"/v1/{NAME}"]
    last = next(step for step in reversed(place.told) if isinstance(step, ChunkProgress))
    assert last == ChunkProgress(f"sha256:{SHA256}", len(DATA), len(DATA))
    await place.downloads.clear()
    assert not place.folder.exists()


@pytest.mark.parametrize("named", [True, False])
async def test_digest_from_a_checksum_file_is_checked(place: Place, server: FileServer, named: bool) -> None:
    """The named checksum file, else the one beside the archive."""
    sums = "/v1/SHA256SUMS" if named else f"/v1/{NAME}.sha256"
    server.files[sums] = f"{SHA256}  {NAME}\n".encode()
    archive = archive_at(server, checksums=server.url(sums) if named else "")
    assert (await place.get(archive)).read_bytes() == DATA
    assert [request.path for request in server.requests] == [sums, f"/v1/{NAME}"]
    assert place.left() == {f"{NAME}.part", f"{NAME}.json"}


@pytest.mark.promise("P16")
@pytest.mark.parametrize("content", [None, b"nothing of use"])
async def test_archive_without_a_digest_is_rejected(place: Place, server: FileServer, content: bytes | None) -> None:
    server.files[f"/v1/{NAME}.sha256"] = content
    with pytest.raises(InstallError, match=rf"{NAME}: the SHA-256 is unknown and not in .*{NAME}.sha256.*verify"):
        await place.get(archive_at(server))
    assert len(server.requests) == 1
    assert place.left() == set()


async def test_archive_without_a_digest_is_used_if_verify_is_false(tmp_path: Path, server: FileServer) -> None:
    server.files[f"/v1/{NAME}.sha256"] = None
    place = Place(tmp_path, verify=False)
    assert (await place.get(archive_at(server))).read_bytes() == DATA
    assert any("is not verified" in str(step) for step in place.told)


async def test_missing_named_checksum_file_is_reported(place: Place, server: FileServer) -> None:
    server.files["/sums"] = None
    with pytest.raises(InstallError, match="/sums: there is no such file"):
        await place.get(archive_at(server, checksums=server.url("/sums")))


async def test_endless_checksum_file_is_rejected(
    place: Place, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(releases, "CHECKSUMS_LIMIT", 1000)
    server.files["/sums"] = bytes(2000)
    with pytest.raises(InstallError, match=r"the file has 2000 bytes; the limit is 1000"):
        await place.get(archive_at(server, checksums=server.url("/sums")))
    del server.files["/sums"]
    server.scripts.append(Script(chunked=True))
    with pytest.raises(InstallError, match="more than the limit of 1000 bytes"):
        await place.get(archive_at(server, checksums=server.url("/sums")))


@pytest.mark.promise("P16")
async def test_checksum_mismatch_is_rejected(place: Place, server: FileServer) -> None:
    """The file was changed on the server or in transit."""
    server.data = DATA[::-1]
    with pytest.raises(
        InstallError, match=rf"expected sha256:{SHA256}, got sha256:[0-9a-f]+\. The download was deleted\. Try again"
    ):
        await place.get(archive_at(server, sha256=SHA256))
    assert place.left() == set()
    server.data = DATA
    assert (await place.get(archive_at(server, sha256=SHA256))).read_bytes() == DATA


@pytest.mark.promise("P16")
async def test_size_mismatch_is_rejected(place: Place, server: FileServer) -> None:
    archive = replace(archive_at(server, sha256=SHA256), size=1000)
    with pytest.raises(InstallError, match=rf"the file has {len(DATA)} bytes, expected 1000"):
        await place.get(archive)
    assert place.left() == set()
    assert (await place.get(replace(archive, size=len(DATA)))).read_bytes() == DATA


async def test_size_limits_a_download_of_unknown_length(place: Place, server: FileServer) -> None:
    server.scripts.append(Script(chunked=True))
    with pytest.raises(InstallError, match="sent more than the 1000 bytes"):
        await place.get(replace(archive_at(server, sha256=SHA256), size=1000))


@pytest.mark.promise("F25")
async def test_download_resumes_after_dropped_connections_and_a_restart(place: Place, server: FileServer) -> None:
    """Each `get` uses new objects, as after a restart of the plugin."""
    server.scripts.extend(Script(drop_after=200_000) for _ in range(2))
    server.scripts.append(Script(status=404))
    with pytest.raises(InstallError, match="no such file"):
        await place.get(archive_at(server, sha256=SHA256))
    kept = (place.folder / f"{NAME}.part").stat().st_size
    assert kept >= 200_000
    assert (await place.get(archive_at(server, sha256=SHA256))).read_bytes() == DATA
    assert server.requests[-1].range == f"bytes={kept}-"
    assert server.sent <= len(DATA) + 2 * 200_000


async def test_complete_archive_is_not_downloaded_again(place: Place, server: FileServer) -> None:
    await place.get(archive_at(server, sha256=SHA256))
    asked = len(server.requests)
    assert (await place.get(archive_at(server, sha256=SHA256))).read_bytes() == DATA
    assert len(server.requests) == asked


@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.promise("F25")
async def test_download_from_a_server_without_ranges_starts_over(
    place: Place, server: FileServer, resumed: bool
) -> None:
    server.scripts.extend([Script(drop_after=300_000), Script(ignore_range=not resumed)])
    assert (await place.get(archive_at(server, sha256=SHA256))).read_bytes() == DATA
    assert server.sent == len(DATA) + (0 if resumed else 300_000)


async def test_false_content_length_is_reported(place: Place, server: FileServer) -> None:
    server.scripts.extend(Script(length=len(DATA) + 10) for _ in range(9))
    with pytest.raises(InstallError, match="attempts made no progress"):
        await place.get(archive_at(server, sha256=SHA256))
    server.scripts.clear()
    assert (await place.get(archive_at(server, sha256=SHA256))).read_bytes() == DATA


@pytest.mark.promise("F25")
async def test_file_that_changes_during_the_download_is_downloaded_again(place: Place, server: FileServer) -> None:
    script = Script(drop_after=300_000, stall_after=200_000)
    server.scripts.append(script)
    server.data = DATA[::-1]
    getting = asyncio.create_task(place.get(archive_at(server, sha256=SHA256)))
    async with asyncio.timeout(LIMIT):
        while not any(isinstance(step, ChunkProgress) and step.completed for step in place.told):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    server.data, server.etag = DATA, '"version-2"'
    script.go.set()
    assert (await getting).read_bytes() == DATA


async def test_stalled_download_times_out(tmp_path: Path, server: FileServer) -> None:
    place = Place(tmp_path)
    place.downloads = replace(place.downloads, policy=replace(POLICY, stall_s=0.3))
    server.scripts.append(Script(stall_after=100_000))
    assert (await place.get(archive_at(server, sha256=SHA256))).read_bytes() == DATA
    assert server.requests[1].range == "bytes=100000-"


@pytest.mark.promise("F25")
async def test_cancelled_download_is_kept(place: Place, server: FileServer) -> None:
    server.scripts.append(Script(stall_after=200_000))
    getting = asyncio.create_task(place.get(archive_at(server, sha256=SHA256)))
    async with asyncio.timeout(LIMIT):
        while not any(isinstance(step, ChunkProgress) and step.completed for step in place.told):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    getting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await getting
    kept = (place.folder / f"{NAME}.part").stat().st_size
    assert kept
    await place.get(archive_at(server, sha256=SHA256))
    assert server.requests[-1].range == f"bytes={kept}-"


@pytest.mark.promise("P19")
async def test_download_larger_than_the_free_space_is_rejected(
    place: Place, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(place.offline_dir.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1 << 20))
    with pytest.raises(InstallError, match=r"has 1 MiB free .* the download needs 750 KiB more"):
        await place.get(archive_at(server, sha256=SHA256))
    assert place.left() == set()


@pytest.mark.promise("X10")
@pytest.mark.parametrize(("chunked", "words"), [(True, "did not announce the size of the file"), (False, "to spare")])
async def test_download_keeps_a_reserve_of_free_space(
    place: Place, server: FileServer, monkeypatch: pytest.MonkeyPatch, chunked: bool, words: str
) -> None:
    """A file of unknown size is deleted, since it may never fit; one of known size can be resumed."""
    usage = shutil.disk_usage(place.offline_dir.parent)
    arriving = place.folder / f"{NAME}.part"

    def free(_path: Path) -> Any:
        full = arriving.exists() and arriving.stat().st_size >= 200_000
        return usage._replace(free=(1 << 20) if full else (1 << 40))

    monkeypatch.setattr(shutil, "disk_usage", free)
    monkeypatch.setattr(fetch, "ROOM_EVERY", 100_000)
    monkeypatch.setattr(fetch, "_FLUSH_BYTES", 50_000)
    server.scripts.append(Script(chunked=chunked))
    with pytest.raises(InstallError, match=words):
        await place.get(archive_at(server, sha256=SHA256))
    assert bool(place.left()) is not chunked
    assert not arriving.exists() or 200_000 <= arriving.stat().st_size < len(DATA)


@pytest.mark.promise("X10")
@pytest.mark.parametrize("chunked", [True, False])
async def test_full_disk_during_a_download_is_reported(
    place: Place, server: FileServer, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    write = Partial.write

    def full(partial: Partial, data: bytes) -> None:
        if partial.size >= 200_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(partial, data)

    monkeypatch.setattr(Partial, "write", full)
    monkeypatch.setattr(fetch, "_FLUSH_BYTES", 50_000)
    server.scripts.append(Script(chunked=chunked))
    with pytest.raises(
        InstallError, match=r"No space left on device after [1-9]\d* .*\d+ bytes are free\. Delete files"
    ):
        await place.get(archive_at(server, sha256=SHA256))
    assert bool(place.left()) is not chunked


@pytest.mark.promise("L9")
@pytest.mark.skipif(sys.platform == "win32", reason="NTFS creates inodes as it needs them")
def test_missing_inodes_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = os.statvfs_result((4096, 4096, 1000, 500, 500, 1000, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _path: none)
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "x"))
    assert "bytes are free, but no inode is free" in str(disk_error(error, tmp_path, 0, 0))
    assert disk_reason(error, tmp_path).startswith("No space left on device (no inode is free")


async def test_unreachable_server_is_reported(place: Place) -> None:
    async with file_server(b"") as server:
        archive = archive_at(server, sha256=SHA256)
    with pytest.raises(InstallError, match=r"cannot connect .* Check the address, the network"):
        await place.get(archive)


@pytest.mark.promise("P21")
async def test_credentials_in_the_url_are_sent_and_redacted(place: Place, server: FileServer) -> None:
    server.credentials = ("me", "s3cr3t")
    with pytest.raises(
        AuthError, match=r"refused access \(HTTP 401\)\. Put the credentials .* into the URL"
    ) as caught:
        await place.get(archive_at(server, sha256=SHA256))
    assert caught.value.code == 401
    archive = Archive(server.url(f"/{NAME}", credentials="me:s3cr3t@"), sha256=SHA256)
    assert (await place.get(archive)).read_bytes() == DATA
    assert "s3cr3t" not in repr(place.told)
    assert "s3cr3t" not in archive.label
    assert "s3cr3t" not in (place.folder / f"{NAME}.json").read_text()


# Local and offline files


def put(folder: Path, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(DATA)
    return path


@pytest.mark.parametrize("as_url", [True, False])
@pytest.mark.parametrize("beside", [f"{NAME}.sha256", "SHA256SUMS", "checksums.txt"])
async def test_local_archive_is_verified_in_place(place: Place, tmp_path: Path, beside: str, as_url: bool) -> None:
    path = put(tmp_path / "here")
    archive = Archive(path.as_uri() if as_url else str(path))
    with pytest.raises(InstallError, match=f"{NAME}: the SHA-256 is unknown"):
        await place.get(archive)
    (path.parent / beside).write_text(f"{SHA256}  {NAME}\n")
    assert await place.get(archive) == path
    path.write_bytes(DATA[::-1])
    with pytest.raises(InstallError, match=rf"expected sha256:{SHA256}, got \S+\. Replace the file"):
        await place.get(archive)
    assert path.exists(), "other files are not deleted"


async def test_missing_or_wrong_local_archive_is_rejected(place: Place, tmp_path: Path) -> None:
    path = put(tmp_path / "here")
    with pytest.raises(InstallError, match="expected 5 bytes"):
        await place.get(Archive(str(path), sha256=SHA256, size=5))
    for url, why in (
        (str(tmp_path / "absent"), "the file does not exist"),
        ("relative/path.zip", "neither an http"),
        ("ftp://host/x.zip", "neither an http"),
        ("file://host/x.zip", "three slashes"),
        ("https://", "not an http"),
        ("https://host:port/x", "ftp|port|Port"),
    ):
        with pytest.raises(InstallError, match=why):
            await place.get(Archive(url, sha256=SHA256))


async def test_offline_mode_uses_no_network(tmp_path: Path, server: FileServer) -> None:
    place = Place(tmp_path, offline=True)
    archive = archive_at(server, checksums=server.url("/SHA256SUMS"))
    match = (
        rf"engine.offline is true, but .*offline/{NAME} is missing\. Download http://.*/v1/{NAME} on another machine"
    )
    with pytest.raises(InstallError, match=match):
        await place.get(archive)
    path = put(place.offline_dir)
    with pytest.raises(InstallError, match="the SHA-256 is unknown"):
        await place.get(archive)
    (place.offline_dir / "SHA256SUMS").write_text(f"{SHA256}  {NAME}\n")
    assert await place.get(archive) == path
    assert await place.get(replace(archive, checksums="", sha256=SHA256)) == path
    assert server.requests == []
