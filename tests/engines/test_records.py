"""What a crashed plugin left behind is ended, and nothing else. Numbers are the field's requirements."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine_plugin.engines import tree
from engine_plugin.engines.child import ChildProcess
from engine_plugin.engines.records import ProcessRecords
from tests.engines.conftest import CHILD, Stage, alive, until, within

Left = Callable[..., Any]


@pytest.fixture
async def engine(stage: Stage) -> Any:
    """Spawns a child that nobody waits for, as after a crash; returns its pid when it is up."""
    children: list[ChildProcess] = []

    async def spawn(*actions: str) -> int:
        path = stage.folder / f"up{len(children)}"
        argv = [*CHILD, "ignore-term", "ignore-stdin", *actions, f"ready:{path}"]
        children.append(await ChildProcess.spawn(argv, stage.env, lambda _fd, _data: None))
        await until(path.exists, "the child is up")
        return children[-1].pid

    yield spawn
    for child in children:
        assert await within(child.kill())


@pytest.fixture
def records(stage: Stage) -> ProcessRecords:
    made = ProcessRecords(stage.folder / "run")
    made.token = stage.token
    return made


def change(records: ProcessRecords, pid: int, **changes: Any) -> Path:
    """Change the record of a process, in the first place to one of an owner who is gone."""
    path = records.folder / f"{pid}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"owner": _nobody()} | changes))
    return path


def _nobody() -> int:
    """A pid that is not in use."""
    return next(pid for pid in range(4_000_000, 1, -1) if not psutil.pid_exists(pid))


async def reap(records: ProcessRecords) -> list[int]:
    return await within(asyncio.to_thread(records.reap))


@pytest.mark.promise("F11")
async def test_what_a_dead_owner_left_is_killed(records: ProcessRecords, engine: Left, stage: Stage) -> None:
    """(11) Owner gone, pid, start time and token as recorded; its end is confirmed."""
    pid = await engine(f"grandchild:{stage.path('grandchild')}")
    records.add(pid)
    path = change(records, pid)
    assert await reap(records) == [pid]
    assert not alive(pid)
    assert not alive(stage.pid("grandchild"))
    assert not path.exists()
    assert await reap(records) == []


@pytest.mark.promise("F11")
async def test_an_owner_whose_pid_is_anothers_now_is_gone(records: ProcessRecords, engine: Left) -> None:
    pid = await engine()
    records.add(pid)
    change(records, pid, owner=os.getpid(), owner_created=12345.0)
    assert await reap(records) == [pid]


@pytest.mark.promise("F11", "P11")
async def test_what_a_living_owner_has_is_his(records: ProcessRecords, engine: Left) -> None:
    pid = await engine()
    records.add(pid)
    assert await reap(records) == []
    assert alive(pid)
    assert (records.folder / f"{pid}.json").exists()
    records.remove(pid)
    assert list(records.folder.iterdir()) == []
    records.remove(pid)


@pytest.mark.promise("F11", "P11")
@pytest.mark.parametrize("changes", [{"token": "another"}, {"created": 12345.0}, {"created": None}])
async def test_another_process_is_not_touched(records: ProcessRecords, engine: Left, changes: dict[str, Any]) -> None:
    """(11) Another token, or a pid that has been given to another process since."""
    pid = await engine()
    records.add(pid)
    path = change(records, pid, **changes)
    assert await reap(records) == []
    assert alive(pid)
    assert not path.exists(), "what it named is gone, so it is no longer needed"


async def test_a_process_that_is_gone_is_forgotten(records: ProcessRecords) -> None:
    records.add(_nobody())
    path = change(records, _nobody())
    assert await reap(records) == []
    assert not path.exists()


@pytest.mark.promise("F5", "F11")
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions; on Windows the Job Object ended them")
async def test_what_a_dead_engine_left_is_killed(records: ProcessRecords, engine: Left, stage: Stage) -> None:
    """(5) The kernel ended the engine together with its plugin, but not the engine's children."""
    pid = await engine(f"grandchild:{stage.path('grandchild')}")
    grandchild = stage.pid("grandchild")
    records.add(pid)
    change(records, pid)
    psutil.Process(pid).kill()
    await until(lambda: not psutil.pid_exists(pid), "the engine is gone and reaped")
    assert alive(grandchild)
    assert await reap(records) == [grandchild]
    assert not alive(grandchild)


@pytest.mark.promise("F11", "P11")
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions")
async def test_the_session_of_another_is_not_touched(records: ProcessRecords, engine: Left, stage: Stage) -> None:
    pid = await engine(f"grandchild:{stage.path('grandchild')}")
    records.add(pid)
    change(records, pid, token="another")
    psutil.Process(pid).kill()
    await until(lambda: not psutil.pid_exists(pid), "the engine is gone and reaped")
    assert await reap(records) == []
    assert alive(stage.pid("grandchild"))


@pytest.mark.promise("P27")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        '{"pid": 5}',
        '{"pid": "x", "created": 1, "token": "", "owner": 1, "owner_created": 1}',
        '{"pid": 1e999, "created": 1, "token": "", "owner": 1, "owner_created": 1}',
        '{"pid": -5, "created": 1, "token": "", "owner": 99999999, "owner_created": 1}',
        '{"pid": 0, "created": 1, "token": "", "owner": 99999999, "owner_created": 1}',
        '{"pid": 99999999, "created": 1, "token": "", "owner": -7, "owner_created": 1}',
        f'{{"pid": {10**30}, "created": 1, "token": "", "owner": 99999999, "owner_created": 1}}',
        "\0\0\0\0",
        "\udcff",
    ],
)
async def test_an_unreadable_record_is_removed(records: ProcessRecords, text: str) -> None:
    records.folder.mkdir()
    path = records.folder / "7.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert await reap(records) == []
    assert not path.exists()


@pytest.mark.promise("P27")
async def test_other_files_and_no_directory(records: ProcessRecords) -> None:
    assert await reap(records) == []
    assert not records.folder.exists()
    records.folder.mkdir()
    (records.folder / "notes.txt").touch()
    assert await reap(records) == []
    assert (records.folder / "notes.txt").exists()


async def test_a_record_is_written_whole(
    records: ProcessRecords, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name a record is there in full or not at all."""
    pid = await engine()
    replaced: list[tuple[dict[str, Any], bool]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        replaced.append((json.loads(self.read_text()), target.exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    records.add(pid)
    [(record, was_there)] = replaced
    assert not was_there
    assert record == {
        "pid": pid,
        "created": tree.start_time(pid),
        "token": records.token,
        "owner": os.getpid(),
        "owner_created": tree.start_time(os.getpid()),
    }
    assert [path.name for path in records.folder.iterdir()] == [f"{pid}.json"]
    if sys.platform != "win32":
        assert records.folder.stat().st_mode & 0o777 == 0o700


async def test_a_record_that_cannot_be_written_leaves_nothing(
    records: ProcessRecords, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        records.add(os.getpid())
    assert list(records.folder.iterdir()) == []


@pytest.mark.promise("F11")
async def test_two_who_reap_at_once(stage: Stage, records: ProcessRecords, engine: Left) -> None:
    pids = [await engine() for _ in range(3)]
    for pid in pids:
        records.add(pid)
        change(records, pid)
    other = ProcessRecords(records.folder)
    found = await asyncio.gather(reap(records), reap(other))
    assert set(found[0]) | set(found[1]) == set(pids)
    assert not any(alive(pid) for pid in pids)
    assert list(records.folder.iterdir()) == []


def test_tokens_differ(tmp_path: Path) -> None:
    assert len({ProcessRecords(tmp_path).token for _ in range(10)}) == 10
