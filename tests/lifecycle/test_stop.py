"""Stop of an engine: SIGTERM, SIGKILL if needed, with all descendants, after its running requests."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from build import build_linked
from engine_plugin.errors import BadGatewayError, EnginePluginError, UnavailableError
from engine_plugin.host import PluginClient, launch
from engine_plugin.manifest import load_manifest
from tests.engines.llamacpp.running import REPOSITORY, eventually
from tests.fake_engine import FakeEngine
from tests.fake_engine.program import TOKENS
from tests.patience import LIMIT

from .world import EMBED, HELLO, dead, words

if TYPE_CHECKING:
    from pathlib import Path

    from .world import Begin

# Ending


@pytest.mark.promise("F17")
async def test_stop_sends_sigterm_before_sigkill(begin: Begin) -> None:
    world = await begin(stop_timeout=60)
    await world.client.load_model("tiny-chat-gguf")
    await world.client.stop_engine()
    assert world.fake.events("exiting", code=0)
    assert world.leftovers() == []


@pytest.mark.promise("F17", "F5")
@pytest.mark.parametrize("session", ["same", "own"])
async def test_engine_that_ignores_sigterm_is_killed_with_its_descendants(begin: Begin, session: str) -> None:
    world = await begin({"ignore_term": True, "grandchild": session}, stop_timeout=0.3)
    await world.client.load_model("tiny-chat-gguf")
    began = time.monotonic()
    await asyncio.wait_for(world.client.unload_model("tiny-chat-gguf"), LIMIT)
    assert time.monotonic() - began > 0.3
    await world.fake.event("sigterm")
    assert dead((await world.fake.event("grandchild"))["child"])
    assert world.fake.events("exiting") == []
    assert world.leftovers() == []
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F17", "F5", "P5")
async def test_suspended_engine_is_killed_by_a_stop(begin: Begin) -> None:
    """A process under SIGSTOP does not handle SIGTERM."""
    world = await begin({"rules": [{"on": "chat", "do": "stop"}]}, stop_timeout=0.2)
    asking = asyncio.create_task(world.chat())
    await world.fake.event("stopping")
    await asyncio.wait_for(world.client.stop_engine(), LIMIT)
    with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
        await asking
    assert world.leftovers() == []


@pytest.mark.promise("F5", "F16")
async def test_descendants_of_a_dead_engine_are_killed(begin: Begin) -> None:
    """The descendant has left the session, and its parent has ended."""
    rules = [{"on": "chat", "do": "die", "signal": "SIGKILL"}]
    world = await begin({"grandchild": "own", "rules": rules}, {}, restart_limit=0)
    with pytest.raises(BadGatewayError):
        await world.chat()
    child = (await world.fake.event("grandchild"))["child"]
    await eventually(lambda: dead(child))
    assert world.processes() == []


@pytest.mark.promise("F17", "P4")
async def test_concurrent_stops_unloads_and_starts_are_all_answered(begin: Begin) -> None:
    """Each is answered, and the last one takes effect."""
    world = await begin({"ignore_term": True}, stop_timeout=0.2)
    await world.client.load_model("tiny-chat-gguf")
    async with asyncio.timeout(LIMIT):
        first = asyncio.create_task(world.client.stop_engine())
        await world.fake.event("sigterm")
        unload = world.client.unload_model("tiny-chat-gguf")
        outcomes = await asyncio.gather(world.client.stop_engine(), unload, return_exceptions=True)
        await first
    assert all(outcome is None or isinstance(outcome, EnginePluginError) for outcome in outcomes)
    assert world.leftovers() == []


# Draining


@pytest.mark.promise("F19")
async def test_eviction_waits_for_running_requests(begin: Begin, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "engine_plugin.engines.local.pool")
    world = await begin({}, max_loaded_models=1)
    gate = world.fake.gate("half")
    held = {"rules": [{"on": "chat", "do": "hold", "after": 3, "until": str(gate)}]}
    world.fake.behave(held)
    streaming = asyncio.create_task(world.stream())
    await world.fake.event("begun")
    swapping = asyncio.create_task(world.client.invoke("embed", EMBED))
    await eventually(lambda: "evicting tiny-chat-gguf" in caplog.text)
    returning = asyncio.create_task(world.chat())  # for the model that is on its way out
    assert world.life == 1
    assert not world.fake.events("sigterm")
    gate.touch()
    async with asyncio.timeout(LIMIT):
        assert (await streaming).endswith(b"data: [DONE]\n\n")
        assert (await swapping)["data"]
        assert await returning == words(TOKENS)
    told = [event["event"] for event in world.fake.events(model="tiny-chat-gguf", life=1)]
    assert told.index("begun") < told.index("sigterm")  # and the answer came whole
    assert len(world.processes()) == 1


@pytest.mark.promise("F19", "F18")
async def test_eviction_waits_at_most_drain_timeout(begin: Begin) -> None:
    world = await begin({"rules": [{"on": "chat", "do": "hang", "after": 2}]}, max_loaded_models=1, drain_timeout=0.3)
    streaming = asyncio.create_task(world.stream())
    await world.fake.event("begun")
    async with asyncio.timeout(LIMIT):
        assert (await world.client.invoke("embed", EMBED))["data"]
        with pytest.raises(UnavailableError, match="the engine was stopped while it worked on this request"):
            await streaming


@pytest.mark.promise("F19")
async def test_alternating_evictions_lose_no_request(begin: Begin) -> None:
    """Three models, room for one, and calls of all three at once."""
    world = await begin(max_loaded_models=1, parallel=8)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("chat", HELLO),
        ("embed", EMBED),
        ("rerank", {"query": "q", "documents": ["d"]}),
    ]
    async with asyncio.timeout(LIMIT):
        answers = await asyncio.gather(*(world.client.invoke(*calls[number % 3]) for number in range(24)))
    assert len(answers) == 24
    assert world.life < 12
    assert len(world.processes()) == 1


# Cleaning up


@pytest.mark.promise("F24")
@pytest.mark.parametrize("moment", ["loading", "waiting for the head", "streaming", "queued"])
async def test_plugin_that_exits_at_any_moment_leaves_nothing(begin: Begin, moment: str) -> None:
    """The fixture looks for processes, sockets, keys and records afterwards."""
    rule: dict[str, Any] = {"on": "chat", "do": "hang"}
    if moment == "streaming":
        rule["after"] = 2
    life: dict[str, Any] = {"load_until": "/nowhere"} if moment == "loading" else {"rules": [rule]}
    world = await begin(life, {}, parallel=1)
    asking = [asyncio.create_task(world.stream()) for _ in range(3 if moment == "queued" else 1)]
    if moment == "loading":
        await world.fake.event("listening")
    else:
        await world.fake.event("request", service="chat")
        await eventually(lambda: world.users() == len(asking))
    await asyncio.wait_for(world.engine.aclose(), LIMIT)
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert world.leftovers() == []


@pytest.mark.promise("F24", "F23")
async def test_abandoned_calls_release_their_slot(begin: Begin) -> None:
    """At every moment of a call; there is one slot, so a lost one would block the next call."""
    rules = [
        {"on": "chat", "from": 1, "count": 4, "do": "hang"},
        {"on": "chat", "from": 5, "count": 4, "do": "hang", "after": 1},
    ]
    world = await begin({"rules": rules}, parallel=1)
    for number in range(8):
        asking = asyncio.create_task(world.stream() if number % 2 else world.chat())
        await world.fake.event("request", service="chat", number=number + 1)
        queued = asyncio.create_task(world.chat())  # not before: either could take the slot
        await eventually(lambda: world.users() == 2)
        queued.cancel()
        await eventually(lambda: world.users() == 1)  # else the slot could be its own before its cancel arrives
        asking.cancel()
        await asyncio.gather(asking, queued, return_exceptions=True)
        await world.fake.event("client_gone", count=number + 1)
        await eventually(lambda: world.users() == 0)
    assert await world.chat() == words(TOKENS)
    assert len(world.fake.events("request", service="chat")) == 9  # who only waited was never sent


# With the plugin


async def launched(place: Path, fake: FakeEngine) -> PluginClient:
    """The plugin as a host spawns it, on the fake engine."""
    if not (place / "plugins").exists():
        manifest = place / "plugin.yaml"
        text = (REPOSITORY / "plugins/llamacpp/plugin.yaml").read_text()
        assert text.count("\nengine:\n") == 1
        lines = "".join(f"  {key}: {value}\n" for key, value in fake.options.items())
        kept = [line for line in text.splitlines() if not line.startswith("  backend:")]
        manifest.write_text("\n".join(kept).replace("\nengine:\n", f"\nengine:\n{lines}") + "\n")
        build_linked(manifest, place / "plugins")
        (place / "tmp").mkdir()
    [linked] = (place / "plugins").iterdir()
    executable = load_manifest(linked / "plugin.yaml").executable()
    env = {"AOG_DATA_DIR": str(place / "data"), "TMPDIR": str(place / "tmp")}
    return await launch([str(executable)], cwd=linked, env=env, start_timeout=LIMIT)


@pytest.mark.promise("F7", "F11")
@pytest.mark.parametrize("session", ["same", "own"])
async def test_descendants_that_survive_a_killed_plugin_are_ended_by_the_next(scratch: Path, session: str) -> None:
    """The engine ends at once, though it ignores SIGTERM; the next start finds its descendants."""
    fake = FakeEngine.install(scratch / "bin", {"ignore_term": True, "grandchild": session}, {})
    child = 0
    try:
        async with await launched(scratch, fake) as plugin:
            await plugin.start_engine()
            await plugin.load_model("tiny-chat-gguf")
            child = (await fake.event("grandchild"))["child"]
            assert plugin.pid is not None
            psutil.Process(plugin.pid).kill()
            engine = fake.events("started")[0]["pid"]
            await eventually(lambda: dead(engine), 3)
        async with await launched(scratch, fake) as plugin:
            await plugin.start_engine()
            await eventually(lambda: dead(child), 3)
            assert (await plugin.invoke("chat", HELLO))["choices"]
        assert dead(fake.events("started")[1]["pid"])
        assert list((scratch / "data" / "engines" / "llamacpp" / "run").glob("*.json")) == []
    finally:
        with suppress(ProcessLookupError):
            if child:
                os.kill(child, 9)
