"""Restarts and health states of an engine process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import pytest

from engine_plugin.errors import EngineStartError, UnavailableError
from engine_plugin.process.engine_process import EngineProcess, ProcessState
from engine_plugin.process.health import HealthRecord
from engine_plugin.process.restarts import Restarts
from tests.patience import LIMIT, NEVER, pace, until, within
from tests.process.conftest import Spawner, alive

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

SWIFT = {"restart_limit": 3, "restart_backoff": 0.02, "stable_time": NEVER}


class Watched:
    """A process that is ready at once; the test sets its health answers, and its transitions are recorded."""

    def __init__(self, spawner: Spawner, *actions: str, **changes: Any) -> None:
        self.answers = True
        self.asked = 0
        self.pids: list[int] = []
        given: dict[str, Any] = {**SWIFT, "healthy": self._healthy, "on_spawn": self.pids.append}
        actions = actions or (f"ready:{spawner.path('ready')}",)
        self.process: EngineProcess = spawner.engine(*actions, **(given | changes))

    async def _healthy(self) -> bool:
        self.asked += 1
        return self.answers

    @property
    def state(self) -> ProcessState:
        return self.process.state

    async def reach(self, state: ProcessState) -> None:
        await until(lambda: self.process.state is state, state.value)

    async def lives(self, count: int) -> None:
        """Wait until `count` processes have been spawned and the last one is ready."""
        await until(lambda: len(self.pids) == count and self.process.state is ProcessState.READY, f"{count} lives")

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)


# Restarts


@pytest.mark.promise("F20", "P2")
async def test_dead_process_is_restarted_without_a_call(spawner: Spawner, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(spawner)
    await within(watched.process.ensure_ready())
    watched.kill()
    await watched.lives(2)
    assert not alive(watched.pids[0])
    assert watched.process.pid == watched.pids[1]
    assert watched.process.failure == ""
    assert "child died:" in caplog.text
    assert "restarting in 0.02 s (1 of 3)" in caplog.text
    await within(watched.process.stop())
    assert watched.state is ProcessState.STOPPED


@pytest.mark.promise("F20", "P2")
async def test_call_during_a_restart_waits_for_it(spawner: Spawner) -> None:
    watched = Watched(spawner, restart_limit=1, restart_backoff=0.3, stable_time=NEVER)
    await within(watched.process.ensure_ready())
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    assert "child died:" in watched.process.failure
    assert watched.process.pid is None or not alive(watched.process.pid)
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(watched.process.ensure_ready() for _ in range(20)))
    assert len(watched.pids) == 2


@pytest.mark.promise("P2")
async def test_process_that_dies_repeatedly_is_left_dead_at_the_restart_limit(spawner: Spawner) -> None:
    """Its failure names the cause; the next call starts it once more."""
    dying = spawner.folder / "dying"
    watched = Watched(spawner, f"ready:{spawner.path('ready')}", f"until:{dying}", "err:bad weights", "exit:9")
    await within(watched.process.ensure_ready())
    dying.touch()
    await within(watched.process.ended.wait())
    assert watched.state is ProcessState.FAILED
    assert len(watched.pids) == 1 + SWIFT["restart_limit"]
    assert "exit code 9" in watched.process.failure
    assert "bad weights" in watched.process.failure
    assert "died 4 times in a row and is not restarted by itself again" in watched.process.failure
    dying.unlink()
    await within(watched.process.ensure_ready())
    dying.touch()
    await within(watched.process.ended.wait())
    assert len(watched.pids) == 2 + SWIFT["restart_limit"]


@pytest.mark.promise("P2")
async def test_waiters_of_failing_restarts_get_the_last_error(spawner: Spawner) -> None:
    """Failed restarts count as deaths; callers that wait get an error when the limit is reached."""
    first = spawner.folder / "first"
    script = (
        "import os, sys, time\n"
        "if os.path.exists(sys.argv[1]): os.write(2, b'no memory\\n'); os._exit(3)\n"
        "open(sys.argv[1], 'w').close(); open(sys.argv[2], 'w').close(); os.read(0, 1)\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", script, str(first), spawner.path("ready")]
    watched = Watched(spawner, argv=argv, restart_limit=2, restart_backoff=0.2, stable_time=NEVER)
    await within(watched.process.ensure_ready())
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    with pytest.raises(EngineStartError, match=r"ended during its start: exit code 3.*no memory.*died 3 times"):
        await within(watched.process.ensure_ready())
    assert len(watched.pids) == 3


@pytest.mark.promise("P2")
async def test_failed_first_start_is_not_repeated(spawner: Spawner) -> None:
    watched = Watched(spawner, "exit:2")
    with pytest.raises(EngineStartError, match="exit code 2"):
        await within(watched.process.ensure_ready())
    assert watched.state is ProcessState.FAILED
    assert len(watched.pids) == 1


@pytest.mark.promise("P2")
async def test_death_after_the_stable_time_counts_as_the_first(spawner: Spawner) -> None:
    """With a stable time of zero, every death counts as the first."""
    watched = Watched(spawner, restart_limit=1, restart_backoff=0.0, stable_time=0.0)
    await within(watched.process.ensure_ready())
    for lives in range(2, 6):
        watched.kill()
        await watched.lives(lives)
    assert watched.process.restarts == 1


@pytest.mark.promise("F18", "P2", "P4")
async def test_stop_during_the_back_off_ends_it(spawner: Spawner) -> None:
    watched = Watched(spawner, restart_limit=1, restart_backoff=NEVER, stable_time=NEVER)
    await within(watched.process.ensure_ready())
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    waiter = asyncio.create_task(watched.process.ensure_ready())
    await asyncio.sleep(0)
    await within(watched.process.stop())
    with pytest.raises(UnavailableError, match="was stopped"):
        await within(waiter)
    assert watched.state is ProcessState.STOPPED
    assert watched.process.failure == ""
    assert watched.process.restarts == 0
    assert len(watched.pids) == 1


@pytest.mark.promise("F11")
@posix_only
async def test_descendant_in_its_own_session_ends_before_the_restart(spawner: Spawner) -> None:
    """The engine dies by itself, so that its descendants are found by its token only."""
    watched: Watched

    def stragglers() -> list[Any]:
        dead = {pid for pid in watched.pids if pid != watched.process.pid or not alive(pid)}
        return [process for process in spawner.left() if process.pid not in dead]

    watched = Watched(
        spawner, f"loner:{spawner.path('loner')}", f"ready:{spawner.path('ready')}", stragglers=stragglers
    )
    await within(watched.process.ensure_ready())
    loner = spawner.pid("loner")
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    assert not alive(loner)
    await watched.lives(2)


@pytest.mark.promise("F18")
@pytest.mark.parametrize("limit", [0, 2])
async def test_any_order_of_deaths_and_stops_ends(spawner: Spawner, limit: int) -> None:
    watched = Watched(spawner, restart_limit=limit, restart_backoff=0.01, stable_time=NEVER)
    for _ in range(4):
        await within(watched.process.ensure_ready())
        watched.kill()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(watched.process.ensure_ready(), watched.process.stop(), return_exceptions=True)
        await within(watched.process.stop())
        assert watched.state in (ProcessState.STOPPED, ProcessState.FAILED)
    assert not any(alive(pid) for pid in watched.pids)


def test_back_off_doubles_up_to_a_limit() -> None:
    restarts = Restarts(limit=7, backoff=1.0, longest=10.0, stable=5.0)
    assert [restarts.after_death(served=1.0) for _ in range(8)] == [1, 2, 4, 8, 10, 10, 10, None]
    assert restarts.after_death(served=5.0) == 1.0
    assert restarts.after_death(served=4.9) == 2.0
    restarts.forget()
    assert restarts.deaths == 0
    endless = Restarts(limit=5000, backoff=1e-9, longest=30.0, stable=1.0)
    assert [endless.after_death(0.0) for _ in range(3000)][-1] == 30.0


# Health


BRISK = {"health_interval": 0.02, "health_failures": 3, "hung_timeout": 0.0}


@pytest.mark.promise("F21")
async def test_process_that_misses_health_checks_is_degraded_and_recovers(spawner: Spawner) -> None:
    watched = Watched(spawner, **BRISK)
    await within(watched.process.ensure_ready())
    watched.answers = False
    await watched.reach(ProcessState.DEGRADED)
    await within(watched.process.ensure_ready())
    watched.answers = True
    await watched.reach(ProcessState.READY)
    assert len(watched.pids) == 1


@pytest.mark.promise("F21")
async def test_requested_health_check_counts_as_a_periodic_one(spawner: Spawner) -> None:
    """A host's HealthCheck sends a request at once; a single missed answer does not degrade the process."""
    watched = Watched(spawner, health_interval=3600, health_failures=3)
    await within(watched.process.ensure_ready())
    watched.answers = False
    states = []
    for answers in (False, False, False, True, True):
        watched.answers = answers
        await within(watched.process.check())
        states.append(watched.state)
    ready, degraded = ProcessState.READY, ProcessState.DEGRADED
    assert states == [ready, ready, degraded, degraded, ready]
    assert watched.asked == 5
    await within(watched.process.stop())
    await within(watched.process.check())
    assert watched.asked == 5, "a stopped process is not checked"


async def test_concurrent_health_checks_share_one_request(spawner: Spawner) -> None:
    asked = asyncio.Event()
    go = asyncio.Event()
    count = 0

    async def healthy() -> bool:
        nonlocal count
        count += 1
        asked.set()
        await go.wait()
        return True

    process = spawner.engine(
        f"ready:{spawner.path('ready')}", healthy=healthy, health_interval=3600, health_failures=1
    )
    await within(process.ensure_ready())
    questions = [asyncio.create_task(process.check()) for _ in range(10)]
    await within(asked.wait())
    go.set()
    await within(asyncio.gather(*questions))
    assert count == 1


@pytest.mark.promise("F20", "F21")
@posix_only
async def test_health_answer_after_the_death_is_ignored(spawner: Spawner) -> None:
    """The check runs between the exit and the end of the output (a grandchild holds the pipes)."""
    asked, dying = asyncio.Event(), asyncio.Event()

    async def healthy() -> bool:
        asked.set()
        await dying.wait()
        return False

    go = spawner.path("go")
    actions = (f"grandchild:{spawner.path('grandchild')}", f"ready:{spawner.path('ready')}", f"until:{go}", "exit:2")
    policy = {"health_interval": 3600, "health_failures": 1}
    process = spawner.engine(*actions, healthy=healthy, **policy, restart_limit=0)
    await within(process.ensure_ready())
    asking = asyncio.create_task(process.check())
    await within(asked.wait())
    (spawner.folder / "go").touch()
    await until(lambda: process.state is ProcessState.STOPPING, "the exit is known")
    dying.set()
    await within(asking)
    assert process.state is ProcessState.STOPPING
    await within(process.ended.wait())
    assert "exit code 2" in process.failure


@pytest.mark.promise("F20", "F21", "P3")
@posix_only
async def test_hung_process_is_killed_and_restarted(spawner: Spawner) -> None:
    """It neither answers nor writes nor uses the processor, and it ignores SIGTERM."""
    ready = f"ready:{spawner.path('ready')}"
    policy = {"health_interval": 0.05, "health_failures": 2, "hung_timeout": 0.4}
    watched = Watched(spawner, "ignore-term", "ignore-stdin", ready, **policy, stop_timeout=0.1)
    await within(watched.process.ensure_ready())
    watched.answers = False
    os.kill(watched.pids[0], signal.SIGSTOP)
    await until(lambda: "child hangs: no answer, output or use" in watched.process.failure, "hung")
    watched.answers = True
    await watched.lives(2)
    assert not alive(watched.pids[0])


@pytest.mark.promise("F21")
@pytest.mark.parametrize("sign", ["burn", "slow:60"])
async def test_busy_process_is_not_taken_for_hung(spawner: Spawner, sign: str) -> None:
    """It misses every check for three times hung_timeout, but computes or writes output."""
    policy = {"health_interval": 0.05, "health_failures": 2, "hung_timeout": pace(0.4)}
    sign = f"{sign}:{pace(1.2 if sign == 'burn' else 0.02)}"
    watched = Watched(spawner, f"ready:{spawner.path('ready')}", sign, f"ready:{spawner.path('done')}", **policy)
    await within(watched.process.ensure_ready())
    watched.answers = False
    await until((spawner.folder / "done").exists, "done")
    assert watched.state is ProcessState.DEGRADED
    assert len(watched.pids) == 1


@pytest.mark.promise("F21")
async def test_single_missed_health_check_is_not_a_hang(spawner: Spawner) -> None:
    """Only a second check shows whether the process computed in between."""

    async def healthy() -> bool:
        await asyncio.sleep(pace(0.2))
        return False

    policy = {"health_interval": 0.05, "health_failures": 1, "hung_timeout": pace(0.1)}
    actions = (f"ready:{spawner.path('ready')}", f"burn:{pace(0.6)}", f"ready:{spawner.path('done')}")
    watched = Watched(spawner, *actions, healthy=healthy, **policy)
    await within(watched.process.ensure_ready())
    await until((spawner.folder / "done").exists, "done")
    assert len(watched.pids) == 1


@pytest.mark.promise("F21")
def test_degraded_state_has_hysteresis_in_both_directions() -> None:
    record = HealthRecord(failures=3, hung_after=10, sign_of_life=0.0)

    def after(answers: str) -> list[bool]:
        states = []
        for answer in answers:
            record.note(answered=answer == "+", now=1.0)
            states.append(record.degraded)
        return states

    assert after("--+--+--") == [False] * 8
    assert after("-") == [True]
    assert after("+-+-") == [True] * 4
    assert after("++") == [True, False]
    assert not record.hung(now=10.9)
    assert record.hung(now=11.0)
    record.sign_of_life = 5.0
    assert not record.hung(now=14.9)


# Progress


@pytest.mark.promise("F14")
@posix_only
async def test_logged_probes_do_not_count_as_progress(spawner: Spawner) -> None:
    """The start of a server that logs each probe and is never ready ends as that of a silent one."""
    listening = spawner.folder / "listening"
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os.write(2, b'GET /health 503 %f\\n' % time.time()))\n"
        "open(sys.argv[1], 'w').close()\n"
        "while os.read(0, 1): pass\n"
    )
    probes: list[int] = []

    async def ready() -> bool:
        if listening.exists() and process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
            probes.append(process.pid)
        return False

    argv = [sys.executable, "-I", "-S", "-c", script, str(listening)]
    process = spawner.engine(argv=argv, ready=ready, start_timeout=pace(0.8))
    with pytest.raises(EngineStartError, match=r"no sign of progress for [\d.]+ s.*GET /health 503"):
        await within(process.ensure_ready())
    assert len(probes) > 3
