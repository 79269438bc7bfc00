"""With `auto_pull` a call whose model is missing pulls it once and is then repeated."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin import deadlines
from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.errors import (
    DeadlineError,
    InvalidRequestError,
    ManifestError,
    ModelNotFoundError,
    PullError,
    UnavailableError,
)
from engine_plugin.messages import ConversationMessage
from engine_plugin.plugin import Plugin
from tests.patience import LIMIT, pace
from tests.small_engine import SmallEngine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

    from engine_plugin.download.events import PullEvent
    from engine_plugin.manifest import Manifest
    from engine_plugin.models.store import PullRequest

SERVICES: dict[str, dict[str, Any]] = {"chat": {}, "speech-to-text-ws": {}}
ALLOWED = pace(0.2)
ASK = json.dumps({"model": "acme/m", "messages": [{"role": "user", "content": "a"}]}).encode()
FAILED = b'{"header": {"event": "task-failed"}}'


class PullingEngine(SmallEngine):
    """Has only models that were pulled; a pull waits for `gate`."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self.here: set[str] = set()
        self.pulled: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.pulling = asyncio.Event()
        self.left = asyncio.Event()
        self.left_open = False
        """Whether a pull ended before the engine was closed."""
        self.pullable = True
        self.heard: list[list[bytes]] = []

    def _require(self, name: str) -> None:
        if name not in self.here:
            raise ModelNotFoundError(f"model: no model is called {name!r}", pull=name if self.pullable else "")

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        self.pulled.append(request.model)
        try:
            yield StepStarted("resolving")
            self.pulling.set()
            await self.gate.wait()
            self._step("pull_model")
            yield ChunkProgress("sha256:0", 2, 2)
            self.here.add(request.model)
            yield Success(request.model, 2, "sha256:0")
        finally:
            self.left_open = not self.closed
            self.left.set()

    async def call(self, service: str, request: dict[str, Any]) -> bytes:
        self._require(request.pop("model"))  # an engine may do with its request what it likes
        return b"{}"

    @asynccontextmanager
    async def stream(self, service: str, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        self._require(request["model"])
        async with super().stream(service, request) as chunks:
            yield chunks

    @asynccontextmanager
    async def converse(
        self, service: str, messages: AsyncIterator[ConversationMessage], default_model: str
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        heard: list[bytes] = []
        self.heard.append(heard)

        async def answers() -> AsyncIterator[ConversationMessage]:
            heard.append((await anext(messages)).data)
            try:
                self._require(default_model)
                self._step("converse")
            except (ModelNotFoundError, InvalidRequestError):
                yield ConversationMessage(FAILED)
                raise
            yield ConversationMessage(b"started")
            async for message in messages:
                heard.append(message.data)
                yield message

        yield answers()


@pytest.fixture
def plugin(manifested: Callable[..., Manifest]) -> Plugin:
    manifest = manifested(SERVICES, auto_pull=True)
    return Plugin(manifest, PullingEngine(manifest))


def engine_of(plugin: Plugin) -> PullingEngine:
    assert isinstance(plugin.engine, PullingEngine)
    return plugin.engine


async def talk(plugin: Plugin, *said: bytes) -> list[bytes]:
    async def messages() -> AsyncIterator[ConversationMessage]:
        for data in said:
            yield ConversationMessage(data, "binary")

    async with plugin.converse("speech-to-text-ws", messages()) as answers:
        return [answer.data async for answer in answers]


async def test_missing_model_is_pulled_before_an_answer_or_stream(plugin: Plugin) -> None:
    assert await plugin.invoke("chat", ASK) == b"{}"
    engine_of(plugin).here.clear()
    async with plugin.stream("chat", ASK) as chunks:
        assert [chunk async for chunk in chunks][-1] == b"data: [DONE]\n\n"
    assert engine_of(plugin).pulled == ["acme/m"] * 2
    await plugin.invoke("chat", ASK)
    assert len(engine_of(plugin).pulled) == 2


async def test_service_timeout_does_not_include_the_pull(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "allowed", lambda *_: ALLOWED)
    engine = engine_of(plugin)
    engine.gate.clear()
    asking = asyncio.create_task(plugin.invoke("chat", ASK))
    await engine.pulling.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(asking), 2 * ALLOWED)
    engine.gate.set()
    assert await asking == b"{}"


async def test_log_has_the_progress_once_for_all_callers(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    engine = engine_of(plugin)
    engine.gate.clear()
    asking = [asyncio.create_task(plugin.invoke("chat", ASK)) for _ in range(3)]
    await engine.pulling.wait()
    engine.gate.set()
    assert await asyncio.gather(*asking) == [b"{}"] * 3
    told = [record.message for record in caplog.records if getattr(record, "progress", "") == "PullModel"]
    assert told == [
        "pulling acme/m, which a call needs",
        "resolving",
        "2 bytes of 2 bytes downloaded",
        "pulled acme/m",
    ]


async def test_cancelled_caller_leaves_the_pull(plugin: Plugin) -> None:
    engine = engine_of(plugin)
    engine.gate.clear()
    asking = asyncio.create_task(plugin.invoke("chat", ASK))
    await engine.pulling.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert engine.left.is_set()
    engine.gate.set()
    assert await plugin.invoke("chat", ASK) == b"{}"


async def test_closing_the_plugin_cancels_the_pull_before_the_engine_closes(plugin: Plugin) -> None:
    engine = engine_of(plugin)
    engine.gate.clear()
    call = asyncio.create_task(plugin.invoke("chat", ASK))
    await asyncio.wait_for(engine.pulling.wait(), LIMIT)
    await plugin.aclose()
    assert (engine.left_open, engine.closed) == (True, True)
    with pytest.raises(UnavailableError, match="stopping"):
        await asyncio.wait_for(call, LIMIT)


async def test_failed_pull_fails_the_call(plugin: Plugin) -> None:
    engine_of(plugin).failing["pull_model"] = PullError("the hub is away")
    with pytest.raises(PullError, match="the hub is away"):
        await plugin.invoke("chat", ASK)
    with pytest.raises(PullError, match="the hub is away"):
        async with plugin.stream("chat", ASK):
            pytest.fail("there is no stream")
    with pytest.raises(PullError, match="the hub is away"):
        await talk(plugin, b"a")


async def test_name_without_a_reference_is_not_pulled(plugin: Plugin) -> None:
    engine_of(plugin).pullable = False
    with pytest.raises(ModelNotFoundError, match="no model is called 'acme/m'"):
        await plugin.invoke("chat", ASK)
    async with plugin.converse("speech-to-text-ws", one(b"a")) as answers:
        assert (await anext(answers)).data == FAILED
        with pytest.raises(ModelNotFoundError):
            await anext(answers)
    assert engine_of(plugin).pulled == []


async def one(data: bytes) -> AsyncIterator[ConversationMessage]:
    yield ConversationMessage(data, "binary")


async def test_call_is_repeated_once(plugin: Plugin) -> None:
    engine = engine_of(plugin)
    engine.here = Forgetful()
    with pytest.raises(ModelNotFoundError):
        await plugin.invoke("chat", ASK)
    assert engine.pulled == ["acme/m"]


class Forgetful(set[str]):
    """A set that keeps nothing."""

    def add(self, element: str, /) -> None:
        pass


async def test_auto_pull_is_off_by_default(manifested: Callable[..., Manifest]) -> None:
    manifest = manifested(SERVICES)
    plugin = Plugin(manifest, PullingEngine(manifest))
    assert not manifest.auto_pull
    with pytest.raises(ModelNotFoundError):
        await plugin.invoke("chat", ASK)
    with pytest.raises(ModelNotFoundError):
        async with plugin.stream("chat", ASK):
            pytest.fail("there is no stream")
    with pytest.raises(ModelNotFoundError):
        await talk(plugin, b"a")
    assert engine_of(plugin).pulled == []


def test_auto_pull_must_be_a_boolean(manifested: Callable[..., Manifest]) -> None:
    with pytest.raises(ManifestError, match="auto_pull is the text 'yes', not a boolean"):
        manifested(SERVICES, auto_pull="yes")


# Conversations


async def test_conversation_begins_again_with_all_messages(plugin: Plugin) -> None:
    assert await talk(plugin, b"a", b"b", b"c") == [b"started", b"b", b"c"]
    assert engine_of(plugin).pulled == ["small"]
    assert engine_of(plugin).heard == [[b"a"], [b"a", b"b", b"c"]]


async def test_other_failure_of_a_conversation_is_raised(plugin: Plugin) -> None:
    engine = engine_of(plugin)
    engine.here.add("small")
    engine.failing["converse"] = InvalidRequestError("language: is unknown")
    async with plugin.converse("speech-to-text-ws", one(b"a")) as answers:
        assert (await anext(answers)).data == FAILED
        with pytest.raises(InvalidRequestError, match="language"):
            await anext(answers)


async def test_conversation_deadline_does_not_include_the_pull(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "allowed", lambda *_: ALLOWED)
    engine_of(plugin).gate.clear()
    talking = asyncio.create_task(talk(plugin, b"a"))
    await engine_of(plugin).pulling.wait()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(talking), 2 * ALLOWED)
    engine_of(plugin).gate.set()
    assert await talking == [b"started"]

    endless = asyncio.Event()

    async def messages() -> AsyncIterator[ConversationMessage]:
        yield ConversationMessage(b"a", "binary")
        await endless.wait()

    async def listen() -> None:
        async with plugin.converse("speech-to-text-ws", messages()) as answers:
            async for _ in answers:
                pass

    with pytest.raises(DeadlineError):
        await listen()


async def test_messages_are_dropped_after_the_first_answer(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine_plugin.conversations.MOST_KEPT", 2)
    engine = engine_of(plugin)
    engine.here.add("small")
    said: Sequence[bytes] = [bytes([number]) for number in range(10)]
    assert await talk(plugin, *said) == [b"started", *said[1:]]
