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

from engine_plugin.process import records as records_module
from engine_plugin.process import tree
from engine_plugin.process.child import ChildProcess
from engine_plugin.process.records import TOKEN_VARIABLE, ProcessRecords, ProcessTicket
from tests.patience import until, within
from tests.process.conftest import CHILD, Stage, alive

Left = Callable[..., Any]


@pytest.fixture
async def engine(stage: Stage) -> Any:
    """Spawns a child that nobody waits for, as after a crash; returns its pid when it is up."""
    children: list[ChildProcess] = []

    async def spawn(*actions: str, **environ: str) -> int:
        path = stage.folder / f"up{len(children)}"
        argv = [*CHILD, "ignore-term", "ignore-stdin", *actions, f"ready:{path}"]
        children.append(await ChildProcess.spawn(argv, {**stage.env, **environ}, lambda _fd, _data: None))
        await until(path.exists, "the child is up")
        return children[-1].pid

    yield spawn
    for child in children:
        assert await within(child.kill())


@pytest.fixture
def records(stage: Stage) -> ProcessRecords:
    return ProcessRecords(stage.folder / "run")


@pytest.fixture
def ticket(stage: Stage, records: ProcessRecords) -> ProcessTicket:
    """A ticket for the processes of this test."""
    made = records.ticket()
    made.token = stage.token
    return made


def record_of(ticket: ProcessTicket, pid: int) -> Path:
    """The file of a process's record."""
    return ticket.path(pid)


def orphan(ticket: ProcessTicket, pid: int, **changes: Any) -> Path:
    """Record a process as one of an owner who is gone."""
    ticket.add(pid)
    path = record_of(ticket, pid)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"owner": _nobody()} | changes))
    return path


def _nobody() -> int:
    """A pid that is not in use."""
    return next(pid for pid in range(4_000_000, 1, -1) if not psutil.pid_exists(pid))


async def reap(records: ProcessRecords) -> list[int]:
    return await within(asyncio.to_thread(records.reap))


@pytest.mark.promise("F11")
@pytest.mark.parametrize("where", ["grandchild", "loner"])
async def test_what_a_dead_owner_left_is_killed(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, stage: Stage, where: str
) -> None:
    """Owner gone, pid, start and token as recorded; its end is confirmed, and that of its offspring."""
    pid = await engine(f"{where}:{stage.path('grandchild')}")
    path = orphan(ticket, pid)
    assert await reap(records) == sorted([pid, stage.pid("grandchild")])
    assert not alive(pid)
    assert not alive(stage.pid("grandchild"))
    assert not path.exists()
    assert await reap(records) == []


@pytest.mark.promise("F11")
async def test_an_owner_whose_pid_is_anothers_now_is_gone(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    pid = await engine()
    orphan(ticket, pid, owner=os.getpid(), owner_created=12345.0)
    assert await reap(records) == [pid]


@pytest.mark.promise("F11", "P11")
async def test_what_a_living_owner_has_is_his(records: ProcessRecords, ticket: ProcessTicket, engine: Left) -> None:
    pid = await engine()
    ticket.add(pid)
    assert await reap(ProcessRecords(records.folder)) == []
    assert alive(pid)
    assert record_of(ticket, pid).exists()
    ticket.remove(pid)
    assert list(records.folder.iterdir()) == []
    ticket.remove(pid)


@pytest.mark.promise("F11")
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a start does not depend on the time of the boot")
async def test_a_clock_that_is_set_makes_nobody_an_orphan(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of the boot, from which a process's time of creation is computed, moves with the clock."""
    pid = await engine()
    ticket.add(pid)
    before = psutil.Process(pid).create_time()
    booted = psutil.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: booted + 3600)
    assert psutil.Process(pid).create_time() != before
    assert await reap(records) == []
    assert alive(pid)
    orphan(ticket, pid)
    assert await reap(records) == [pid]


@pytest.mark.promise("F11", "P11")
async def test_a_process_with_another_token_is_not_touched(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    """The number is right, and even the start: but it is not the process that was recorded."""
    pid = await engine()
    ticket.token = "another"
    path = orphan(ticket, pid)
    assert await reap(records) == []
    assert alive(pid)
    assert not path.exists(), "what it named is gone, so it is no longer needed"


@pytest.mark.promise("F11", "P11")
async def test_only_the_bearers_of_the_token_are_touched(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    """The same program, started by somebody else, with a longer, a shorter, and no token."""
    environs = [ticket.token + "0", ticket.token[:-1], "", f"x {TOKEN_VARIABLE}={ticket.token}"]
    others = [await engine(**{TOKEN_VARIABLE: text}) for text in environs]
    others.append(await engine(**{TOKEN_VARIABLE: "", f"X_{TOKEN_VARIABLE}": ticket.token}))
    pid = await engine()
    orphan(ticket, pid)
    assert await reap(records) == [pid]
    assert all(alive(other) for other in others)


@pytest.mark.promise("F11")
@pytest.mark.parametrize("created", [12345.0, None])
async def test_the_number_is_anothers_now(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, created: float | None
) -> None:
    """What is recorded is gone. Whoever has its number now is safe; a bearer of the token is not."""
    other = await engine(**{TOKEN_VARIABLE: ""})
    offspring = await engine()
    path = orphan(ticket, other, created=created)
    assert await reap(records) == [offspring]
    assert alive(other)
    assert not path.exists()


async def test_a_process_that_is_gone_is_forgotten(records: ProcessRecords, ticket: ProcessTicket) -> None:
    path = orphan(ticket, _nobody())
    assert await reap(records) == []
    assert not path.exists()


@pytest.mark.promise("F5", "F11")
@pytest.mark.skipif(sys.platform == "win32", reason="on Windows the Job Object ended them")
@pytest.mark.parametrize("where", ["grandchild", "loner"])
async def test_what_a_dead_engine_left_is_killed(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, stage: Stage, where: str
) -> None:
    """The kernel ended the engine, or its guard, together with its plugin, but not the engine's children."""
    pid = await engine(f"{where}:{stage.path('grandchild')}")
    grandchild = stage.pid("grandchild")
    orphan(ticket, pid)
    psutil.Process(pid).kill()
    await until(lambda: not psutil.pid_exists(pid), "the engine is gone and reaped")
    assert alive(grandchild)
    assert [process.pid for process in ticket.stragglers()] == [grandchild]
    assert await reap(records) == [grandchild]
    assert not alive(grandchild)
    assert ticket.stragglers() == []


@pytest.mark.promise("F11")
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX sessions")
async def test_the_session_of_another_is_not_touched(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, stage: Stage
) -> None:
    pid = await engine(f"grandchild:{stage.path('grandchild')}")
    ticket.token = "another"
    orphan(ticket, pid)
    psutil.Process(pid).kill()
    await until(lambda: not psutil.pid_exists(pid), "the engine is gone and reaped")
    assert await reap(records) == []
    assert alive(stage.pid("grandchild"))


@pytest.mark.promise("F11")
async def test_a_record_of_another_container_or_boot(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There its numbers mean others, and its owner may live. After a month it is thrown away."""
    pid = await engine()
    path = orphan(ticket, pid, place="another")
    assert await reap(records) == []
    assert alive(pid)
    assert path.exists()
    os.utime(path, (0, 0))
    assert await reap(records) == []
    assert alive(pid)
    assert not path.exists()


async def test_what_cannot_be_ended_is_tried_again(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = await engine()
    path = orphan(ticket, pid)
    with monkeypatch.context() as unkillable:
        unkillable.setattr(records_module, "KILL_CONFIRM", 0.05)
        unkillable.setattr(os, "kill", lambda _pid, _signal: None)
        unkillable.setattr(os, "killpg", lambda _pid, _signal: None)
        unkillable.setattr(psutil.Process, "kill", lambda _self: None)
        assert await reap(records) == [pid]
    assert alive(pid)
    assert path.exists()
    assert await reap(records) == [pid]
    assert not alive(pid)
    assert not path.exists()


async def test_a_ticket_serves_one_process_after_the_other(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    assert ticket.environ == {TOKEN_VARIABLE: ticket.token}
    first, second = await engine(), await engine()
    ticket.add(first)
    ticket.remove(first)
    ticket.add(second)
    assert list(records.folder.iterdir()) == [record_of(ticket, second)]
    assert {process.pid for process in ticket.stragglers()} == {first, second}
    assert records.ticket().stragglers() == []


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
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under its name a record is there in full or not at all."""
    pid = await engine()
    replaced: list[tuple[dict[str, Any], bool]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        replaced.append((json.loads(self.read_text()), target.exists()))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    ticket.add(pid)
    [(record, was_there)] = replaced
    assert not was_there
    assert record == {
        "pid": pid,
        "created": tree.start_time(pid),
        "token": ticket.token,
        "owner": os.getpid(),
        "owner_created": tree.start_time(os.getpid()),
        "place": records_module.place(),
    }
    assert list(records.folder.iterdir()) == [record_of(ticket, pid)]
    if sys.platform != "win32":
        assert records.folder.stat().st_mode & 0o777 == 0o700


async def test_a_record_that_cannot_be_written_leaves_nothing(
    records: ProcessRecords, ticket: ProcessTicket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        ticket.add(os.getpid())
    assert list(records.folder.iterdir()) == []


async def test_two_who_reap_at_once(
    stage: Stage, records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    pids = [await engine() for _ in range(3)]
    for pid in pids:
        orphan(ticket, pid)
    found = await asyncio.gather(reap(records), reap(ProcessRecords(records.folder)))
    assert set(found[0]) | set(found[1]) == set(pids)
    assert not any(alive(pid) for pid in pids)
    assert list(records.folder.iterdir()) == []


def test_tokens_differ(tmp_path: Path) -> None:
    records = ProcessRecords(tmp_path)
    assert len({records.ticket().token for _ in range(10)}) == 10
