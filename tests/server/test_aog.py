"""What AOG needs beyond the contract; other hosts get the contract."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.download.events import Success
from engine_plugin.errors import (
    EnginePluginError,
    InvalidRequestError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotLoadedError,
    PullError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.manifest import load_manifest
from engine_plugin.models.info import ModelDescription, ModelInfo
from engine_plugin.plugin import Plugin
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.server.hosts import AogHost, Host, host_of
from engine_plugin.server.servicer import ProviderServicer
from pins import ROOT
from tests.patience import LIMIT
from tests.small_engine import SmallEngine

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from engine_plugin.download.events import PullEvent
    from engine_plugin.messages import ConversationMessage
    from engine_plugin.models.request import PullRequest

NOON, ISO = 1_796_040_000, "2026-11-30T12:00:00Z"
MODEL = json.dumps({"model": "m"}).encode()


class Engine(SmallEngine):
    """A small engine with one model that has two references."""

    async def list_models(self) -> Sequence[ModelInfo]:
        model = ModelInfo("me/m", "chat", 1, "", datetime.fromtimestamp(NOON, UTC), False, ModelDescription())
        sample = replace(model, name="tiny", bundled=True, references=("former",))
        return [replace(model, references=("hf:me/m@v1", "/models/m")), sample]

    @asynccontextmanager
    async def conversing(
        self, service: str, messages: AsyncIterator[ConversationMessage]
    ) -> AsyncIterator[AsyncIterator[ConversationMessage]]:
        async with self.converse(service, messages, "small") as answers:
            yield answers

    async def unload_model(self, name: str) -> None:
        if name in self.failing:
            raise self.failing[name]

    async def pull_model(self, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        self._step("pull_model")
        yield Success(request.model, 1, "sha256:0")


class Recorder:
    """A call that records the messages sent to it and delivers given ones."""

    def __init__(self, *received: Any) -> None:
        self.sent: list[Any] = []
        self._received = list(received)

    def end_with(self, metadata: Mapping[str, str]) -> None:
        self.trailing = dict(metadata)

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def receive(self) -> Any:
        return self._received.pop(0) if self._received else None


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("AOG_DATA_DIR", str(tmp_path))
    return Engine(load_manifest(ROOT / "plugins/llamacpp/plugin.yaml"))


def under(host: Host, engine: Engine) -> ProviderServicer:
    return ProviderServicer(Plugin(engine.manifest, engine), host)


@pytest.mark.promise("H4")
def test_environment_selects_the_host_class() -> None:
    assert isinstance(host_of({"AOG_VERSION": "0.7.7"}), AogHost)
    assert type(host_of({"AOG_VERSION": ""})) is type(host_of({})) is Host


@pytest.mark.promise("H2")
@pytest.mark.parametrize(
    "error",
    [
        ModelNotFoundError("m is not here"),
        UnavailableError("stopped"),
        InvalidRequestError("model: no"),
        RuntimeError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_failed_load_is_an_error_for_every_host_but_aog(engine: Engine, error: Exception) -> None:
    engine.failing = {"load_model": error}
    request = pb.LoadModelRequest(request_json=MODEL)
    told = await under(AogHost(), engine).LoadModel(request, Recorder())
    honest = await under(Host(), engine).LoadModel(request, Recorder())
    assert honest.code == getattr(error, "code", 500)
    assert (told.code, told.message) == (0, honest.message)


@pytest.mark.promise("H6")
@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([ModelNotLoadedError("m is not loaded")], 0),
        ([ModelNotFoundError("m is not here")], 0),
        ([UnavailableError("the engine is stopped")], 0),
        ([UnsupportedError("the server decides")], 0),
        ([ModelInUseError("m is busy")], 412),
        ([EnginePluginError("broken")], 500),
        ([ModelNotLoadedError("m is not loaded"), EnginePluginError("broken")], 500),
    ],
)
async def test_unload_of_an_unloaded_model_succeeds_for_aog(
    engine: Engine, errors: list[EnginePluginError], code: int
) -> None:
    engine.failing = {str(number): error for number, error in enumerate(errors)}
    request = pb.UnloadModelRequest(request_json=json.dumps({"models": ["other", *engine.failing]}).encode())
    assert (await under(AogHost(), engine).UnloadModel(request, Recorder())).code == code
    assert (await under(Host(), engine).UnloadModel(request, Recorder())).code == errors[0].code


@pytest.mark.promise("H5")
@pytest.mark.parametrize("host", [Host(), AogHost()], ids=["any host", "AOG"])
async def test_failed_pull_sends_its_error_as_data_before_its_code(engine: Engine, host: Host) -> None:
    engine.failing = {"pull_model": PullError("no such host")}
    call = Recorder()
    await under(host, engine).PullModelStream(pb.PullModelStreamRequest(request_json=MODEL), call)
    first, last = call.sent
    assert (first.code, json.loads(first.data)) == (0, {"error": "no such host"})
    assert (last.code, last.message) == (500, "no such host")


@pytest.mark.promise("H4")
@pytest.mark.parametrize("service", ["chat", "generate"])
@pytest.mark.parametrize(
    ("given", "made"),
    [
        (f'{{"created":{NOON},"model":"m"}}', f'{{"created":"{ISO}","model":"m"}}'),
        (f'{{"choices": [], "created" : {NOON}}}', f'{{"choices": [], "created" : "{ISO}"}}'),
        (f'{{"created":{NOON}.75}}', f'{{"created":"{ISO}"}}'),
        ('{"created":1.79604e9}', f'{{"created":"{ISO}"}}'),
        ('{"created":null}', '{"created":"1970-01-01T00:00:00Z"}'),
        ('{"created":-5}', '{"created":"1970-01-01T00:00:00Z"}'),
        ('{"created":1e300}', '{"created":"9999-12-31T00:00:00Z"}'),
        (f'{{"created":"{ISO}"}}', f'{{"created":"{ISO}"}}'),
        (f'{{"created_at":{NOON}}}', f'{{"created_at":{NOON}}}'),
        ('{"text":"\\"created\\":12"}', '{"text":"\\"created\\":12"}'),
    ],
)
def test_created_time_is_text_for_aog(service: str, given: str, made: str) -> None:
    aog = AogHost()
    assert aog.answer(service, given.encode()) == made.encode()
    assert aog.events(service, f"data: {given}\n\n".encode()) == f"data: {made}\n\n".encode()
    assert json.loads(made).keys() == json.loads(given).keys()


@pytest.mark.promise("H4")
@given(st.lists(st.tuples(st.integers(0, 4_000_000_000), st.sampled_from(["", " "]), st.booleans()), max_size=6))
def test_created_time_of_each_event_is_converted_for_aog(events: list[tuple[int, str, bool]]) -> None:
    aog = AogHost()
    for together in (True, False):
        blocks = []
        for number, space, last in events:
            created = f'"created":{space}{number}'
            shape = f'{{"x":1,{created}}}' if last else f'{{{created},"x":1}}'
            blocks.append(f"data: {shape}\n\n".encode())
        sent = aog.events("chat", b"".join(blocks)) if together else b"".join(aog.events("chat", b) for b in blocks)
        made = [json.loads(line.removeprefix("data: ")) for line in sent.decode().split("\n\n") if line]
        assert [datetime.fromisoformat(shape["created"]).timestamp() for shape in made] == [n for n, _, _ in events]


@pytest.mark.promise("H4")
def test_answers_for_other_hosts_and_services_are_unchanged() -> None:
    answer = b'{"created":%d}' % NOON
    event = b": comment\r\n\r\ndata:" + answer + b"\n\n"
    assert (Host().answer("chat", answer), Host().events("chat", event)) == (answer, event)
    assert (AogHost().answer("text-to-image", answer), AogHost().events("text-to-image", event)) == (answer, event)


@pytest.mark.promise("H4")
@pytest.mark.parametrize(
    ("block", "made"),
    [
        (b": ping\n\n", b""),
        (b'data:{"a":1}\n\n', b'data: {"a":1}\n\n'),
        (b'data: {"a":1}\r\n\r\ndata: [DONE]\r\n\r\n', b'data: {"a":1}\n\ndata: [DONE]\n\n'),
        (b': ping\n\nevent: chunk\nid: 7\ndata: {"a":1}\n\n', b'data: {"a":1}\n\n'),
        (b'data: {"a":"\\n: b"}\n\n', b'data: {"a":"\\n: b"}\n\n'),
        (b'data: {"a":1}\n\n: ping\n\ndata:[DONE]\n\n', b'data: {"a":1}\n\ndata: [DONE]\n\n'),
    ],
)
def test_aog_gets_only_data_lines(block: bytes, made: bytes) -> None:
    """AOG parses every line of a stream as the JSON of an event."""
    assert AogHost().events("chat", block) == made


@pytest.mark.promise("H1")
def test_task_started_event_is_not_sent_to_aog() -> None:
    started = b'{"header": {"event": "task-started"}, "payload": {}}'
    said = b'{"header": {"event": "result-generated"}, "payload": {"text": "\\"task-started\\""}}'
    live = "speech-to-text-ws"
    assert [Host().takes(live, event) for event in (started, said)] == [True, True]
    assert [AogHost().takes(live, event) for event in (started, said)] == [False, True]
    assert AogHost().takes("chat", started)


class Silent(Recorder):
    """A call whose host sends the given messages and then keeps the stream open."""

    async def receive(self) -> Any:
        return await super().receive() or await asyncio.Event().wait()


@pytest.mark.promise("H1")
async def test_conversation_ends_when_aog_falls_silent(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """AOG neither closes nor cancels it when its client leaves, so its model would stay in use for ever."""
    monkeypatch.setattr(AogHost, "silence", 0.05)
    plugin = Plugin(engine.manifest, engine)
    monkeypatch.setattr(plugin, "converse", engine.conversing)
    call = Silent(pb.InvokeServiceBidiRequest(service_name="speech-to-text-ws", data=b"abc", message_type="binary"))
    await asyncio.wait_for(ProviderServicer(plugin, AogHost()).InvokeServiceBidi(call), LIMIT)
    assert [message.data for message in call.sent] == [b"cba"]


@pytest.mark.promise("H3")
async def test_model_list_for_aog_includes_references(engine: Engine) -> None:
    async def listed(host: Host) -> list[dict[str, Any]]:
        answer = await under(host, engine).ListModels(pb.ListModelsRequest(), Recorder())
        models: list[dict[str, Any]] = json.loads(answer.response_json)["models"]
        return models

    assert [(entry["name"], entry["references"]) for entry in await listed(Host())] == [
        ("me/m", ["hf:me/m@v1", "/models/m"]),
        ("tiny", ["former"]),
    ]
    assert [entry["name"] for entry in await listed(AogHost())] == [
        "me/m",
        "hf:me/m@v1",
        "/models/m",
        "tiny",
    ]
