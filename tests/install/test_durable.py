"""Durability: after a loss of power, a kill or a concurrent installation, one complete version is installed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.install.versions import Installation, InstallSteps
from engine_plugin.system.files import private_folder, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

REPOSITORY = Path(__file__).parents[2]

posix = pytest.mark.skipif(sys.platform == "win32", reason="descriptors and locks of POSIX")


async def install(installation: Installation, version: str, switched: Callable[[], None] = lambda: None) -> Path:
    """Install a version of three files; return its directory."""

    async def fill(folder: Path) -> None:
        (folder / "lib" / "deep").mkdir(parents=True)
        (folder / "lib" / "deep" / "library.so").write_bytes(version.encode() * 1000)
        (folder / "program").write_text(version)
        (folder / "empty").touch()
        (folder / "cached.pyc").write_bytes(b"bytecode")

    async def check(_folder: Path) -> Mapping[str, str]:
        return {"kind": "engine", "version": version}

    async def adopt() -> None:
        switched()

    await installation.replace(InstallSteps(fill, check, adopt), lambda _step: None)
    current = installation.current()
    assert current is not None
    return current.folder


def versions(installation: Installation) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in (installation.root / "versions").iterdir())


class Disk:
    """The sync, rename and remove operations in order, with the names at that moment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.journal: list[tuple[str, Path]] = []
        real = {name: getattr(os, name) for name in ("fsync", "rename", "replace")}
        places: dict[int, Path] = {}
        opening, closing = os.open, os.close

        def opened(path: str | Path, *args: int, **kwargs: int) -> int:
            descriptor = opening(path, *args, **kwargs)
            if isinstance(path, str | Path):
                places[descriptor] = Path(path)
            return descriptor

        def closed(descriptor: int) -> None:
            places.pop(descriptor, None)
            closing(descriptor)

        def fsync(descriptor: int) -> None:
            self.journal.append(("sync", places[descriptor]))
            real["fsync"](descriptor)

        def moved(name: str) -> Callable[[str | Path, str | Path], None]:
            def move(source: str | Path, target: str | Path) -> None:
                self.journal.append(("name", Path(target)))
                real[name](source, target)

            return move

        for name, with_what in {"open": opened, "close": closed, "fsync": fsync}.items():
            monkeypatch.setattr(os, name, with_what)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, moved(name))

    def when(self, what: str, path: Path) -> int:
        """The index of the first such operation."""
        return self.journal.index((what, path))


@posix
@pytest.mark.promise("U1")
async def test_version_is_synced_before_the_switch_and_the_switch_before_the_removal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installation = Installation(tmp_path / "software", "engine")
    old = await install(installation, "1")
    disk = Disk(monkeypatch)
    new = await install(installation, "2")
    monkeypatch.undo()
    assert not old.exists()
    named, pointer = disk.when("name", new), tmp_path / "software" / "current-engine.json"
    synced = {path for what, path in disk.journal[:named] if what == "sync"}
    staged = next(path for path in synced if path.name == "program").parent
    for path in (new, *new.rglob("*")):
        assert staged / path.relative_to(new) in synced or path.name == ".installed.json", path
    assert staged / f".installed.json.{os.getpid()}.tmp" in synced
    switched = disk.when("name", pointer)
    in_versions = [at for at, entry in enumerate(disk.journal) if entry == ("sync", new.parent)]
    assert any(named < at < switched for at in in_versions), "the rename of the directory is synced too"
    gone = next(at for at, (what, path) in enumerate(disk.journal) if what == "name" and path.name.endswith(old.name))
    in_root = [at for at, entry in enumerate(disk.journal) if entry == ("sync", pointer.parent)]
    assert any(switched < at < gone for at in in_root), "the switch is synced before the old version is removed"


@posix
@pytest.mark.promise("U1")
def test_new_folders_and_records_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    private_folder(tmp_path / "data" / "models" / ".records")
    write_json(tmp_path / "data" / "models" / ".records" / "m.json", {"name": "m"}, tmp_path / "data")
    monkeypatch.undo()
    for folder in (tmp_path, tmp_path / "data", tmp_path / "data" / "models"):
        disk.when("sync", folder)
    renamed = disk.when("name", tmp_path / "data" / "models" / ".records" / "m.json")
    assert disk.when("sync", tmp_path / "data" / f"m.json.{os.getpid()}.tmp") < renamed
    assert disk.journal[renamed + 1 :] == [("sync", tmp_path / "data" / "models" / ".records")]


@pytest.mark.promise("U1")
@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (
            lambda folder: (folder / "lib/deep/library.so").write_bytes(b""),
            r"library\.so has 0 of 1000 bytes \(1 of 3",
        ),
        (lambda folder: (folder / "program").unlink(), r"program is missing \(1 of 3 files are damaged\)"),
        (lambda folder: (folder / ".installed.json").write_bytes(b""), r"\.installed\.json cannot be read"),
    ],
)
async def test_missing_and_truncated_files_are_reported(
    tmp_path: Path, harm: Callable[[Path], None], complaint: str
) -> None:
    installation = Installation(tmp_path / "software", "engine")
    folder = await install(installation, "1")
    assert installation.damage(folder) == ""
    (folder / "cached.pyc").write_bytes(b"")
    (folder / "added").touch()
    assert installation.damage(folder) == "", "changed Python caches and additional files are not damage"
    harm(folder)
    assert re.search(complaint, installation.damage(folder))


@pytest.mark.promise("U5")
async def test_engines_that_share_a_data_directory_keep_their_versions(tmp_path: Path) -> None:
    one, other = Installation(tmp_path / "software", "one"), Installation(tmp_path / "software", "other")
    first = await install(one, "1")
    assert other.current() is None
    second = await install(other, "2")
    assert (current := one.current()) is not None
    assert current.folder == first
    await install(one, "3")
    assert second.is_dir()
    assert not first.exists()
    assert versions(one) == ["engine-2", "engine-3"]


USER = """
import sys
from pathlib import Path
from engine_plugin.install.versions import Installation
hold = Installation(Path(sys.argv[1]), "engine").hold(Path(sys.argv[2]))
assert hold is not None
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.promise("U6")
@pytest.mark.parametrize("end", ["it ends", "it is killed"])
async def test_version_held_by_another_process_is_kept_until_that_ends(tmp_path: Path, end: str) -> None:
    installation = Installation(tmp_path / "software", "engine")
    old = await install(installation, "1")
    user = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", USER, str(installation.root), str(old)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert user.stdout is not None
        assert await user.stdout.readline() == b"held\n"
        await install(installation, "2")
        await install(installation, "3")
        installation.sweep(lambda _than: None)
        assert versions(installation) == ["engine-1", "engine-3"]
        assert (old / "program").read_text() == "1"
    finally:
        if end == "it is killed":
            user.kill()
        await user.communicate(b"\n")
    installation.sweep(lambda _than: None)
    assert versions(installation) == ["engine-3"]


@pytest.mark.promise("U6")
async def test_removed_version_cannot_be_held_and_a_dropped_hold_is_released(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "software", "engine")
    old = await install(installation, "1")
    hold = installation.hold(old)
    assert hold is not None
    await install(installation, "2")
    assert old.is_dir()
    hold.release()
    hold.release()
    installation.sweep(lambda _than: None)
    assert installation.hold(old) is None
    new = await install(installation, "3")
    assert installation.hold(new) is not None  # the hold is dropped, as by a cancelled caller
    await install(installation, "4")
    assert versions(installation) == ["engine-4"]


KILLED = """
import asyncio, os, sys
from pathlib import Path
from engine_plugin.install.versions import Installation, InstallSteps

async def main(root):
    async def fill(folder):
        (folder / "program").write_text("2")
    async def check(folder):
        return {"kind": "engine", "version": "2"}
    async def adopt():
        os._exit(9)
    await Installation(root, "engine").replace(InstallSteps(fill, check, adopt), lambda step: None)

asyncio.run(main(Path(sys.argv[1])))
"""


@pytest.mark.promise("U7")
async def test_version_left_by_a_kill_after_the_switch_is_removed_later(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "software", "engine")
    await install(installation, "1")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", KILLED, str(installation.root)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert await process.wait() == 9
    assert versions(installation) == ["engine-1", "engine-2"]
    asked: list[float] = []
    installation.sweep(asked.append)
    assert versions(installation) == ["engine-2"]
    assert asked == [(installation.root / "current-engine.json").stat().st_mtime]


@pytest.mark.promise("U7")
async def test_sweep_does_nothing_during_an_installation(tmp_path: Path) -> None:
    installation = Installation(tmp_path / "software", "engine")
    swept: list[float] = []

    def sweep() -> None:
        Installation(tmp_path / "software", "other").sweep(swept.append)
        assert len(versions(installation)) == 1

    await install(installation, "1", switched=sweep)
    assert versions(installation) == ["engine-1"]
    assert json.loads((installation.root / "current-engine.json").read_text())["facts"]["version"] == "1"
    assert swept == []
