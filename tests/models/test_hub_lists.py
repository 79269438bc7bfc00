"""The list of files that a hub gives: refusals, failures, bounds and invalid entries."""

from __future__ import annotations

import asyncio
import gzip
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.download.events import StepStarted
from engine_plugin.errors import (
    AuthError,
    EnginePluginError,
    ModelNotFoundError,
    PullError,
)
from engine_plugin.models.hubs import checked_files, hubs_of
from engine_plugin.models.store import PullRequest
from tests.models.fakes import pull
from tests.models.folderworld import DONE, POLICY, SOURCES, FolderWorld
from tests.models.hub import REPOSITORY, hub_server
from tests.models.server import Script
from tests.patience import LIMIT

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("script", "error", "text"),
    [
        (Script(status=401, body=b"{}"), EnginePluginError, "token|refused"),
        (Script(status=403, body=b"{}"), AuthError, "refused access"),
        (Script(status=404, body=b"{}"), ModelNotFoundError, "no such"),
        (Script(status=418, body=b"{}"), PullError, "HTTP 418"),
        (Script(status=200, body=b"no json", headers={"Content-Type": "application/json"}), PullError, "no"),
        (Script(status=200, body=b"{}", headers={"Content-Type": "application/json"}), PullError, "list of files"),
        (Script(status=200, body=b"[]", headers={"Content-Type": "application/json"}), PullError, "list of files"),
        (Script(status=429, headers={"Retry-After": "7000"}), PullError, "busy for 7000 seconds"),
    ],
)
async def test_refusals_of_a_hub(
    world: FolderWorld, source: str, script: Script, error: type[EnginePluginError], text: str
) -> None:
    world.hub.troubles["list"].append(replace(script))
    with pytest.raises(error, match=text) as caught:
        await pull(world.store, PullRequest(source))
    assert source in caught.value.message or "/api/" in caught.value.message
    assert world.leftovers() == set()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("script", [Script(status=503), Script(status=429), Script(drop_after=0, status=200)])
async def test_failed_request_to_a_hub_is_repeated(world: FolderWorld, source: str, script: Script) -> None:
    world.hub.troubles["list"].extend([replace(script), replace(script)])
    events = await pull(world.store, PullRequest(source))
    assert events[-1] == DONE
    assert sum(isinstance(event, StepStarted) and "trying again" in event.text for event in events) == 2
    world.hub.troubles["list"].extend(replace(script) for _ in range(3))
    with pytest.raises(PullError, match="3 attempts"):
        await pull(world.another(), PullRequest(source))


@pytest.mark.parametrize("source", SOURCES)
async def test_hub_that_refuses_connections(world: FolderWorld, source: str) -> None:
    async with hub_server() as gone:
        world.environ = {"HF_ENDPOINT": gone.url(""), "MODELSCOPE_ENDPOINT": gone.url("")}
    with pytest.raises(PullError, match="cannot connect"):
        await pull(world.another(), PullRequest(source))


async def test_silent_hub_times_out(world: FolderWorld) -> None:
    world.hub.troubles["list"].extend(Script(status=200, body=b"{}", stall_after=1) for _ in range(2))
    store = world.another(replace(POLICY, stall_s=0.1, attempts=2))
    with pytest.raises(PullError, match="2 attempts"):
        await pull(store, PullRequest(SOURCES[0]))


async def test_cancel_does_not_wait_for_a_silent_hub(world: FolderWorld) -> None:
    world.hub.troubles["list"].append(Script(status=200, body=b"{}", stall_after=1))
    store = world.another(replace(POLICY, stall_s=3600))
    async with asyncio.timeout(LIMIT):
        async with aclosing(store.pull(PullRequest(SOURCES[0]))) as events:
            await anext(events)
            await world.hub.asked.wait()
        await world.hub.close_connections()
    assert world.leftovers() == set()


@pytest.mark.promise("X11")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("script", "text"),
    [
        (
            lambda: Script(status=200, body=gzip.compress(bytes(64 << 20)), headers={"Content-Encoding": "gzip"}),
            "compressed",
        ),
        (lambda: Script(status=200, body=b" " * (17 << 20), chunked=True), "larger than 16 MiB"),
        (
            lambda: Script(status=200, body=b'{"siblings": ' + b"[" * 5000 + b"]" * 5000 + b"}"),
            "nested more than 100 deep",
        ),
        (lambda: Script(status=302, body=b"", headers={"Location": "http://127.0.0.1:99999/"}), "invalid URL"),
        (lambda: Script(status=302, body=b"", headers={"Location": "http://[::1/"}), "invalid URL"),
    ],
    ids=["bomb", "endless", "depth", "port", "brackets"],
)
async def test_a_hubs_list_is_bounded(
    world: FolderWorld, source: str, script: Callable[[], Script], text: str
) -> None:
    world.hub.troubles["list"].append(script())
    with pytest.raises(PullError, match=text):
        await pull(world.store, PullRequest(source))
    assert world.leftovers() == set()


@pytest.mark.promise("X11")
@pytest.mark.parametrize("source", SOURCES)
async def test_a_dripping_list_ends_with_its_time_or_with_its_caller(world: FolderWorld, source: str) -> None:
    async def drip(writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)

    slow = Script(status=200, body=b" ", length=1 << 20, stall_after=0)
    dripping: list[asyncio.Task[None]] = []

    ordinary, asked = world.hub.send, asyncio.Semaphore(0)

    async def send(writer: asyncio.StreamWriter, script: Script) -> None:
        if script is slow:
            dripping.append(asyncio.create_task(drip(writer)))
            asked.release()
        await ordinary(writer, script)

    world.hub.send = send  # type: ignore[method-assign]
    try:
        world.hub.troubles["list"].extend([slow, slow])
        hurried = replace(POLICY, connect_s=0.1, stall_s=0.1, attempts=1)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(PullError, match="no answer within"):
                await pull(world.another(hurried), PullRequest(source))
            async with aclosing(world.store.pull(PullRequest(source))) as events:
                await anext(events)
                for _ in range(2):
                    await asked.acquire()
            assert (await pull(world.store, PullRequest(source)))[-1] == DONE
    finally:
        for task in dripping:
            task.cancel()
        await asyncio.gather(*dripping, return_exceptions=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["sha", "siblings", "rfilename", "size", "lfs", "sha256", "blobId", "Code", "Data", "Files"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.mark.promise("X15")
@given(listed=st.lists(JSON, max_size=3), answer=JSON)
async def test_any_list_of_a_hub_gives_files_or_an_error(listed: list[Any], answer: Any) -> None:
    for hub in hubs_of({}, POLICY).values():
        source = hub.source(REPOSITORY, "", "", "model", insecure=False)
        for shape in (
            answer,
            {"sha": "c", "siblings": listed},
            {"Code": 200, "Data": {"Files": listed}},
        ):
            with suppress(EnginePluginError):
                assert len(checked_files(hub.read_listing(shape, source).files, source.label)) <= len(listed)


def entry(path: object, size: object = 1, **more: Any) -> dict[str, Any]:
    return {"rfilename": path, "size": size, "blobId": "0" * 40, **more}


@pytest.mark.promise("P22")
@pytest.mark.parametrize(
    ("listed", "text"),
    [
        ([entry("../config.json")], "config.json is missing"),
        ([entry("config.json"), entry("../../evil.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("/etc/passwd")], "is not a safe file name"),
        ([entry("config.json"), entry("a\\..\\b.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("C:evil.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("unet//x.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("x\0.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("sub/NUL.bin")], "is not a safe file name"),
        ([entry("config.json"), entry("Config.json")], "ignore case"),
        ([entry("config.json"), entry("a/x"), entry("A/y")], "ignore case"),
        ([entry("config.json"), entry("a/x"), entry("a")], "ignore case"),
        ([entry("config.json"), entry("a"), entry("a/x")], "ignore case"),
        ([entry("config.json", None)], "no valid size"),
        ([entry("config.json", -1)], "no valid size"),
        ([entry("config.json", "big")], "no valid size"),
        ([entry("config.json", blobId="zz")], "no valid digest"),
        ([], "config.json is missing"),
    ],
)
async def test_invalid_list_writes_nothing(world: FolderWorld, listed: list[dict[str, Any]], text: str) -> None:
    world.hub.listed = listed
    with pytest.raises(PullError, match=text):
        await pull(world.store, PullRequest(SOURCES[0]))
    assert world.hub.fetched == []
    assert world.leftovers() == set()
    assert {path.name for path in world.root.parent.iterdir()} == {world.root.name}
