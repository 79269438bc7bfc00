"""Releases: fetched from loopback, verified, tried out, activated, and reverted on failure."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import EngineNotInstalledError, EngineStartError, InstallError
from engine_plugin.install.releases import Archive
from engine_plugin.install.software import Backend
from tests.engines.ollama.contract.release import Mirror, members, program, write_program
from tests.install.packing import Member, pack
from tests.patience import LIMIT

if TYPE_CHECKING:
    from .place import Place


def snapshot(place: Place) -> set[str]:
    """The entries of the software directory."""
    folder = place.data / "software"
    return {str(path.relative_to(folder)) for path in folder.rglob("*")} - {"install.lock"}


async def test_install_and_check(place: Place, mirror: Mirror) -> None:
    mirror.publish("0.33.0")
    software = place.software(version="0.33.0", mirror=mirror.url)
    assert ((check := software.check()).installed, check.detail) == (False, "Ollama is not installed")
    with pytest.raises(EngineNotInstalledError, match=r"Ollama is not installed\. Call InstallEngine"):
        software.find()
    description = await place.install(software)
    assert description.startswith(f"Ollama in {place.data / 'software' / 'versions'}")
    assert description.endswith("version 0.33.0")
    assert place.versions() == ["ollama-0.33.0"]
    assert place.switched == ["0.33.0"]
    assert any(step.startswith("unpacking ollama-linux") for step in place.progress)
    backend = software.find()
    assert await software.probe(backend) == {"version": "0.33.0", "devices": None}
    assert backend.folder is not None
    library = backend.folder / "ollama" / "lib" / "ollama" / "libggml-base.so"
    assert library.read_bytes().startswith(b"library")
    assert {path.name for path in backend.folder.iterdir()} == {"ollama", ".installed.json"}
    assert await place.install(software) == description
    assert await place.upgrade(software) is False
    assert len(mirror.fetched()) == 1


async def test_upgrade(place: Place, mirror: Mirror) -> None:
    """The archive has the same name in every release; only the version differs."""
    mirror.publish("0.33.0")
    await place.install(place.software(version="0.33.0", mirror=mirror.url))
    mirror.publish("0.33.1")
    newer = place.software(version="v0.33.1", mirror=mirror.url)
    assert await place.upgrade(newer) is True
    assert newer.find().version == "0.33.1"
    assert place.versions() == ["ollama-0.33.1"]
    assert await place.upgrade(newer) is False
    assert place.switched == ["0.33.0", "0.33.1"]


@pytest.mark.promise("P13")
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--fail", "libcudart.so is missing"], r"was not changed: .*libcudart\.so is missing"),
        (["--be-version", "0.4.2"], r"was not changed: .* 0\.4\.2 is too old; 0\.5\.0 or newer is needed"),
    ],
)
async def test_release_that_does_not_serve_is_not_activated(
    place: Place, mirror: Mirror, options: list[str], complaint: str
) -> None:
    mirror.publish("0.33.0")
    await place.install(place.software(version="0.33.0", mirror=mirror.url))
    before = snapshot(place)
    mirror.publish("0.33.1", *options)
    newer = place.software(version="0.33.1", mirror=mirror.url)
    with pytest.raises(InstallError, match=complaint):
        await place.upgrade(newer)
    assert {path for path in snapshot(place) if not path.startswith("downloads")} == before
    assert newer.find().version == "0.33.0"
    assert place.switched == ["0.33.0"]


@pytest.mark.promise("P13")
async def test_release_that_does_not_run_is_not_activated(place: Place, mirror: Mirror) -> None:
    mirror.publish("0.33.0")
    broken = pack(place.root / "x.tar.zst", [Member("bin/ollama", b"#!/bin/sh\nexit 127\n", mode=0o755)]).read_bytes()
    mirror.publish_file("0.33.0", mirror.name("0.33.0"), broken)
    mirror.publish_file("0.33.0", "sha256sum.txt", hashlib.sha256(broken).hexdigest().encode())
    software = place.software(version="0.33.0", mirror=mirror.url)
    with pytest.raises(InstallError, match=r"the installation was not changed: .* does not run \(exit code 127\)"):
        await place.install(software)
    assert place.versions() == []
    assert not software.check().installed


@pytest.mark.promise("P16")
async def test_archive_with_wrong_or_missing_checksum_is_rejected(place: Place, mirror: Mirror) -> None:
    mirror.publish("0.33.0", digest="1" * 64)
    with pytest.raises(InstallError, match="1" * 64):
        await place.install(place.software(version="0.33.0", mirror=mirror.url))
    assert place.versions() == []
    mirror.publish_file("0.33.0", "sha256sum.txt", b"nothing")
    software = place.software(version="0.33.0", mirror=mirror.url)
    with pytest.raises(InstallError, match=r"ollama-\S+: the SHA-256 is unknown"):
        await place.install(software)
    await place.install(place.software(version="0.33.0", mirror=mirror.url, verify=False))
    assert software.find().version == "0.33.0"


async def test_second_archive_is_unpacked_over_the_first(place: Place, mirror: Mirror) -> None:
    """As for AMD GPUs, with configured archives, one of them flat like the one for macOS."""
    flat = [Member("ollama", program("--be-version", "0.33.7", "--bare"), mode=0o755), Member("libggml.dylib", b"x")]
    first = pack(place.root / "ollama-darwin.tgz", flat)
    second = pack(place.root / "extra.zip", [Member("lib/ollama/rocm_v7/librocblas.so", b"kernels")])
    archives = tuple(
        Archive(str(path), accelerator="rocm", sha256=hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (first, second)
    )
    software = place.software(archives=archives, accelerator="rocm")
    await place.install(software)
    backend = software.find()
    assert backend.version == "0.33.7"
    assert backend.folder is not None
    assert (backend.folder / "ollama/lib/ollama/rocm_v7/librocblas.so").read_bytes() == b"kernels"
    assert Path(backend.executable) == backend.folder / "ollama" / "ollama"
    assert await place.upgrade(software) is False


async def test_offline_install(place: Place, mirror: Mirror) -> None:
    data = mirror.publish("0.33.0")
    software = place.software(version="0.33.0", offline=True)
    name = mirror.name("0.33.0")
    shelf = place.data / "software" / "offline"
    with pytest.raises(InstallError, match=rf"engine\.offline is true, but {shelf / name} is missing"):
        await place.install(software)
    shelf.mkdir(parents=True, exist_ok=True)
    (shelf / name).write_bytes(data)
    (shelf / "sha256sum.txt").write_text(f"{hashlib.sha256(data).hexdigest()}  ./{name}\n")
    assert "version 0.33.0" in await place.install(software)
    assert mirror.fetched() == []


@pytest.mark.promise("P13")
async def test_cancelled_install_leaves_nothing(place: Place, mirror: Mirror) -> None:
    mirror.publish("0.33.0")
    software = place.software(version="0.33.0", mirror=mirror.url)
    checking = asyncio.Event()

    def tell(step: object) -> None:
        if step == "checking that it runs":
            checking.set()

    work = asyncio.create_task(software.install(tell, place.install_hooks(software, {}), cover=False))
    await asyncio.wait_for(checking.wait(), LIMIT)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert place.versions() == []
    assert not software.check().installed


async def test_program_named_in_manifest_is_used(place: Place) -> None:
    path = write_program(place.root / "own", "--be-version", "0.31.2")
    software = place.software(ollama=str(path))
    assert software.check().detail == f"ollama at {path}, version unknown until it runs"
    assert (await software.probe(software.find()))["version"] == "0.31.2"
    assert await place.upgrade(software) is False
    path.unlink()
    missing = rf"engine\.ollama: {path} is not a program\. Correct engine\.ollama, or remove"
    with pytest.raises(EngineNotInstalledError, match=missing):
        software.find()
    with pytest.raises(InstallError, match=r"does not install the backend that plugin\.yaml selects\. Correct"):
        await place.install(software)


async def test_program_on_path_is_used_only_with_manage(place: Place) -> None:
    folder = write_program(place.root / "bin").parent
    place.environ["PATH"] = f"{folder}:{place.environ['PATH']}"
    assert not place.software().check().installed
    assert not place.software(server="attach").check().installed
    assert place.software(server="manage").find() == Backend(
        "ollama", "", f"ollama at {folder}/ollama", f"{folder}/ollama"
    )
    assert await place.upgrade(place.software(server="manage")) is False


async def test_program_that_cannot_run_is_reported(place: Place) -> None:
    path = write_program(place.root / "own")
    software = place.software(ollama=str(path))
    backend = software.find()
    path.write_bytes(b"#!/nonexistent\n")
    with pytest.raises(EngineStartError, match=r"ollama at .* (cannot be run|does not run)"):
        await software.probe(backend)


def test_contract_release_has_ollamas_files() -> None:
    assert {"bin/ollama", "lib/ollama/libggml-base.so"} <= {member.name for member in members()}
