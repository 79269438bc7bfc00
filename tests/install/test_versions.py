"""Installed versions: atomic switch, check before the old version is removed, one installation at a time."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import EngineStartError, InstallError, PreconditionError
from engine_plugin.install import versions
from engine_plugin.install.versions import Installation, InstalledVersion, InstallSteps
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.download.events import ChunkProgress

REPOSITORY = Path(__file__).parents[2]


class Engine:
    """An engine whose software is one file. It records the versions that it was switched to."""

    def __init__(self, root: Path) -> None:
        self.installation = Installation(root)
        self.journal: list[str] = []
        self.told: list[str | ChunkProgress] = []
        self.running = ""
        self.fail: dict[str, Exception] = {}
        self.pause: dict[str, asyncio.Event] = {}
        self.reached = asyncio.Event()

    async def _step(self, name: str) -> None:
        self.journal.append(name)
        if name in self.pause:
            self.reached.set()
            await self.pause[name].wait()
        if name in self.fail:
            raise self.fail[name]

    def version(self) -> str:
        current = self.installation.current()
        return "" if current is None else (current.folder / "version").read_text()

    def steps(self, version: str) -> InstallSteps:
        async def fill(folder: Path) -> None:
            assert os.listdir(folder) == []  # noqa: PTH208  # names only
            (folder / "version").write_text(version)
            await self._step("fill")

        async def check(folder: Path) -> Mapping[str, str]:
            assert (folder / "version").read_text() == version
            assert self.version() != version, "it is checked before the switch"
            await self._step("check")
            return {"kind": "engine", "version": version}

        async def adopt() -> None:
            self.running = self.version()
            await self._step(f"adopt {self.running}")

        return InstallSteps(fill, check, adopt)

    async def install(self, version: str) -> bool:
        async with asyncio.timeout(LIMIT):
            return await self.installation.replace(self.steps(version), self.told.append)

    def folders(self) -> list[str]:
        return sorted(path.name.rpartition("-")[0] for path in (self.installation.root / "versions").iterdir())


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "data" / "software")


async def test_new_version_is_checked_then_current_then_the_old_one_is_removed(engine: Engine) -> None:
    assert engine.installation.current() is None
    assert await engine.install("1")
    assert await engine.install("2")
    assert engine.version() == engine.running == "2"
    assert engine.folders() == ["engine-2"]
    assert engine.journal == ["fill", "check", "adopt 1", "fill", "check", "adopt 2"]
    current = engine.installation.current()
    assert current is not None
    assert current.facts == {"kind": "engine", "version": "2"}
    if sys.platform != "win32":
        assert engine.installation.root.stat().st_mode & 0o077 == 0


@pytest.mark.promise("P13")
@pytest.mark.parametrize("step", ["fill", "check"])
@pytest.mark.parametrize("error", [InstallError("it broke"), OSError(28, "No space left on device", "/there")])
async def test_failure_before_the_switch_changes_nothing(engine: Engine, step: str, error: Exception) -> None:
    await engine.install("1")
    engine.fail = {step: error}
    with pytest.raises(InstallError, match=r"it broke|/there: No space left on device\. The installation was not"):
        await engine.install("2")
    assert engine.version() == engine.running == "1"
    assert engine.folders() == ["engine-1"]
    engine.fail = {}
    assert await engine.install("2")


@pytest.mark.promise("P13")
async def test_version_that_does_not_start_is_rolled_back(engine: Engine) -> None:
    await engine.install("1")
    engine.fail = {"adopt 2": EngineStartError("it ended during its start")}
    match = "the new version failed; version 1 is used again: it ended during its start"
    with pytest.raises(InstallError, match=match):
        await engine.install("2")
    assert engine.version() == engine.running == "1"
    assert engine.folders() == ["engine-1"]
    assert engine.journal[-2:] == ["adopt 2", "adopt 1"]
    assert "the new version failed; switching back to version 1" in engine.told


@pytest.mark.promise("P13")
async def test_first_version_that_does_not_start_is_removed(engine: Engine) -> None:
    engine.fail = {"adopt 1": EngineStartError("no")}
    with pytest.raises(InstallError, match="the previous software is used again"):
        await engine.install("1")
    assert engine.installation.current() is None
    assert engine.folders() == []


async def test_old_version_that_does_not_start_again_is_reported(engine: Engine) -> None:
    await engine.install("1")
    engine.fail = {"adopt 2": EngineStartError("new"), "adopt 1": EngineStartError("old")}
    with pytest.raises(InstallError, match=r"failed: new\. version 1 is current again, .*: old\. Call StartEngine"):
        await engine.install("2")
    assert engine.version() == "1"
    assert engine.folders() == ["engine-1"]


@pytest.mark.promise("P13")
@pytest.mark.parametrize("step", ["fill", "check", "adopt 2"])
async def test_cancelled_installation_leaves_the_old_version(engine: Engine, step: str) -> None:
    await engine.install("1")
    engine.pause = {step: asyncio.Event()}
    installing = asyncio.create_task(engine.install("2"))
    await engine.reached.wait()
    installing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await installing
    assert engine.version() == "1"
    assert engine.folders() == ["engine-1"]
    engine.pause = {}
    assert await engine.install("3")


@pytest.mark.promise("P13")
async def test_one_complete_version_is_current_at_each_instant(engine: Engine) -> None:
    await engine.install("1")
    seen: set[str] = set()
    done = asyncio.Event()

    async def look() -> None:
        other = Installation(engine.installation.root)
        while not done.is_set():
            current = other.current()
            assert current is not None
            with suppress(FileNotFoundError):  # the old version was removed in between
                seen.add((current.folder / "version").read_text())
            await asyncio.sleep(0)

    looking = asyncio.create_task(look())
    for version in "23456":
        await engine.install(version)
    done.set()
    await looking
    assert seen <= set("123456")
    assert len(seen) > 1


@pytest.mark.promise("P27")
@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"folder": 7}', '{"folder": "../../etc"}', '{"folder": ".."}', '{"folder": "gone"}']
)
async def test_invalid_pointer_counts_as_no_version(engine: Engine, text: str) -> None:
    await engine.install("1")
    (engine.installation.root / "current.json").write_text(text)
    assert engine.installation.current() is None
    assert await engine.install("2")
    assert engine.folders() == ["engine-2"]


async def test_invalid_facts_of_a_pointer_are_ignored(engine: Engine) -> None:
    await engine.install("1")
    current = engine.installation.current()
    assert current is not None
    (engine.installation.root / "current.json").write_text(json.dumps({"folder": current.folder.name, "facts": []}))
    assert engine.installation.current() == InstalledVersion(current.folder)


async def test_version_name_is_sanitized_for_its_directory(engine: Engine) -> None:
    steps = engine.steps("x")

    async def check(_folder: Path) -> Mapping[str, str]:
        return {"kind": "../engine", "version": "1 / 2: a\x00" + "x" * 300}

    await engine.installation.replace(replace(steps, check=check), engine.told.append)
    [name] = engine.folders()
    assert name.startswith(".._engine-1_2_a_xxx")
    assert len(name) <= 80


CHILD = """
import asyncio, sys
from pathlib import Path
from engine_plugin.install.versions import Installation, InstallSteps

async def main(root):
    installation = Installation(Path(root))
    async def fill(folder):
        (folder / "version").write_text("child")
        async with installation.scratch() as scratch:
            (scratch / "half-a-wheel").write_text("")
            print("filling", flush=True)
            await asyncio.to_thread(sys.stdin.readline)
    async def check(folder):
        return {"kind": "engine", "version": "child"}
    async def adopt():
        pass
    print(await installation.replace(InstallSteps(fill, check, adopt), lambda step: None), flush=True)

asyncio.run(main(sys.argv[1]))
"""


async def child(root: Path) -> asyncio.subprocess.Process:
    """Another process that installs and waits for a line while it fills the directory."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD, str(root)),
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"filling\n"
    return process


@pytest.mark.promise("P14")
async def test_installations_of_two_processes_run_one_after_the_other(engine: Engine) -> None:
    process = await child(engine.installation.root)
    try:
        installing = asyncio.create_task(engine.install("mine"))
        async with asyncio.timeout(LIMIT):
            while "waiting for another installation" not in engine.told:  # noqa: ASYNC110  # a list, no event
                await asyncio.sleep(0.01)
        assert engine.journal == []
        await process.communicate(b"\n")
        assert await installing
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert process.returncode == 0
    assert engine.folders() == ["engine-mine"]


@pytest.mark.promise("P14")
async def test_installation_completed_by_another_process_is_not_repeated(engine: Engine) -> None:
    process = await child(engine.installation.root)
    try:
        steps = replace(engine.steps("mine"), is_done=lambda: engine.version() == "child")
        installing = asyncio.create_task(engine.installation.replace(steps, engine.told.append))
        async with asyncio.timeout(LIMIT):
            while "waiting for another installation" not in engine.told:  # noqa: ASYNC110  # a list, no event
                await asyncio.sleep(0.01)
            await process.communicate(b"\n")
            assert await installing is False
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert engine.journal == []
    assert engine.folders() == ["engine-child"]


@pytest.mark.promise("P13")
@pytest.mark.promise("U4")
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
async def test_remains_of_a_killed_installation_are_removed_by_the_next(engine: Engine) -> None:
    await engine.install("1")
    process = await child(engine.installation.root)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    assert engine.version() == "1"
    assert engine.folders() == ["engine-1", "staging", "staging"]
    await engine.install("2")
    assert engine.folders() == ["engine-2"]


async def test_wait_for_another_installation_times_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "LOCK_TIMEOUT", 0.2)
    engine.pause = {"fill": asyncio.Event()}
    first = asyncio.create_task(engine.install("1"))
    await engine.reached.wait()
    with pytest.raises(InstallError, match=r"another installation has held .*install.lock for 0.2 s"):
        await Engine(engine.installation.root).install("2")
    engine.pause["fill"].set()
    assert await first


async def test_data_directory_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file where the directory should be")
    with pytest.raises(
        InstallError,
        match=r"data.*: .*The installation was not changed\. Check the permissions",
    ):
        await Engine(tmp_path / "data" / "software").install("1")


@pytest.mark.promise("X3")
@pytest.mark.skipif(sys.platform == "win32", reason="the permissions of Windows are not looked at")
@pytest.mark.parametrize("place", [".", "current.json", "versions", "versions/engine-1"])
def test_version_that_another_user_can_change_is_rejected(tmp_path: Path, place: str) -> None:
    (tmp_path / "versions" / "engine-1").mkdir(parents=True)
    (tmp_path / "current.json").write_text(json.dumps({"folder": "engine-1", "facts": {}}))
    installation = Installation(tmp_path)
    assert installation.current() is not None
    (tmp_path / place).chmod(0o777)
    with pytest.raises(PreconditionError, match=f"trusted: .*{tmp_path.name}.* can be written by every user"):
        installation.current()
