"""Start of an engine: its port, its progress, its first answer, and the calls that wait for it."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import EngineStartError, UnavailableError
from engine_plugin.process import run as process_run
from engine_plugin.process.engine_process import ProcessState
from tests.engines.llamacpp.running import ENDLESS, eventually
from tests.fake_engine.program import TOKENS
from tests.models.server import Script, file_server
from tests.patience import LIMIT, pace

from .world import EMBED, Stranger, dead, port_of, words

if TYPE_CHECKING:
    from .world import Begin, World

# Ports


@pytest.mark.promise("F12")
async def test_port_taken_before_bind_is_replaced(begin: Begin) -> None:
    world = await begin({}, transport="tcp")
    gate = world.fake.gate("bind")
    world.fake.behave({"bind_until": str(gate)}, {})
    loading = asyncio.create_task(world.client.load_model("tiny-chat-gguf"))
    taken = port_of(await world.fake.event("started"))
    async with Stranger(404).at(taken):
        gate.touch()
        await asyncio.wait_for(loading, LIMIT)
    assert port_of(await world.fake.event("started", count=2)) != taken
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F13")
async def test_holder_of_repeatedly_taken_ports_is_named_in_the_error(begin: Begin) -> None:
    """Another process takes every port that the plugin chooses: the start ends with an error that names it."""
    world = await begin({}, transport="tcp")
    gates = [world.fake.gate(str(number)) for number in range(10)]
    world.fake.behave(*({"bind_until": str(gate)} for gate in gates))

    async def take(number: int) -> None:
        taken = port_of(await world.fake.event("started", count=number + 1, seconds=60))
        async with Stranger().at(taken):
            gates[number].touch()
            await asyncio.Event().wait()

    rivals = [asyncio.create_task(take(number)) for number in range(10)]
    try:
        with pytest.raises(UnavailableError, match=rf"port \d+ is held by \S+ \(pid {os.getpid()}\)"):
            await asyncio.wait_for(world.client.load_model("tiny-chat-gguf"), LIMIT)
    finally:
        for rival in rivals:
            rival.cancel()
        await asyncio.gather(*rivals, return_exceptions=True)
    assert 2 <= world.life <= 5
    assert world.leftovers() == []


@pytest.mark.promise("F13", "F22")
@pytest.mark.parametrize("status", [200, 404, 503])
async def test_other_server_on_the_port_is_not_taken_for_the_engine(begin: Begin, status: int) -> None:
    """Another server answers on the port while the engine loads, even with success."""
    world = await begin({}, transport="tcp")
    gate = world.fake.gate("bind")
    world.fake.behave({"bind_until": str(gate)}, {})
    loading = asyncio.create_task(world.client.load_model("tiny-chat-gguf"))
    taken = port_of(await world.fake.event("started"))
    async with Stranger(status).at(taken) as stranger:
        if status != 200:
            gate.touch()
        await asyncio.wait_for(loading, LIMIT)
        gate.touch()
    assert port_of(await world.fake.event("started", count=2)) != taken
    assert world.life == 2
    assert await world.chat() == words(TOKENS)
    # It learns neither the key nor what is asked.
    assert b"authorization" not in stranger.heard.lower()
    assert b"POST" not in stranger.heard


# Time


@pytest.mark.promise("F14")
async def test_progress_extends_start_timeout(begin: Begin) -> None:
    """Lines of output are progress, and so is a processor in use."""
    lives = {
        "tiny_chat_gguf": [{"load_seconds": pace(2), "load_lines": 0.05}],
        "tiny_embed_gguf": [{"load_seconds": pace(2), "load_burns": True}],
    }
    world = await begin(of=lives, start_timeout=pace(1))
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*(world.client.load_model(model) for model in ("tiny-chat-gguf", "tiny-embed-gguf")))
    assert world.life == 2


@pytest.mark.promise("F14", "F16")
async def test_logged_health_checks_do_not_extend_start_timeout(begin: Begin) -> None:
    world = await begin({"never_ready": True, "log_requests": True}, {}, start_timeout=pace(1))
    with pytest.raises(UnavailableError, match=r"no sign of progress for [\d.]+ s .*/health.*start_timeout"):
        await asyncio.wait_for(world.client.load_model("tiny-chat-gguf"), LIMIT)
    assert len(world.fake.events("request", service="health")) > 2
    assert world.leftovers() == []
    # What was too slow once may be tried again.
    await world.client.load_model("tiny-chat-gguf")
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F14")
async def test_output_that_coincides_with_health_checks_extends_start_timeout(begin: Begin) -> None:
    """Some lines follow a probe: an engine that logs its requests would log each of them."""
    steps = [{"on": "health", "from": at, "count": 1, "do": "say", "text": f"step {at}"} for at in range(8, 60, 3)]
    world = await begin({}, start_timeout=pace(1))
    gate = world.fake.gate("load")
    world.fake.behave({"load_until": str(gate), "rules": steps})
    loading = asyncio.create_task(world.client.load_model("tiny-chat-gguf"))
    await world.fake.event("request", service="health", number=16)
    gate.touch()
    await asyncio.wait_for(loading, LIMIT)
    assert world.life == 1


@pytest.mark.promise("F14", "F16")
async def test_progress_does_not_extend_the_start_beyond_its_limit(begin: Begin) -> None:
    world = await begin({"never_ready": True, "load_lines": 0.1, "load_seconds": 1000}, {}, start_limit=pace(1.5))
    with pytest.raises(UnavailableError, match=r"not ready after [\d.]+ s while starting.*start_limit"):
        await asyncio.wait_for(world.client.load_model("tiny-chat-gguf"), LIMIT)
    assert world.leftovers() == []
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F15")
async def test_stalled_pull_does_not_count_toward_start_timeout(begin: Begin) -> None:
    """It stalls for longer than start_timeout; models load and fail to load meanwhile."""
    world = await begin(
        of={"tiny_chat_gguf": [{"never_ready": True}, {}]}, start_timeout=pace(1), start_limit=pace(4)
    )
    stalled = Script(stall_after=1000)
    async with file_server(ENDLESS.read_bytes()) as server:
        server.scripts.append(stalled)
        pulling = asyncio.create_task(world.client.pull_model("mine", source=server.url()))
        await eventually(lambda: server.sent > 0)
        with pytest.raises(UnavailableError, match="while starting"):
            await world.client.load_model("tiny-chat-gguf")
        assert await world.chat() == words(TOKENS)
        assert not pulling.done()
        stalled.go.set()
        await asyncio.wait_for(pulling, LIMIT)
    await world.client.load_model("mine")
    assert "mine" in await world.loaded()


# Failures


@pytest.mark.promise("F16", "F5")
@pytest.mark.parametrize("session", ["same", "own"])
@pytest.mark.parametrize(
    ("end", "named"),
    [
        (
            {"code": 9, "lines": ["0.1 E cannot map the weights"]},
            "exit code 9. Last lines: 0.1 E cannot map",
        ),
        ({"signal": "SIGKILL"}, r"SIGKILL \(exit code -9\)"),
    ],
)
async def test_failed_load_leaves_no_process(begin: Begin, session: str, end: dict[str, Any], named: str) -> None:
    world = await begin({"grandchild": session, "load_exit": end}, {})
    with pytest.raises(UnavailableError, match=f"ended during its start: {named}"):
        await asyncio.wait_for(world.client.load_model("tiny-chat-gguf"), LIMIT)
    assert dead((await world.fake.event("grandchild"))["child"])
    assert world.leftovers() == []
    assert await world.loaded() == []
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F22", "F16")
async def test_engine_that_fails_its_first_request_is_not_ready(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers 200 on /health and fails the first request."""
    failures: list[tuple[dict[str, Any], str]] = [
        ({"do": "status", "status": 500, "message": "no memory"}, "cannot serve: the engine answered 500: no memory"),
        ({"do": "status", "status": 501, "message": "no such head"}, "cannot serve: .*no such head"),
        ({"do": "status", "status": 401, "message": "wrong key"}, "cannot serve: .*wrong key"),
        ({"do": "garbage"}, "cannot serve: the engine does not answer in HTTP"),
        ({"do": "close"}, "cannot serve: the engine closed the connection without an answer"),
        ({"do": "truncated", "where": "body"}, "cannot serve: the engine broke off"),
        ({"do": "die", "code": 134, "lines": ["ggml: abort"]}, "during its start: exit code 134. .*ggml: abort"),
    ]
    monkeypatch.setattr(process_run, "DEATH_NOTICE", 0.2)  # each time it might have died
    world = await begin(*({"rules": [{"on": "probe", **rule}]} for rule, _ in failures), {})
    for _, named in failures:
        with pytest.raises(UnavailableError, match=named):
            await world.chat()
        assert world.leftovers() == []
    assert world.fake.events("request", service="chat") == []
    assert await world.chat() == words(TOKENS)
    assert world.life == len(failures) + 1


@pytest.mark.promise("F22", "F14")
async def test_unanswered_first_request_fails_the_start(begin: Begin) -> None:
    """Neither with nor without a head of an answer."""
    hang, head = ([{"rules": [{"on": "probe", "do": what}]}, {}] for what in ("hang", "head"))
    world = await begin(of={"tiny_chat_gguf": hang, "tiny_embed_gguf": head}, start_timeout=pace(1))
    async with asyncio.timeout(LIMIT):
        for _ in range(2):
            loads = [world.client.load_model(model) for model in ("tiny-chat-gguf", "tiny-embed-gguf")]
            outcomes = await asyncio.gather(*loads, return_exceptions=True)
            if outcomes == [None, None]:
                break
            assert ["no sign of progress for " in str(outcome) for outcome in outcomes] == [True, True]
            assert world.leftovers() == []
    assert world.life == 4


@pytest.mark.promise("F22")
async def test_first_request_matches_the_kind_of_the_model(begin: Begin) -> None:
    refusal = [{"rules": [{"on": "probe", "do": "status", "status": 500, "message": "cannot pool"}]}, {}]
    world = await begin(of={"tiny_embed_gguf": refusal, "tiny_rerank_gguf": refusal})
    for service, request in (("embed", EMBED), ("rerank", {"query": "q", "documents": ["d"]})):
        with pytest.raises(UnavailableError, match="cannot serve: the engine answered 500: cannot pool"):
            await world.client.invoke(service, request)
        await world.client.invoke(service, request)
    probes = {event["path"] for event in world.fake.events("request", service="probe")}
    assert probes == {"/v1/embeddings", "/v1/rerank"}


# Waiting


@pytest.mark.promise("F18")
async def test_fifty_waiting_calls_share_one_load(begin: Begin) -> None:
    world = await begin({}, parallel=64)
    gate = world.fake.gate("load")
    world.fake.behave({"load_until": str(gate)})
    waiting: list[asyncio.Task[Any]] = [
        asyncio.create_task(world.client.load_model("tiny-chat-gguf")) for _ in range(25)
    ]
    waiting += [asyncio.create_task(world.chat()) for _ in range(25)]
    await world.fake.event("listening")
    await eventually(lambda: world.users() == 50)
    assert world.fake.events("request", service="chat") == []
    gate.touch()
    async with asyncio.timeout(LIMIT):
        await asyncio.gather(*waiting)
    assert world.life == 1


@pytest.mark.promise("F18", "F16")
async def test_fifty_waiting_calls_get_the_error_of_a_failed_load(begin: Begin) -> None:
    world = await begin({})
    gate = world.fake.gate("load")
    world.fake.behave({"load_until": str(gate), "load_exit": {"code": 7, "lines": ["0.1 E bad magic"]}}, {})
    waiting = [asyncio.create_task(world.client.load_model("tiny-chat-gguf")) for _ in range(50)]
    await eventually(lambda: world.users() == 50)
    gate.touch()
    async with asyncio.timeout(LIMIT):
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {EngineStartError}
    assert all(re.search("exit code 7.*bad magic", str(outcome)) for outcome in outcomes)
    assert world.life == 1
    await world.client.load_model("tiny-chat-gguf")


@pytest.mark.promise("F18")
@pytest.mark.parametrize("how", ["stop", "unload"])
async def test_fifty_waiting_calls_end_with_a_stop(begin: Begin, how: str) -> None:
    world = await begin({"load_until": "/nowhere"}, {}, drain_timeout=0.1)
    waiting = [asyncio.create_task(world.client.load_model("tiny-chat-gguf")) for _ in range(50)]
    await eventually(lambda: world.users() == 50)
    await world.fake.event("listening")
    async with asyncio.timeout(LIMIT):
        await (world.client.stop_engine() if how == "stop" else world.client.unload_model("tiny-chat-gguf"))
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert all("stopped while it was starting" in str(outcome) for outcome in outcomes)
    assert world.leftovers() == []
    await world.client.start_engine()
    assert await world.chat() == words(TOKENS)


@pytest.mark.promise("F18", "F24")
async def test_cancelled_waiting_calls_do_not_cancel_the_load(begin: Begin) -> None:
    world = await begin({})
    gate = world.fake.gate("load")
    world.fake.behave({"load_until": str(gate)})
    waiting: list[asyncio.Task[Any]] = [
        asyncio.create_task(world.client.load_model("tiny-chat-gguf")) for _ in range(20)
    ]
    waiting += [asyncio.create_task(world.chat()) for _ in range(20)]
    await eventually(lambda: world.users() == 40)
    for quitter in waiting[1:]:
        quitter.cancel()
    await eventually(lambda: world.users() == 1)
    gate.touch()
    await asyncio.wait_for(waiting[0], LIMIT)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert world.life == 1
    assert world.state() is ProcessState.READY
    assert world.fake.events("request", service="chat") == []


# Output


@pytest.mark.promise("F2")
@pytest.mark.parametrize("fd", [1, 2])
@pytest.mark.parametrize("solid", [False, True], ids=["lines", "solid"])
async def test_flood_of_output_does_not_block_the_engine(begin: Begin, fd: int, solid: bool) -> None:
    """During the start and while it answers; an unread pipe would block the engine for ever."""
    flood = {"do": "flood", "fd": fd, "mib": 4, "solid": solid}
    world = await begin({"rules": [{"on": "probe", **flood}, {"on": "chat", **flood}]})
    assert await asyncio.wait_for(world.chat(), LIMIT) == words(TOKENS)
    assert len(world.server("tiny-chat-gguf").latest_run.last_lines()) < 100_000  # type: ignore[union-attr]


@pytest.mark.promise("F2")
async def test_output_on_both_pipes_at_once_is_read(begin: Begin) -> None:
    rules = [{"on": "chat", "from": 1 + fd, "count": 1, "do": "flood", "fd": fd, "mib": 4} for fd in (1, 2)]
    world: World = await begin({"rules": rules})
    async with asyncio.timeout(LIMIT):
        assert await asyncio.gather(*(world.chat() for _ in range(4))) == [words(TOKENS)] * 4
