"""What follows the death, the silence and the return of an engine process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import pytest

from engine_plugin.errors import EngineStartError, UnavailableError
from engine_plugin.process.engine_process import EngineProcess, ProcessState
from engine_plugin.process.health import HealthPolicy, HealthRecord
from engine_plugin.process.restarts import RestartPolicy, Restarts
from tests.patience import LIMIT, NEVER, pace, until, within
from tests.process.conftest import Stage, alive

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

SWIFT = RestartPolicy(limit=3, backoff=0.02, longest=0.1, stable=NEVER)


class Watched:
    """A process whose child is ready at once, whose answers the test decides, and whose moves are noted."""

    def __init__(self, stage: Stage, *actions: str, **changes: Any) -> None:
        self.answers = True
        self.asked = 0
        self.pids: list[int] = []
        given: dict[str, Any] = {"restart": SWIFT, "healthy": self._healthy, "on_spawn": self.pids.append}
        actions = actions or (f"ready:{stage.path('ready')}",)
        self.process: EngineProcess = stage.engine(*actions, **(given | changes))

    async def _healthy(self) -> bool:
        self.asked += 1
        return self.answers

    @property
    def state(self) -> ProcessState:
        return self.process.state

    async def reach(self, state: ProcessState) -> None:
        await until(lambda: self.process.state is state, state.value)

    async def lives(self, count: int) -> None:
        """Wait until so many processes have been spawned and the last of them serves."""
        await until(lambda: len(self.pids) == count and self.process.state is ProcessState.READY, f"{count} lives")

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGTERM if sys.platform == "win32" else signal.SIGKILL)


# Restarts


@pytest.mark.promise("F20", "P2")
async def test_one_that_died_is_restarted_without_being_asked(stage: Stage, caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(stage)
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
async def test_who_asks_meanwhile_shares_the_restart(stage: Stage) -> None:
    watched = Watched(stage, restart=RestartPolicy(limit=1, backoff=0.3, stable=NEVER))
    await within(watched.process.ensure_ready())
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    assert "child died:" in watched.process.failure
    assert watched.process.pid is None or not alive(watched.process.pid)
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(watched.process.ensure_ready() for _ in range(20)))
    assert len(watched.pids) == 2


@pytest.mark.promise("P2")
async def test_the_limit_of_restarts(stage: Stage) -> None:
    """A process that dies again and again is left dead, and says why; whoever asks has one more try."""
    watched = Watched(stage, f"ready:{stage.path('ready')}", "idle:0.05", "err:bad weights", "exit:9")
    await within(watched.process.ensure_ready())
    await within(watched.process.ended.wait())
    assert watched.state is ProcessState.FAILED
    assert len(watched.pids) == 1 + SWIFT.limit
    assert "exit code 9" in watched.process.failure
    assert "bad weights" in watched.process.failure
    assert "died 4 times in a row and is not restarted by itself again" in watched.process.failure
    await within(watched.process.ensure_ready())
    await within(watched.process.ended.wait())
    assert len(watched.pids) == 2 + SWIFT.limit


@pytest.mark.promise("P2")
async def test_waiters_hear_of_the_last_failure(stage: Stage) -> None:
    """Restarts that fail count as deaths; whoever waits for them is told once it is final."""
    first = stage.folder / "first"
    script = (
        "import os, sys, time\n"
        "if os.path.exists(sys.argv[1]): os.write(2, b'no memory\\n'); os._exit(3)\n"
        "open(sys.argv[1], 'w').close(); open(sys.argv[2], 'w').close(); os.read(0, 1)\n"
    )
    argv = [sys.executable, "-I", "-S", "-c", script, str(first), stage.path("ready")]
    watched = Watched(stage, argv=argv, restart=RestartPolicy(limit=2, backoff=0.2, stable=NEVER))
    await within(watched.process.ensure_ready())
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    with pytest.raises(EngineStartError, match=r"ended during its start: exit code 3.*no memory.*died 3 times"):
        await within(watched.process.ensure_ready())
    assert len(watched.pids) == 3


@pytest.mark.promise("P2")
async def test_a_first_start_that_fails_is_not_repeated(stage: Stage) -> None:
    watched = Watched(stage, "exit:2")
    with pytest.raises(EngineStartError, match="exit code 2"):
        await within(watched.process.ensure_ready())
    assert watched.state is ProcessState.FAILED
    assert len(watched.pids) == 1


@pytest.mark.promise("P2")
async def test_a_stable_time_makes_good(stage: Stage) -> None:
    """With a stable time of nothing, each death is a first one, however many there are."""
    watched = Watched(stage, restart=RestartPolicy(limit=1, backoff=0.0, stable=0.0))
    await within(watched.process.ensure_ready())
    for lives in range(2, 6):
        watched.kill()
        await watched.lives(lives)
    assert watched.process.restarts == 1


@pytest.mark.promise("F18", "P2", "P4")
async def test_a_stop_during_the_back_off(stage: Stage) -> None:
    watched = Watched(stage, restart=RestartPolicy(limit=1, backoff=NEVER, stable=NEVER))
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
async def test_offspring_in_a_session_of_its_own_ends_before_the_restart(stage: Stage) -> None:
    """The engine dies by itself, so that nothing but its token leads to what it spawned."""
    watched: Watched

    def stragglers() -> list[Any]:
        dead = {pid for pid in watched.pids if pid != watched.process.pid or not alive(pid)}
        return [process for process in stage.left() if process.pid not in dead]

    watched = Watched(stage, f"loner:{stage.path('loner')}", f"ready:{stage.path('ready')}", stragglers=stragglers)
    await within(watched.process.ensure_ready())
    loner = stage.pid("loner")
    watched.kill()
    await watched.reach(ProcessState.RECOVERING)
    assert not alive(loner)
    await watched.lives(2)


@pytest.mark.promise("F18")
@pytest.mark.parametrize("limit", [0, 2])
async def test_every_order_of_deaths_and_stops_ends(stage: Stage, limit: int) -> None:
    watched = Watched(stage, restart=RestartPolicy(limit=limit, backoff=0.01, stable=NEVER))
    for _ in range(4):
        await within(watched.process.ensure_ready())
        watched.kill()
        async with asyncio.timeout(LIMIT):
            await asyncio.gather(watched.process.ensure_ready(), watched.process.stop(), return_exceptions=True)
        await within(watched.process.stop())
        assert watched.state in (ProcessState.STOPPED, ProcessState.FAILED)
    assert not any(alive(pid) for pid in watched.pids)


def test_the_back_off_doubles_up_to_a_limit() -> None:
    restarts = Restarts(RestartPolicy(limit=7, backoff=1.0, longest=10.0, stable=5.0))
    assert [restarts.after_death(served=1.0) for _ in range(8)] == [1, 2, 4, 8, 10, 10, 10, None]
    assert restarts.after_death(served=5.0) == 1.0
    assert restarts.after_death(served=4.9) == 2.0
    restarts.forget()
    assert restarts.deaths == 0
    endless = Restarts(RestartPolicy(limit=5000, backoff=1e-9, longest=30.0, stable=1.0))
    assert [endless.after_death(0.0) for _ in range(3000)][-1] == 30.0


# Health


BRISK = HealthPolicy(interval=0.02, failures=3, successes=2, hung_after=0.0)


@pytest.mark.promise("F21")
async def test_one_that_misses_answers_is_degraded_and_comes_back(stage: Stage) -> None:
    watched = Watched(stage, health=BRISK)
    await within(watched.process.ensure_ready())
    watched.answers = False
    await watched.reach(ProcessState.DEGRADED)
    await within(watched.process.ensure_ready())
    watched.answers = True
    await watched.reach(ProcessState.READY)
    assert len(watched.pids) == 1


@pytest.mark.promise("F21")
async def test_a_question_counts_as_an_answer_does(stage: Stage) -> None:
    """A host's HealthCheck asks now; one answer that is missing does not make a process sick."""
    watched = Watched(stage, health=HealthPolicy(interval=3600, failures=3, successes=2))
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
    assert watched.asked == 5, "nobody is there"


async def test_many_who_ask_at_once_ask_once(stage: Stage) -> None:
    asked = asyncio.Event()
    go = asyncio.Event()
    count = 0

    async def healthy() -> bool:
        nonlocal count
        count += 1
        asked.set()
        await go.wait()
        return True

    process = stage.engine(
        f"ready:{stage.path('ready')}", healthy=healthy, health=HealthPolicy(interval=3600, failures=1)
    )
    await within(process.ensure_ready())
    questions = [asyncio.create_task(process.check()) for _ in range(10)]
    await within(asked.wait())
    go.set()
    await within(asyncio.gather(*questions))
    assert count == 1


@pytest.mark.promise("F20", "F21")
@posix_only
async def test_an_answer_that_comes_after_the_death_changes_nothing(stage: Stage) -> None:
    """Somebody asks while the exit is known and the last words are still awaited (a grandchild holds the pipes)."""
    asked, dying = asyncio.Event(), asyncio.Event()

    async def healthy() -> bool:
        asked.set()
        await dying.wait()
        return False

    go = stage.path("go")
    actions = (f"grandchild:{stage.path('grandchild')}", f"ready:{stage.path('ready')}", f"until:{go}", "exit:2")
    policy = HealthPolicy(interval=3600, failures=1)
    process = stage.engine(*actions, healthy=healthy, health=policy, restart=RestartPolicy(limit=0))
    await within(process.ensure_ready())
    asking = asyncio.create_task(process.check())
    await within(asked.wait())
    (stage.folder / "go").touch()
    await until(lambda: process.state is ProcessState.STOPPING, "the exit is known")
    dying.set()
    await within(asking)
    assert process.state is ProcessState.STOPPING
    await within(process.ended.wait())
    assert "exit code 2" in process.failure


@pytest.mark.promise("F20", "F21", "P3")
@posix_only
async def test_a_process_that_stands_still_is_restarted(stage: Stage) -> None:
    """No answer, no output, no use of the processor: it hangs, and is killed although it ignores SIGTERM."""
    ready = f"ready:{stage.path('ready')}"
    policy = HealthPolicy(interval=0.05, failures=2, successes=2, hung_after=0.4)
    watched = Watched(stage, "ignore-term", "ignore-stdin", ready, health=policy, stop_timeout=0.1)
    await within(watched.process.ensure_ready())
    watched.answers = False
    os.kill(watched.pids[0], signal.SIGSTOP)
    await until(lambda: "child hangs: no answer, output or use" in watched.process.failure, "hung")
    watched.answers = True
    await watched.lives(2)
    assert not alive(watched.pids[0])


@pytest.mark.promise("F21")
@pytest.mark.parametrize("sign", ["burn", "slow:60"])
async def test_a_busy_process_is_not_taken_for_one_that_hangs(stage: Stage, sign: str) -> None:
    """It misses every answer for three times the patience, but it computes, or says something."""
    policy = HealthPolicy(interval=0.05, failures=2, successes=2, hung_after=pace(0.4))
    sign = f"{sign}:{pace(1.2 if sign == 'burn' else 0.02)}"
    watched = Watched(stage, f"ready:{stage.path('ready')}", sign, f"ready:{stage.path('done')}", health=policy)
    await within(watched.process.ensure_ready())
    watched.answers = False
    await until((stage.folder / "done").exists, "done")
    assert watched.state is ProcessState.DEGRADED
    assert len(watched.pids) == 1


@pytest.mark.promise("F21")
async def test_one_unanswered_question_is_no_hang_however_long_it_took(stage: Stage) -> None:
    """Only a second one shows whether the process computed in between."""

    async def healthy() -> bool:
        await asyncio.sleep(pace(0.2))
        return False

    policy = HealthPolicy(interval=0.05, failures=1, successes=2, hung_after=pace(0.1))
    actions = (f"ready:{stage.path('ready')}", f"burn:{pace(0.6)}", f"ready:{stage.path('done')}")
    watched = Watched(stage, *actions, healthy=healthy, health=policy)
    await within(watched.process.ensure_ready())
    await until((stage.folder / "done").exists, "done")
    assert len(watched.pids) == 1


@pytest.mark.promise("F21")
def test_hysteresis_both_ways() -> None:
    record = HealthRecord(HealthPolicy(failures=3, successes=2, hung_after=10), sign_of_life=0.0)

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
async def test_the_echo_of_our_own_probes_is_no_progress(stage: Stage) -> None:
    """A server that logs each probe and is never ready is given up as if it were silent."""
    listening = stage.folder / "listening"
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
    process = stage.engine(argv=argv, ready=ready, start_timeout=pace(0.8))
    with pytest.raises(EngineStartError, match=r"no sign of progress for [\d.]+ s.*GET /health 503"):
        await within(process.ensure_ready())
    assert len(probes) > 3
