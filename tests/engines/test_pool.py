"""Start and removal of a model's server by concurrent calls. (llamacpp/test_pool.py has real engines.)"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from engine_plugin.engines.local.admission import Admission
from engine_plugin.engines.local.pool import ModelPool
from engine_plugin.errors import EngineStartError
from engine_plugin.models.info import ModelDescription, StoredModel
from tests.patience import LIMIT, until


def model(name: str) -> StoredModel:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    return StoredModel(name, "chat", 1, "", when, False, ModelDescription(), path=Path(name))


class Scripted:
    """A server whose starts end as a test decides."""

    crashed = False

    def __init__(self, of: StoredModel) -> None:
        self.model = of
        self.admission = Admission(1, 1)
        self.dead = True
        self.stopped = self.cleaned_up = 0
        self.starts: list[asyncio.Future[None]] = []

    @property
    def ready(self) -> bool:
        return not self.dead

    async def ensure_ready(self) -> None:
        """Each caller's own start, so that one may fail while another is under way."""
        start = asyncio.get_running_loop().create_future()
        self.starts.append(start)
        await start
        self.dead = False

    async def close(self) -> None:
        self.admission.close()
        self.stopped += 1
        self.dead = True

    def clean_up(self) -> None:
        self.cleaned_up += 1


@pytest.fixture
def made() -> list[Scripted]:
    return []


@pytest.fixture
def pool(made: list[Scripted]) -> ModelPool[Scripted]:
    def make(of: StoredModel) -> Scripted:
        made.append(Scripted(of))
        return made[-1]

    return ModelPool(1, 0.0, make)


async def test_failed_start_keeps_a_server_that_another_call_starts(
    pool: ModelPool[Scripted], made: list[Scripted]
) -> None:
    async with asyncio.timeout(LIMIT):
        first, second = (asyncio.create_task(pool.load(model("a"))) for _ in range(2))
        await until(lambda: bool(made) and len(made[0].starts) == 2, "both start it")
        [server] = made
        server.starts[0].set_exception(EngineStartError("no luck"))
        with pytest.raises(EngineStartError):
            await first
        assert pool.all_servers() == [server], "who starts it now must find it in the pool, which ends it"
        server.starts[1].set_result(None)
        await second
        await pool.close()
        assert (server.dead, server.cleaned_up) == (True, 1)


async def test_last_failed_start_removes_the_server(pool: ModelPool[Scripted], made: list[Scripted]) -> None:
    async with asyncio.timeout(LIMIT):
        both = [asyncio.create_task(pool.load(model("a"))) for _ in range(2)]
        await until(lambda: bool(made) and len(made[0].starts) == 2, "both start it")
        for start in made[0].starts:
            start.set_exception(EngineStartError("no luck"))
        assert [type(told) for told in await asyncio.gather(*both, return_exceptions=True)] == [EngineStartError] * 2
        assert pool.all_servers() == []
        assert made[0].cleaned_up == 1


async def test_evicted_server_that_is_starting_is_stopped_and_removed(
    pool: ModelPool[Scripted], made: list[Scripted]
) -> None:
    async with asyncio.timeout(LIMIT):
        starting = asyncio.create_task(pool.load(model("a")))
        await until(lambda: bool(made) and bool(made[0].starts), "it is being started")
        other = asyncio.create_task(pool.load(model("b")))
        await until(lambda: len(made) == 2 and bool(made[1].starts), "the other one is being started")
        assert (made[0].stopped, made[0].cleaned_up) == (1, 1)
        made[0].starts[0].set_exception(EngineStartError("stopped"))
        with pytest.raises(EngineStartError):
            await starting
        made[1].starts[0].set_result(None)
        await other
        assert pool.servers() == [made[1]]
        await pool.close()
