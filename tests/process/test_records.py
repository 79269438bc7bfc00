"""The leftover processes of a crashed plugin are killed, and no others. Numbers are the field's requirements."""

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
from tests.process.conftest import CHILD, Spawner, alive

Left = Callable[..., Any]


@pytest.fixture
async def engine(spawner: Spawner) -> Any:
    """Spawn a child without an owner, as after a crash; return its pid when it is up."""
    children: list[ChildProcess] = []

    async def spawn(*actions: str, **environ: str) -> int:
        path = spawner.folder / f"up{len(children)}"
        argv = [*CHILD, "ignore-term", "ignore-stdin", *actions, f"ready:{path}"]
        children.append(ChildProcess())
        await children[-1].spawn(argv, {**spawner.env, **environ})
        await until(path.exists, "the child is up")
        return children[-1].pid

    yield spawn
    for child in children:
        assert await within(child.kill())


@pytest.fixture
def records(spawner: Spawner) -> ProcessRecords:
    return ProcessRecords(spawner.folder / "run")


@pytest.fixture
def ticket(spawner: Spawner, records: ProcessRecords) -> ProcessTicket:
    """A ticket for the processes of this test."""
    made = records.ticket()
    made.token = spawner.token
    return made


def record_of(ticket: ProcessTicket, pid: int) -> Path:
    """The file of a process's record."""
    return ticket.path(pid)


def orphan(ticket: ProcessTicket, pid: int, **changes: Any) -> Path:
    """Record a process as one of a dead owner."""
    ticket.add(pid)
    path = record_of(ticket, pid)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"owner": unused_pid()} | changes))
    return path


def unused_pid() -> int:
    """Return a pid that is not in use."""
    return next(pid for pid in range(4_000_000, 1, -1) if not psutil.pid_exists(pid))


async def reap(records: ProcessRecords) -> list[int]:
    return await within(asyncio.to_thread(records.reap))


@pytest.mark.promise("F11")
@pytest.mark.parametrize("where", ["grandchild", "loner"])
async def test_process_of_a_dead_owner_is_killed(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, spawner: Spawner, where: str
) -> None:
    """Its pid, start time and token are as recorded; its end and that of its descendants is confirmed."""
    pid = await engine(f"{where}:{spawner.path('grandchild')}")
    path = orphan(ticket, pid)
    assert await reap(records) == sorted([pid, spawner.pid("grandchild")])
    assert not alive(pid)
    assert not alive(spawner.pid("grandchild"))
    assert not path.exists()
    assert await reap(records) == []


@pytest.mark.promise("F11")
async def test_owner_whose_pid_was_reused_is_dead(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    pid = await engine()
    orphan(ticket, pid, owner=os.getpid(), owner_created=12345.0)
    assert await reap(records) == [pid]


@pytest.mark.promise("F11", "P11")
async def test_process_of_a_living_owner_is_kept(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
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
async def test_clock_change_makes_no_process_an_orphan(
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
async def test_process_with_another_token_is_kept(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    """Its pid and start time are as recorded, but it is another process."""
    pid = await engine()
    ticket.token = "another"
    path = orphan(ticket, pid)
    assert await reap(records) == []
    assert alive(pid)
    assert not path.exists(), "what it named is gone, so it is no longer needed"


@pytest.mark.promise("F11", "P11")
async def test_only_processes_with_the_token_are_killed(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
    """The same program, started otherwise, with a longer, a shorter, and no token."""
    environs = [ticket.token + "0", ticket.token[:-1], "", f"x {TOKEN_VARIABLE}={ticket.token}"]
    others = [await engine(**{TOKEN_VARIABLE: text}) for text in environs]
    others.append(await engine(**{TOKEN_VARIABLE: "", f"X_{TOKEN_VARIABLE}": ticket.token}))
    pid = await engine()
    orphan(ticket, pid)
    assert await reap(records) == [pid]
    assert all(alive(other) for other in others)


@pytest.mark.promise("F11")
@pytest.mark.parametrize("created", [12345.0, None])
async def test_process_with_a_reused_pid_is_kept(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, created: float | None
) -> None:
    """The process that has the pid of an ended one is kept; processes with the token are killed."""
    other = await engine(**{TOKEN_VARIABLE: ""})
    offspring = await engine()
    path = orphan(ticket, other, created=created)
    assert await reap(records) == [offspring]
    assert alive(other)
    assert not path.exists()


async def test_record_of_an_ended_process_is_removed(records: ProcessRecords, ticket: ProcessTicket) -> None:
    path = orphan(ticket, unused_pid())
    assert await reap(records) == []
    assert not path.exists()


@pytest.mark.promise("F5", "F11")
@pytest.mark.skipif(sys.platform == "win32", reason="on Windows the Job Object ended them")
@pytest.mark.parametrize("where", ["grandchild", "loner"])
async def test_descendants_of_a_dead_engine_are_killed(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, spawner: Spawner, where: str
) -> None:
    """The kernel ended the engine, or its guard, together with its plugin, but not the engine's children."""
    pid = await engine(f"{where}:{spawner.path('grandchild')}")
    grandchild = spawner.pid("grandchild")
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
async def test_session_of_another_process_is_kept(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, spawner: Spawner
) -> None:
    pid = await engine(f"grandchild:{spawner.path('grandchild')}")
    ticket.token = "another"
    orphan(ticket, pid)
    psutil.Process(pid).kill()
    await until(lambda: not psutil.pid_exists(pid), "the engine is gone and reaped")
    assert await reap(records) == []
    assert alive(spawner.pid("grandchild"))


@pytest.mark.promise("F11")
async def test_record_of_another_container_or_boot_is_kept_for_a_month(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pids mean other processes there, and its owner may live. After a month it is removed."""
    pid = await engine()
    path = orphan(ticket, pid, place="another")
    assert await reap(records) == []
    assert alive(pid)
    assert path.exists()
    os.utime(path, (0, 0))
    assert await reap(records) == []
    assert alive(pid)
    assert not path.exists()


async def test_process_that_cannot_be_ended_is_tried_again(
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


async def test_ticket_is_reused_for_the_next_process(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left
) -> None:
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
async def test_unreadable_record_is_removed(records: ProcessRecords, text: str) -> None:
    records.folder.mkdir()
    path = records.folder / "7.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert await reap(records) == []
    assert not path.exists()


@pytest.mark.promise("P27")
async def test_other_files_and_a_missing_directory_are_ignored(records: ProcessRecords) -> None:
    assert await reap(records) == []
    assert not records.folder.exists()
    records.folder.mkdir()
    (records.folder / "notes.txt").touch()
    assert await reap(records) == []
    assert (records.folder / "notes.txt").exists()


async def test_record_is_written_atomically(
    records: ProcessRecords, ticket: ProcessTicket, engine: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record exists completely or not at all."""
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


async def test_record_that_cannot_be_written_leaves_no_file(
    records: ProcessRecords, ticket: ProcessTicket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_self: Path, _target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        ticket.add(os.getpid())
    assert list(records.folder.iterdir()) == []


async def test_concurrent_reaps_end_every_orphan(
    spawner: Spawner, records: ProcessRecords, ticket: ProcessTicket, engine: Left
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
