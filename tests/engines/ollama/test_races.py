"""Races: stops, restarted servers, changed models, and callers that leave."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.engines.ollama import pulls
from engine_plugin.errors import BadGatewayError, EnginePluginError, ModelNotFoundError, UnavailableError
from engine_plugin.models.request import PullRequest
from engine_plugin.system.files import sha256_of
from tests.patience import pace, within

from .attached.engine import plugin_in
from .contract.release import write_program
from .hostile import DONE, Hostile, entry, lines, text_line, until_end, whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.plugin import Plugin

HELLO = json.dumps({"model": "m", "messages": [{"role": "user", "content": "a"}]}).encode()
OTHERS = json.dumps({"model": "new", "messages": [{"role": "user", "content": "a"}]}).encode()
STEP = {"status": "pulling x", "digest": "sha256:a", "total": 10, "completed": 5}


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    async with Hostile().serving() as server:
        yield server


@pytest.fixture
async def plugin(hostile: Hostile, tmp_path: Path) -> AsyncIterator[Plugin]:
    async with plugin_in(tmp_path, engine_host=hostile.url, probe_timeout=pace(0.5)) as found:
        yield found


async def streamed(plugin: Plugin, first: asyncio.Event | None = None) -> bytes:
    received = b""
    async with plugin.stream("chat", HELLO) as chunks:
        async for chunk in chunks:
            received += chunk
            if first is not None:
                first.set()
    return received


async def pulled(plugin: Plugin, name: str = "m", first: asyncio.Event | None = None) -> list[PullEvent]:
    seen = []
    async with plugin.pull_model(PullRequest(name)) as events:
        async for event in events:
            seen.append(event)
            if first is not None:
                first.set()
    return seen


# Probes


async def test_concurrent_first_calls_share_one_probe(hostile: Hostile, plugin: Plugin) -> None:
    answers = await within(asyncio.gather(*(plugin.invoke("chat", HELLO) for _ in range(200))), 20)
    assert len(answers) == 200
    assert hostile.count("/") == 1
    assert hostile.count("/api/version") == 1


async def test_silent_server_delays_calls_by_the_probe_timeout_only(hostile: Hostile, plugin: Plugin) -> None:
    hostile.hangs |= {"/", "/api/version", "/api/tags", "/api/ps"}
    shapes = await within(asyncio.gather(*(plugin.manifest_json() for _ in range(10))))
    assert all(json.loads(shape)["services"] for shape in shapes)
    with pytest.raises(UnavailableError, match=r"no answer in [\d.]+ s"):
        await within(plugin.health())
    with pytest.raises(UnavailableError):
        await within(plugin.invoke("chat", HELLO))
    assert not (await within(plugin.check())).installed
    hostile.hangs -= {"/", "/api/version"}
    assert json.loads(await within(plugin.manifest_json()))["services"], "GetManifest waits 2 s for the models"


async def test_slow_probe_aborts_no_running_call(hostile: Hostile, plugin: Plugin) -> None:
    """A busy server may be slow to answer a probe."""
    hostile.answers["/api/chat"], hostile.stays = until_end(lines(text_line("one"))), True
    first = asyncio.Event()
    streaming = asyncio.create_task(streamed(plugin, first))
    await within(first.wait())
    hostile.hangs |= {"/", "/api/version"}
    with pytest.raises(UnavailableError):
        await within(plugin.health())
    assert not streaming.done()
    hostile.hangs.clear()
    assert (await within(plugin.health())).state is HealthState.READY
    assert not streaming.done()
    await within(plugin.stop())
    with pytest.raises(UnavailableError, match="stopped"):
        await within(streaming)


# Stops


async def test_stop_ends_streams_and_the_servers_work(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answers["/api/chat"], hostile.stays = until_end(lines(text_line("one"))), True
    firsts = [asyncio.Event() for _ in range(32)]
    streams = [asyncio.create_task(streamed(plugin, first)) for first in firsts]
    await within(asyncio.gather(*(first.wait() for first in firsts)))
    await within(plugin.stop())
    ends = await within(asyncio.gather(*streams, return_exceptions=True))
    assert all(isinstance(end, UnavailableError) for end in ends)
    await within(hostile.gone.wait())
    with pytest.raises(UnavailableError, match="StartEngine"):
        await within(plugin.invoke("chat", HELLO))
    hostile.stays = False
    hostile.answers["/api/chat"] = until_end(lines(text_line("one"), DONE))
    await within(plugin.start("auto"))
    assert await within(plugin.invoke("chat", HELLO))


@pytest.mark.parametrize(
    ("path", "invoke"),
    [
        ("/", lambda plugin: plugin.invoke("chat", HELLO)),
        ("/", lambda plugin: plugin.start("auto")),
        ("/api/tags", lambda plugin: plugin.invoke("chat", HELLO)),
        ("/api/chat", lambda plugin: plugin.invoke("chat", HELLO)),
        ("/api/chat", lambda plugin: plugin.load_model("m")),
        ("/api/pull", pulled),
        ("/api/delete", lambda plugin: plugin.delete_model("m")),
        ("/api/tags", lambda plugin: plugin.list_models()),
        ("/api/ps", lambda plugin: plugin.running_models()),
    ],
)
async def test_stop_at_any_moment(hostile: Hostile, tmp_path: Path, path: str, invoke: Any) -> None:
    async with plugin_in(tmp_path, engine_host=hostile.url, probe_timeout=60.0) as plugin:
        hostile.hangs.add(path)
        asking = asyncio.create_task(invoke(plugin))
        await hostile.wait_for(path)
        await within(plugin.stop(), 2)
        with pytest.raises(UnavailableError):
            await within(asking)
        await within(hostile.gone.wait())


async def test_concurrent_starts_and_stops(hostile: Hostile, plugin: Plugin) -> None:
    async def one(number: int) -> None:
        if number % 5 == 0:
            await plugin.stop()
        elif number % 5 == 1:
            await plugin.start(("auto", "cpu", "gpu")[number % 3])
        else:
            await plugin.invoke("chat", HELLO)

    ends = await within(asyncio.gather(*(one(number) for number in range(100)), return_exceptions=True))
    assert all(end is None or isinstance(end, UnavailableError) for end in ends)
    await within(plugin.start("auto"))
    assert await within(plugin.invoke("chat", HELLO))
    await within(plugin.stop())
    with pytest.raises(UnavailableError, match="StartEngine"):
        await within(plugin.invoke("chat", HELLO))


# Restarted servers and changed models


async def test_restarted_server_is_used_again(hostile: Hostile, plugin: Plugin) -> None:
    for service in ("stream", "call", "pull", "load", "list"):
        hostile.stays, hostile.hangs = True, {"list": {"/api/tags"}, "load": {"/api/chat"}}.get(service, set())
        hostile.answers["/api/chat"] = until_end(lines(text_line("one")))
        hostile.answers["/api/pull"] = until_end(lines(STEP))
        invoke = {
            "stream": lambda: streamed(plugin),
            "call": lambda: plugin.invoke("chat", HELLO),
            "pull": lambda: pulled(plugin),
            "load": lambda: plugin.load_model("m"),
            "list": plugin.list_models,
        }[service]
        path = {"pull": "/api/pull", "list": "/api/tags"}.get(service, "/api/chat")
        seen = hostile.count(path)
        asking = asyncio.create_task(invoke())
        await hostile.wait_for(path, seen + 1)
        await hostile.die()
        with pytest.raises(EnginePluginError) as caught:
            await within(asking)
        assert caught.value.code != 500 or service == "pull"
        with pytest.raises(UnavailableError, match="no Ollama server answers"):
            await within(plugin.invoke("chat", HELLO))
        await hostile.listen()
        hostile.stays, hostile.hangs = False, set()
        hostile.answers["/api/chat"] = until_end(lines(text_line("one"), DONE))
        assert await within(plugin.invoke("chat", HELLO))


async def test_model_deleted_on_the_server_is_reported(hostile: Hostile, plugin: Plugin) -> None:
    assert await within(plugin.invoke("chat", HELLO))
    hostile.answers["/api/chat"] = whole({"error": "model 'm' not found"}, status="404 Not Found")
    hostile.answers["/api/tags"] = whole({"models": [entry("new:latest")]})
    with pytest.raises(ModelNotFoundError, match="PullModel m"):
        await within(plugin.invoke("chat", HELLO))
    hostile.answers["/api/chat"] = until_end(lines(text_line("one"), DONE))
    assert await within(plugin.invoke("chat", OTHERS)), "the list is fetched again"


async def test_replaced_model_has_its_new_capabilities(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answers["/api/tags"] = whole({"models": [entry(capabilities=None)]})
    await within(plugin.list_models())
    hostile.answers["/api/show"] = whole({"capabilities": ["embedding"], "model_info": {}})
    hostile.answers["/api/tags"] = whole({"models": [entry(capabilities=None, digest="cd" * 32)]})
    [model] = await within(plugin.list_models())
    assert model.kind == "embed"


# Pulls


async def test_pull_continues_for_the_other_watchers(hostile: Hostile, plugin: Plugin) -> None:
    hostile.answers["/api/pull"], hostile.stays = until_end(lines(STEP)), True
    firsts = [asyncio.Event() for _ in range(3)]
    pulls = [asyncio.create_task(pulled(plugin, first=first)) for first in firsts]
    await within(asyncio.gather(*(first.wait() for first in firsts)))
    assert hostile.count("/api/pull") == 1
    for pull in pulls[:2]:
        pull.cancel()
    await within(asyncio.wait(pulls[:2]))
    assert not hostile.gone.is_set()
    pulls[2].cancel()
    await within(asyncio.wait(pulls))
    await within(hostile.gone.wait())
    hostile.answers["/api/pull"], hostile.stays = until_end(lines(STEP, {"status": "success"})), False
    assert await within(pulled(plugin))


def is_open(path: Path) -> bool:
    return str(path) in {file.path for file in psutil.Process().open_files()}


@pytest.mark.parametrize("phase", ["reading", "asking", "sending", "creating"])
async def test_cancelled_upload_closes_the_file(
    hostile: Hostile, plugin: Plugin, tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This includes a file that is just being opened."""
    monkeypatch.setattr(pulls, "PIECE", 64 * 1024)
    path = tmp_path / "big.gguf"
    path.write_bytes(b"GGUF" + bytes(24 << 20))
    digest = await sha256_of(path)
    place = f"/api/blobs/{digest}"
    hostile.answers[place] = whole(b"", status="404 Not Found" if phase == "sending" else "200 OK")
    waiting_at = {"asking": place, "sending": place, "creating": "/api/create"}.get(phase, "")
    if phase in ("asking", "creating"):
        hostile.hangs.add(waiting_at)
    if phase == "sending":
        hostile.reads_no_body = True
    first = asyncio.Event()
    pulling = asyncio.create_task(pulled(plugin, str(path), first))
    if phase == "reading":
        await within(first.wait())
    else:
        await hostile.wait_for(waiting_at, 2 if phase == "sending" else 1)
    pulling.cancel()
    await within(asyncio.wait({pulling}))
    assert pulling.cancelled()
    assert not is_open(path)
    assert hostile.count("/api/create") == (phase == "creating")


async def test_endless_answer_to_an_upload_is_cut(
    hostile: Hostile, plugin: Plugin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    place = f"/api/blobs/{await sha256_of(path)}"
    hostile.answers[place] = [b"HTTP/1.1 500 No\r\ncontent-encoding: gzip\r\n\r\n"]
    hostile.answers["/api/blobs/head"] = b""
    hostile.endless, hostile.endless_at = b"no" * 10_000, place
    with pytest.raises(EnginePluginError):
        await within(pulled(plugin, str(path)))
    assert hostile.sent < 64 << 20
    assert not is_open(path)


# Managed and attached servers


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for ollama is a script with #!")
async def test_server_that_appears_during_a_managed_start(tmp_path: Path) -> None:
    """Each call is answered by one of the two; a stop ends the managed server only."""
    attached = Hostile()
    async with attached.serving():
        url = attached.url
        await attached.die()
        async with plugin_in(
            tmp_path, engine_host=url, probe_timeout=pace(0.5), ollama=str(write_program(tmp_path / "bin"))
        ) as plugin:
            starting = asyncio.create_task(plugin.start("auto"))
            await asyncio.sleep(0)
            await attached.listen()
            tiny = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
            while not starting.done():
                # Neither server is ready yet, or the default model of one is missing on the other.
                with suppress(UnavailableError, ModelNotFoundError):
                    assert await within(plugin.invoke("chat", tiny))
            await within(starting)
            assert await within(plugin.invoke("chat", tiny))
            assert (await within(plugin.health())).state is HealthState.READY
            children = psutil.Process().children(recursive=True)
            await within(plugin.stop())
            assert not [child for child in children if child.is_running() and str(tmp_path) in str(child.cmdline())]
            with pytest.raises(UnavailableError):
                await within(plugin.invoke("chat", tiny))


async def test_malformed_answer_breaks_no_parallel_call(hostile: Hostile, plugin: Plugin) -> None:
    """A malformed answer fails its own call only."""
    hostile.answers["/api/generate"] = until_end(b"no JSON\n")
    prompt = json.dumps({"model": "m", "prompt": "a"}).encode()
    invoke = [plugin.invoke(*pair) for pair in (("chat", HELLO), ("generate", prompt)) for _ in range(20)]
    ends = await within(asyncio.gather(*invoke, return_exceptions=True))
    assert all(isinstance(end, bytes) for end in ends[:20])
    assert all(isinstance(end, BadGatewayError) for end in ends[20:])
