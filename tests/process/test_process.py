"""The process actor, on real processes. Numbers in parentheses are those of the field's requirements."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import EngineStartError, InvalidRequestError, UnavailableError
from engine_plugin.process.engine_process import MOVES, EngineProcess, ProcessState
from tests.patience import LIMIT, NEVER, pace, until, within
from tests.process.conftest import CHILD, Spawner, alive, descriptors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and sessions")


@pytest.fixture(autouse=True)
async def no_tasks_are_left() -> AsyncIterator[None]:
    """Check that a test leaves no tasks."""
    before = asyncio.all_tasks()
    yield
    await until(lambda: asyncio.all_tasks() - {asyncio.current_task()} <= before, "tasks are left")


@pytest.fixture
def spawned(spawner: Spawner) -> list[int]:
    """The pids of all processes that were spawned through `counted`."""
    return []


def ready(spawner: Spawner) -> str:
    return f"ready:{spawner.path('ready')}"


def state_of(process: EngineProcess) -> ProcessState:
    """Return the current state; type checkers assume that an attribute is unchanged."""
    return process.state


# Starting


@pytest.mark.promise("F18", "P4")
async def test_concurrent_callers_share_one_start(spawner: Spawner, spawned: list[int]) -> None:
    process = spawner.engine(ready(spawner), on_spawn=spawned.append)
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(process.ensure_ready() for _ in range(50)))
    assert state_of(process) is ProcessState.READY
    assert len(spawned) == 1
    assert process.pid == spawned[0]
    await within(process.ensure_ready())
    assert len(spawned) == 1, "ready already"
    await within(process.stop())
    assert state_of(process) is ProcessState.STOPPED
    assert process.pid is None
    assert not alive(spawned[0])


@pytest.mark.promise("F18")
async def test_cancelled_waiter_does_not_cancel_the_start(spawner: Spawner, spawned: list[int]) -> None:
    process = spawner.engine(f"until:{spawner.path('go')}", ready(spawner), on_spawn=spawned.append)
    waiters = [asyncio.create_task(process.ensure_ready()) for _ in range(3)]
    await until(lambda: bool(spawned), "spawned")
    waiters[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiters[0]
    assert state_of(process) is ProcessState.STARTING
    (spawner.folder / "go").touch()
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*waiters[1:])
    assert len(spawned) == 1
    assert state_of(process) is ProcessState.READY


@pytest.mark.promise("F18")
async def test_start_continues_when_all_waiters_are_cancelled(spawner: Spawner) -> None:
    process = spawner.engine(ready(spawner))
    waiter = asyncio.create_task(process.ensure_ready())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    await until(lambda: process.state is ProcessState.READY, "ready")


async def test_failed_start_without_waiters_logs_no_unretrieved_error(spawner: Spawner) -> None:
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: complaints.append(context))
    waiter = asyncio.create_task(spawner.engine("exit:4").ensure_ready())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    await until(lambda: spawner.processes[0].state is ProcessState.FAILED, "failed")
    del waiter
    spawner.processes.clear()
    gc.collect()
    await asyncio.sleep(0)
    assert complaints == []


@posix_only
async def test_process_is_ready_when_its_socket_accepts(spawner: Spawner) -> None:
    path = spawner.path("s.sock")

    async def connects() -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(path)
        except OSError:
            return False
        writer.close()
        await writer.wait_closed()
        return True

    process = spawner.engine(f"listen:{path}", ready=connects)
    await within(process.ensure_ready())


async def test_stdin_is_written_and_stays_open(spawner: Spawner) -> None:
    process = spawner.engine(f"stdin:{spawner.path('heard')}", ready(spawner), stdin=b"settings\n")
    await within(process.ensure_ready())
    assert (spawner.folder / "heard").read_text() == "settings\n"
    assert process.pid is not None
    assert alive(process.pid)


async def test_child_knows_its_parent_and_runs_in_the_root_directory(spawner: Spawner) -> None:
    heard: list[str] = []
    script = "import os; print(os.environ['ENGINE_PLUGIN_PARENT'], os.getcwd(), flush=True)"
    argv = [sys.executable, "-I", "-S", "-c", script]
    process = spawner.engine(argv=argv, on_output=heard.append)
    with pytest.raises(EngineStartError):
        await within(process.ensure_ready())
    assert heard == [f"{os.getpid()} {spawner.folder.anchor}"], "its own folder is never the plugin's"


# Failing


@pytest.mark.promise("F16")
async def test_failed_start_names_exit_code_and_last_output(spawner: Spawner) -> None:
    """(16) A failed start reaps its process; all waiters get the reason."""
    process = spawner.engine("print:one", "err:two", "err0:no space left", "exit:3")
    outcomes = await asyncio.gather(*(process.ensure_ready() for _ in range(5)), return_exceptions=True)
    for outcome in outcomes:
        assert isinstance(outcome, EngineStartError)
        assert "child ended during its start: exit code 3" in str(outcome)
        assert "one" in str(outcome)
        assert "two" in str(outcome)
        assert "no space left" in str(outcome)
    assert state_of(process) is ProcessState.FAILED
    assert process.failure == str(outcomes[0])


@pytest.mark.promise("F16")
@posix_only
async def test_failed_start_names_the_signal(spawner: Spawner) -> None:
    process = spawner.engine("err:assertion failed", "die:SIGABRT")
    with pytest.raises(EngineStartError, match=r"SIGABRT \(exit code -6\).*assertion failed"):
        await within(process.ensure_ready())


async def test_failed_start_quotes_error_lines_first(spawner: Spawner) -> None:
    noise = [f"err:noise {number}" for number in range(20)]
    process = spawner.engine("err:0.1 E cannot open model", *noise, "exit:1", error_marks=(" E ",))
    with pytest.raises(EngineStartError, match=r"Last lines: 0\.1 E cannot open model$"):
        await within(process.ensure_ready())


async def test_unrunnable_command_is_named_in_the_error(spawner: Spawner) -> None:
    missing = spawner.path("no-such-program")
    with pytest.raises(EngineStartError, match=f"cannot run {missing}: No such file"):
        await within(spawner.engine(argv=[missing]).ensure_ready())
    plain = spawner.folder / "plain"
    plain.touch(mode=0o644)
    with pytest.raises(EngineStartError, match=f"cannot run {plain}: Permission denied"):
        await within(spawner.engine(argv=[str(plain)]).ensure_ready())
    with pytest.raises(EngineStartError, match="unexpected ValueError"):
        await within(spawner.engine(argv=["a\0b"]).ensure_ready())


@pytest.mark.promise("F11")
async def test_spawn_that_cannot_be_recorded_leaves_no_process(spawner: Spawner, spawned: list[int]) -> None:
    """(11) Without a record the process could not be found after a crash."""

    def refuse(pid: int) -> None:
        spawned.append(pid)
        raise OSError(28, "No space left on device", "/records/1.json")

    process = spawner.engine(ready(spawner), on_spawn=refuse)
    with pytest.raises(EngineStartError, match="No space left on device") as caught:
        await within(process.ensure_ready())
    assert "cannot run" not in str(caught.value), "it did run"
    assert "/records/1.json" in str(caught.value)
    assert state_of(process) is ProcessState.FAILED
    assert not alive(spawned[0])


async def test_end_that_cannot_be_recorded_still_counts(spawner: Spawner, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(_pid: int) -> None:
        raise OSError(30, "Read-only file system")

    process = spawner.engine(ready(spawner), on_end=refuse)
    await within(process.ensure_ready())
    await within(process.stop())
    assert state_of(process) is ProcessState.STOPPED
    assert "Read-only file system" in caplog.text


async def test_probe_that_reports_an_invalid_model_ends_the_start(spawner: Spawner) -> None:
    async def never() -> bool:
        raise InvalidRequestError("this model has no tokenizer")

    process = spawner.engine("err:words", ready=never)
    with pytest.raises(EngineStartError, match="child cannot serve: this model has no tokenizer"):
        await within(process.ensure_ready())
    assert state_of(process) is ProcessState.FAILED


async def test_probe_error_without_a_message_is_named_by_its_type(spawner: Spawner) -> None:
    async def slow() -> bool:
        raise TimeoutError

    with pytest.raises(EngineStartError, match="child cannot serve: TimeoutError"):
        await within(spawner.engine(ready=slow).ensure_ready())


@pytest.mark.promise("F20")
async def test_probe_failure_caused_by_the_death_reports_the_death(spawner: Spawner) -> None:
    """(20) The connection breaks a moment before the exit is known; the exit is what matters."""

    async def breaks() -> bool:
        (spawner.folder / "go").touch()
        raise UnavailableError("connection reset")

    process = spawner.engine(f"until:{spawner.path('go')}", "err:out of memory", "exit:9", ready=breaks)
    with pytest.raises(EngineStartError, match=r"exit code 9\. Last lines: out of memory"):
        await within(process.ensure_ready())


# Patience


@pytest.mark.promise("F14")
async def test_start_without_progress_ends_and_names_the_option(spawner: Spawner, spawned: list[int]) -> None:
    """(14) The timeout says which option to raise, and a later start may succeed."""
    process = spawner.engine("err:mapping", on_spawn=spawned.append, start_timeout=pace(0.3))
    with pytest.raises(EngineStartError, match=r"no sign of progress for [\d.]+ s .*mapping.*engine\.start_timeout"):
        await within(process.ensure_ready())
    assert not alive(spawned[0])
    (spawner.folder / "ready").touch()
    await within(process.ensure_ready())
    assert state_of(process) is ProcessState.READY
    assert process.failure == ""


@pytest.mark.promise("F14")
async def test_output_counts_as_progress(spawner: Spawner) -> None:
    limit, interval = pace(0.6), 0.03  # far below the interval of probes, whose echo does not count
    process = spawner.engine(f"slow:{round(2 * limit / interval)}:{interval}", ready(spawner), start_timeout=limit)
    await within(process.ensure_ready())


@pytest.mark.promise("F14")
async def test_processor_use_counts_as_progress(spawner: Spawner) -> None:
    """(14) A large model loads without output."""
    process = spawner.engine(f"burn:{pace(1.5)}", ready(spawner), start_timeout=pace(0.5))
    await within(process.ensure_ready())


@pytest.mark.promise("F14")
@posix_only
async def test_processor_use_of_a_child_counts_as_progress(spawner: Spawner) -> None:
    """Where the guard stays in between, the engine is a child of the process that we know."""
    child = [*CHILD, f"burn:{pace(1.5)}", ready(spawner)]
    program = f"import subprocess, sys; subprocess.call({child!r})"
    process = spawner.engine(argv=[sys.executable, "-I", "-S", "-c", program], start_timeout=pace(0.5))
    await within(process.ensure_ready())


@pytest.mark.promise("F14")
@pytest.mark.parametrize("show", ["slow:100000:0.05", "burn:600"])
async def test_progress_does_not_extend_a_start_beyond_its_limit(spawner: Spawner, show: str) -> None:
    process = spawner.engine(show, start_timeout=NEVER, start_limit=0.9)
    with pytest.raises(EngineStartError, match=r"not ready after 0\.9 s .*engine\.start_limit"):
        await within(process.ensure_ready())


async def test_hanging_probe_is_bounded(spawner: Spawner) -> None:
    async def hangs() -> bool:
        await asyncio.Event().wait()
        return True

    process = spawner.engine(ready=hangs, start_timeout=0.3)
    with pytest.raises(EngineStartError, match=r"start_timeout"):
        await within(process.ensure_ready())


# Living and dying


@pytest.mark.promise("F2")
@pytest.mark.parametrize("kind", ["lines", "solid"])
async def test_flood_of_output_does_not_block_the_process(spawner: Spawner, kind: str) -> None:
    """(2) 2 × 8 MiB, with or without line ends; the output after them is still kept."""
    process = spawner.engine(f"flood:1:8:{kind}", f"flood:2:8:{kind}", "err:", "err:last words", "exit:5")
    with pytest.raises(EngineStartError, match="last words") as caught:
        await within(process.ensure_ready())
    assert len(str(caught.value)) < 20_000


async def test_every_line_of_stdout_is_passed_on(spawner: Spawner) -> None:
    """The address of the server may be followed by many lines in the same block."""
    heard: list[str] = []
    process = spawner.engine(
        "print:address\n" + "\n".join(map(str, range(500))), ready(spawner), on_output=heard.append
    )
    await within(process.ensure_ready())
    await until(lambda: len(heard) == 501, "all lines")
    assert heard[:2] == ["address", "0"]


async def test_output_that_is_not_utf8_is_decoded(spawner: Spawner) -> None:
    script = "import os; os.write(2, b'caf\\xe9 \\xf0\\x9f\\x98\\x80\\r\\n'); os._exit(1)"
    process = spawner.engine(argv=[sys.executable, "-I", "-S", "-c", script])
    with pytest.raises(EngineStartError, match=r"caf\ufffd \U0001f600$"):
        await within(process.ensure_ready())


@pytest.mark.promise("F20")
async def test_death_is_reported_and_the_next_start_succeeds(spawner: Spawner, spawned: list[int]) -> None:
    """(20) A dead process is never reported as loaded."""
    go = spawner.folder / "go"
    process = spawner.engine(
        ready(spawner), f"until:{go}", "err:segfault in kernel 7", "exit:7", on_spawn=spawned.append
    )
    await within(process.ensure_ready())
    go.touch()
    await within(process.ended.wait())
    assert state_of(process) is ProcessState.FAILED
    assert "child died: exit code 7" in process.failure
    assert "segfault in kernel 7" in process.failure
    go.unlink()
    await within(process.ensure_ready())
    assert state_of(process) is ProcessState.READY
    assert process.failure == ""
    assert len(spawned) == 2


@pytest.mark.promise("F20")
@posix_only
async def test_process_killed_from_outside_names_the_signal(spawner: Spawner) -> None:
    process = spawner.engine(ready(spawner))
    await within(process.ensure_ready())
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    await within(process.ended.wait())
    assert "child died: SIGKILL (exit code -9)" in process.failure


@pytest.mark.promise("F20")
@posix_only
async def test_death_is_detected_while_a_grandchild_holds_the_pipes(spawner: Spawner) -> None:
    """(5, 20) The leader exits by itself, its grandchild lives on in its group with our pipes open."""
    grandchild = spawner.path("grandchild")
    process = spawner.engine(f"grandchild:{grandchild}", ready(spawner), f"until:{spawner.path('go')}", "exit:2")
    await within(process.ensure_ready())
    pid = spawner.pid("grandchild")
    assert alive(pid)
    (spawner.folder / "go").touch()
    await within(process.ended.wait())
    assert "exit code 2" in process.failure
    assert not alive(pid), "ended means that nothing is left"


@pytest.mark.promise("F20")
@posix_only
async def test_caller_during_the_cleanup_of_a_dead_process_gets_a_new_one(
    spawner: Spawner, spawned: list[int]
) -> None:
    """(20) The process is not ready from the moment at which its exit is known."""
    go = spawner.folder / "go"
    actions = [f"grandchild:{spawner.path('grandchild')}", ready(spawner), f"until:{go}", "exit:2"]
    process = spawner.engine(*actions, on_spawn=spawned.append)
    await within(process.ensure_ready())
    go.touch()
    await until(lambda: not alive(spawned[0]), "dead")
    await until(lambda: process.state is not ProcessState.READY, "noticed")
    go.unlink()
    await within(process.ensure_ready())
    assert len(spawned) == 2
    assert process.pid == spawned[1]
    assert alive(spawned[1])


# Stopping


@pytest.mark.promise("F17")
@posix_only
async def test_stop_sends_sigterm_first(spawner: Spawner) -> None:
    """(17) A process that obeys SIGTERM is not waited for any longer."""
    process = spawner.engine(ready(spawner), "ignore-stdin", stop_timeout=NEVER)
    await within(process.ensure_ready())
    await within(process.stop())


@pytest.mark.promise("F17")
@posix_only
async def test_process_that_ignores_sigterm_is_killed(spawner: Spawner, spawned: list[int]) -> None:
    """(17) SIGTERM, a bounded wait, SIGKILL, and the end is confirmed."""
    process = spawner.engine("ignore-term", "ignore-stdin", ready(spawner), stop_timeout=0.3, on_spawn=spawned.append)
    await within(process.ensure_ready())
    began = time.monotonic()
    await within(process.stop())
    assert time.monotonic() - began > 0.25, "it was given its time"
    assert state_of(process) is ProcessState.STOPPED
    assert not alive(spawned[0])


@posix_only
async def test_stop_by_stdin_sends_no_signal(spawner: Spawner) -> None:
    """SIGTERM would end the child too, so it records the signal."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'signalled\\n'));"
        "open(sys.argv[1], 'w').close(); os.read(0, 1); os.write(1, b'end of stdin\\n')"
    )
    heard: list[str] = []
    argv = [sys.executable, "-I", "-S", "-c", script, spawner.path("ready")]
    process = spawner.engine(argv=argv, stop_by_stdin=True, on_output=heard.append, stop_timeout=NEVER)
    await within(process.ensure_ready())
    await within(process.stop())
    assert heard == ["end of stdin"]


@pytest.mark.promise("F17")
async def test_process_that_ignores_the_end_of_stdin_is_killed(spawner: Spawner) -> None:
    process = spawner.engine(ready(spawner), "ignore-stdin", stop_by_stdin=True, stop_timeout=0.2)
    await within(process.ensure_ready())
    await within(process.stop())
    assert state_of(process) is ProcessState.STOPPED


@pytest.mark.promise("F5")
@posix_only
@pytest.mark.parametrize("kind", ["grandchild", "loner"])
async def test_stop_ends_the_whole_process_tree(spawner: Spawner, kind: str) -> None:
    """(5) Also a grandchild that ignores SIGTERM, and one that has left the session."""
    process = spawner.engine(f"{kind}:{spawner.path('grandchild')}", ready(spawner))
    await within(process.ensure_ready())
    pid = spawner.pid("grandchild")
    assert alive(pid)
    await within(process.stop())
    assert not alive(pid)


@pytest.mark.promise("F18", "P4")
async def test_concurrent_stops_are_idempotent(spawner: Spawner) -> None:
    process = spawner.engine(ready(spawner))
    await within(process.stop())
    assert state_of(process) is ProcessState.STOPPED
    await within(process.ensure_ready())
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(process.stop() for _ in range(20)))
    assert state_of(process) is ProcessState.STOPPED
    await within(process.stop())
    await within(process.ensure_ready())
    assert state_of(process) is ProcessState.READY


@pytest.mark.promise("P4")
async def test_stop_aborts_a_start(spawner: Spawner, spawned: list[int]) -> None:
    process = spawner.engine("idle:30", on_spawn=spawned.append)
    waiters = [asyncio.create_task(process.ensure_ready()) for _ in range(5)]
    await until(lambda: bool(spawned), "spawned")
    await within(process.stop())
    outcomes = await within(asyncio.gather(*waiters, return_exceptions=True))
    for outcome in outcomes:
        assert type(outcome) is UnavailableError
        assert "stopped while it was starting" in str(outcome)
    assert state_of(process) is ProcessState.STOPPED
    assert not alive(spawned[0])


@pytest.mark.promise("P4")
async def test_stop_at_any_moment_of_a_start_leaves_no_process(spawner: Spawner) -> None:
    process = spawner.engine(ready(spawner))
    waiter = asyncio.create_task(process.ensure_ready())
    await asyncio.sleep(0)
    await within(process.stop())
    with pytest.raises(UnavailableError):
        await waiter
    assert state_of(process) is ProcessState.STOPPED


@pytest.mark.promise("F24")
async def test_cancelled_stop_still_stops(spawner: Spawner, spawned: list[int]) -> None:
    process = spawner.engine(ready(spawner), on_spawn=spawned.append)
    await within(process.ensure_ready())
    stopping = asyncio.create_task(process.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    await within(process.ended.wait())
    assert not alive(spawned[0])


@pytest.mark.promise("F18", "P4")
@posix_only
async def test_start_during_a_stop_waits_and_starts_again(spawner: Spawner, spawned: list[int]) -> None:
    """(18) No caller gets "ready" for a process that is being stopped."""
    process = spawner.engine("ignore-term", "ignore-stdin", ready(spawner), stop_timeout=0.3, on_spawn=spawned.append)
    await within(process.ensure_ready())
    stopping = asyncio.create_task(process.stop())
    await until(lambda: process.state is ProcessState.STOPPING, "stopping")
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(process.ensure_ready(), process.ensure_ready())
    assert stopping.done()
    await stopping
    assert len(spawned) == 2
    assert not alive(spawned[0])
    assert alive(spawned[1])


@pytest.mark.promise("F18", "P4")
@pytest.mark.parametrize("settled", [True, False])
async def test_start_right_after_a_stop_is_a_new_start(spawner: Spawner, spawned: list[int], settled: bool) -> None:
    """(18) The stop takes effect when it is requested, before the actor handles it."""
    go = f"until:{spawner.path('go')}"
    process = spawner.engine(*([] if settled else [go]), ready(spawner), on_spawn=spawned.append)
    first = asyncio.create_task(process.ensure_ready())
    if settled:
        await first
    else:
        await until(lambda: bool(spawned), "spawned")
    stopping = asyncio.create_task(process.stop())
    second = asyncio.create_task(process.ensure_ready())
    async with asyncio.timeout(LIMIT):
        await stopping
        (spawner.folder / "go").touch()
        await second
        if not settled:
            with pytest.raises(UnavailableError):
                await first
    assert len(spawned) == 2
    assert process.pid == spawned[1]
    assert state_of(process) is ProcessState.READY


async def test_waiter_during_close_does_not_start_the_process(spawner: Spawner, spawned: list[int]) -> None:
    """No owner would end that process."""
    process = spawner.engine(ready(spawner), on_spawn=spawned.append)
    await within(process.ensure_ready())
    closing = asyncio.create_task(process.close())
    await asyncio.sleep(0)  # the stop is requested
    with pytest.raises(UnavailableError, match="was stopped"):
        await within(process.ensure_ready())
    await within(closing)
    with pytest.raises(UnavailableError, match="was stopped"):
        await within(process.ensure_ready())
    assert len(spawned) == 1
    assert process.ended.is_set()


@pytest.mark.promise("F24")
async def test_cancelled_actor_leaves_no_process(spawner: Spawner, spawned: list[int]) -> None:
    """The end of the event loop cancels every task."""
    process = spawner.engine("ignore-term", "ignore-stdin", ready(spawner), on_spawn=spawned.append, stop_timeout=0.2)
    await within(process.ensure_ready())
    for task in asyncio.all_tasks():
        if task.get_name() == "engine process child":
            task.cancel()
    await within(process.ended.wait())
    assert not alive(spawned[0])


# Any order


@pytest.mark.promise("F18", "P4")
@pytest.mark.parametrize("seed", range(6))
async def test_any_order_of_calls_ends_without_leftover_processes(spawner: Spawner, seed: int) -> None:
    """(16, 17, 18) Starts, stops, crashes and cancellations in any order."""
    draw = random.Random(seed)  # noqa: S311  # repeatable is what it must be
    lives: list[int] = []
    process = spawner.engine(
        "ignore-term",
        ready(spawner),
        on_spawn=lives.append,
        stop_timeout=draw.choice([0.0, 0.02, 5.0]),
        restart_limit=seed % 3,
        restart_backoff=0.02,
    )
    tasks: list[asyncio.Task[None]] = []
    async with asyncio.timeout(LIMIT):
        for _ in range(25):
            action = draw.choice(["start", "start", "stop", "crash", "cancel", "pause", "await"])
            if action in ("start", "stop"):
                tasks.append(asyncio.create_task(process.ensure_ready() if action == "start" else process.stop()))
            elif action == "crash" and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)
            elif action == "cancel" and tasks:
                draw.choice(tasks).cancel()
            elif action == "await" and tasks:
                await asyncio.wait({draw.choice(tasks)})
            await asyncio.sleep(draw.choice([0, 0, 0.01, 0.05]))
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        await within(process.stop())
    for outcome in outcomes:
        assert outcome is None or isinstance(outcome, (UnavailableError, asyncio.CancelledError)), outcome
    assert state_of(process) in (ProcessState.STOPPED, ProcessState.FAILED)
    assert process.ended.is_set()
    assert not any(alive(pid) for pid in lives)
    await within(process.ensure_ready())
    assert state_of(process) is ProcessState.READY


@pytest.mark.promise("P12")
async def test_thirty_process_runs_leave_no_descriptor(spawner: Spawner) -> None:
    stopped = spawner.engine(ready(spawner))
    failing = spawner.engine("exit:1")
    missing = spawner.engine(argv=[spawner.path("no-such-program")])

    async def live(process: EngineProcess) -> None:
        with contextlib.suppress(EngineStartError):
            await within(process.ensure_ready())
        await within(process.stop())

    await live(stopped)
    before = descriptors()
    for _ in range(10):
        for process in (stopped, failing, missing):
            await live(process)
    await until(lambda: descriptors() <= before, "descriptors leak")


async def test_every_state_transition_is_logged(spawner: Spawner, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "engine_plugin.process.engine_process")
    process = spawner.engine(ready(spawner))
    await within(process.ensure_ready())
    await within(process.stop())
    moves = [record.getMessage() for record in caplog.records if "->" in record.getMessage()]
    assert moves == [
        "child: stopped -> starting",
        "child: starting -> ready",
        "child: ready -> stopping",
        "child: stopping -> stopped",
    ]


@pytest.mark.promise("F18")
def test_state_transitions_are_those_of_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    table = page[page.index("| from | to | when |") :].partition("\n\n")[0]
    named: dict[str, set[str]] = {}
    for row in table.splitlines()[2:]:
        sources, targets, _ = (cell.strip().split(", ") for cell in row.strip("| ").split(" | ", 2))
        for source in sources:
            named.setdefault(source, set()).update(targets)
    assert named == {state.value: {target.value for target in targets} for state, targets in MOVES.items()}


@pytest.mark.promise("F18")
def test_undocumented_state_transition_raises(spawner: Spawner) -> None:
    with pytest.raises(RuntimeError, match="no way leads from stopped to ready"):
        spawner.engine()._enter(ProcessState.READY)
