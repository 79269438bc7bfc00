"""Every error's id and fields reach the host, in each kind of rpc, and come back as the class that was raised."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest

import troubleshooting
from engine_plugin import catalogue, errors
from engine_plugin.catalogue import CATALOGUE
from engine_plugin.engines.base import Health
from engine_plugin.errors import (
    ERROR_FIELDS,
    ERROR_ID,
    EnginePluginError,
    InvalidRequestError,
    ManifestError,
    ModelNotFoundError,
    PluginProcessError,
    Problem,
    PullError,
    UnavailableError,
)
from engine_plugin.host import PluginClient, connect
from engine_plugin.host.failures import identified
from engine_plugin.manifest import load_manifest
from engine_plugin.plugin import Plugin
from engine_plugin.protocol.stubs import provider_pb2 as pb
from engine_plugin.server import new_server
from engine_plugin.server.servicer import provider_service
from pins import ROOT
from tests.patience import LIMIT
from tests.small_engine import SmallEngine

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "a"}]}
HERE = (ManifestError, PluginProcessError)
"""What only the host library raises: a plugin that sends one of their ids gets the root of the tree."""


def raised() -> dict[str, EnginePluginError]:
    """An error of each id, with every field that it may have."""
    found: dict[str, EnginePluginError] = {}
    for name in errors.__all__:
        kind = getattr(errors, name)
        if isinstance(kind, type) and issubclass(kind, EnginePluginError):
            fields = {field: f"{field} é" for field in kind.names}
            found[kind.id] = (
                ManifestError([Problem("plugin.yaml", 3, "a is wrong", "Set b")])
                if issubclass(kind, ManifestError)
                else kind("why", **fields)
            )
    for entry in CATALOGUE.values():
        found[f"{entry.id} of the catalogue"] = entry.error(**troubleshooting.EXAMPLES[entry.id])
    return found


@pytest.fixture(params=raised())
def error(request: pytest.FixtureRequest) -> EnginePluginError:
    return raised()[request.param]


class Engine(SmallEngine):
    """Fails with the errors in `failing`; its health check with `sick`."""

    sick: EnginePluginError | None = None

    async def health(self) -> Health:
        return Health.dead(self.sick) if self.sick else await super().health()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setenv("AOG_DATA_DIR", str(tmp_path))
    return Engine(load_manifest(ROOT / "plugin.yaml"))


@pytest.fixture
async def client(engine: Engine, short_dir: Path) -> AsyncIterator[PluginClient]:
    server = new_server()
    server.add(provider_service(Plugin(engine.manifest, engine)))
    address = await server.start(f"unix:{short_dir / 's'}")
    try:
        async with await connect(address, timeout=LIMIT) as client:
            yield client
    finally:
        await server.stop(0)


class Sent:
    """An error as it was before the plugin added fields."""

    def __init__(self, error: EnginePluginError) -> None:
        self.kind = EnginePluginError if isinstance(error, HERE) else type(error)
        self.id, self.code, self.text = error.id, error.code, str(error)
        self.fields = json.loads(error.metadata[ERROR_FIELDS])

    def require(self, error: EnginePluginError, **about: str) -> None:
        """Assert that `caught` has this error's class, id and fields, with `about` for missing ones."""
        assert (type(error), error.id, error.code) == (self.kind, self.id, self.code)
        assert str(error).endswith(self.text)  # the host library begins a deadline's with the plugin's name
        assert error.fields == about | self.fields | {"engine": "openvino"}


@pytest.mark.promise("P33")
async def test_unary_call_restores_the_error(client: PluginClient, engine: Engine, error: EnginePluginError) -> None:
    sent = Sent(error)
    engine.failing["call"] = error
    with pytest.raises(EnginePluginError) as caught:
        await client.invoke("chat", REQUEST)
    sent.require(caught.value, service="chat", model="m")


@pytest.mark.promise("P33")
async def test_stream_restores_the_error(client: PluginClient, engine: Engine, error: EnginePluginError) -> None:
    sent = Sent(error)
    engine.failing["stream"] = error
    async with client.stream("chat", REQUEST) as chunks:
        with pytest.raises(EnginePluginError) as caught:
            await anext(chunks)
    sent.require(caught.value, service="chat", model="m")


@pytest.mark.promise("P33")
async def test_conversation_restores_the_error(
    client: PluginClient, engine: Engine, error: EnginePluginError
) -> None:
    sent = Sent(error)
    engine.failing["converse"] = error
    async with client.invoke_bidi("speech-to-text-ws") as conversation:
        await conversation.send(b"ab", metadata={"format": "pcm"})
        with pytest.raises(EnginePluginError) as caught:
            await anext(conversation)
    sent.require(caught.value, service="speech-to-text-ws")


async def test_pull_restores_the_error(client: PluginClient, engine: Engine) -> None:
    error = catalogue.DISK_FULL.error_as(PullError, **troubleshooting.EXAMPLES["disk-full"])
    engine.failing["pull_model"] = error
    with pytest.raises(EnginePluginError) as caught:
        await client.pull_model("https://me:secret@example.org/m.gguf?token=abcdefgh")
    with pytest.raises(EnginePluginError) as streamed:
        [step async for step in client.pull_model_stream("https://me:secret@example.org/m.gguf")]
    for one in (caught.value, streamed.value):
        assert (one.id, str(one), one.fields["needed_bytes"]) == ("disk-full", str(error), 5261334938)
        assert one.fields["model"] == "https://example.org/m.gguf"


async def test_error_of_a_model_call_names_the_model(client: PluginClient, engine: Engine) -> None:
    engine.failing["delete_model"] = errors.ModelInUseError("model: m is answering 2 requests")
    with pytest.raises(errors.ModelInUseError) as caught:
        await client.delete_model("m")
    assert caught.value.fields == {"model": "m", "engine": "openvino"}


async def test_unhealthy_engine_reports_its_error_in_health_check(client: PluginClient, engine: Engine) -> None:
    engine.sick = catalogue.KEY_MISSING.error(**troubleshooting.EXAMPLES["key-missing"])
    with pytest.raises(UnavailableError) as caught:
        await client.health_check()
    assert (caught.value.code, caught.value.id) == (503, "key-missing")
    assert caught.value.fields["variable"] == "OPENAI_API_KEY"


async def test_unexpected_error_becomes_internal_error(client: PluginClient, engine: Engine) -> None:
    engine.failing["call"] = ZeroDivisionError()
    with pytest.raises(EnginePluginError) as caught:
        await client.invoke("chat", REQUEST)
    assert (caught.value.id, caught.value.fields) == ("internal-error", {"engine": "openvino"})


async def test_invalid_field_is_named_in_the_error_fields(client: PluginClient) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await client.invoke("chat", {"messages": [{"role": "user", "content": "a"}, 7]})
    assert caught.value.id == "request-invalid"
    assert caught.value.fields == {"field": "messages[1]", "service": "chat", "engine": "openvino"}


# What any client of gRPC sees, grpcurl for one


async def trailing(client: PluginClient, rpc: str, request: bytes) -> tuple[grpc.StatusCode, dict[str, Any]]:
    async with grpc.aio.insecure_channel(client.address) as channel:
        ask: Any = channel.unary_unary(f"/protocol.ProviderService/{rpc}")
        call = ask(request)
        return await call.code(), dict(iter(await call.trailing_metadata()))


@pytest.mark.promise("P33")
async def test_error_code_has_id_and_fields_in_trailing_metadata(client: PluginClient, engine: Engine) -> None:
    engine.failing["call"] = ModelNotFoundError("model: no model is called 'm'", model="m", pull="m:8b")
    request = pb.InvokeServiceRequest(service_name="chat", request_data=json.dumps(REQUEST).encode())
    code, metadata = await trailing(client, "InvokeService", request.SerializeToString())
    assert code is grpc.StatusCode.OK
    assert metadata[ERROR_ID] == "model-missing"
    assert metadata[ERROR_FIELDS] == '{"service":"chat","model":"m","pull":"m:8b","engine":"openvino"}'


@pytest.mark.parametrize(
    ("rpc", "request_"),
    [("InvokeService", b"\xff"), ("SetOperateStatus", pb.SetOperateStatusRequest(status=9).SerializeToString())],
)
async def test_error_status_has_id_and_fields_in_trailing_metadata(
    client: PluginClient, rpc: str, request_: bytes
) -> None:
    code, metadata = await trailing(client, rpc, request_)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert metadata[ERROR_ID] == "request-invalid"
    assert isinstance(json.loads(metadata[ERROR_FIELDS]), dict)


async def test_success_has_no_error_metadata(client: PluginClient) -> None:
    _, metadata = await trailing(client, "GetVersion", b"")
    assert metadata.keys().isdisjoint({ERROR_ID, ERROR_FIELDS})


# What a host makes of other plugins


def test_error_without_id_gets_the_class_of_its_code() -> None:
    error = identified(errors.error_for_code(404, "why"), {})
    assert (type(error), error.id, error.fields) == (errors.NotFoundError, "not-found", {})


@pytest.mark.parametrize("name", ["", "Model-Missing", "model missing", "-", "a" * 65, "model-missing\n"])
def test_malformed_error_id_is_ignored(name: str) -> None:
    error = errors.error_for_code(404, "why")
    assert identified(error, {ERROR_ID: name, ERROR_FIELDS: '{"model":"m"}'}) is error
    assert (error.id, error.fields) == ("not-found", {})


def test_unknown_error_id_is_kept() -> None:
    error = identified(errors.error_for_code(412, "why"), {ERROR_ID: "moon-missing", ERROR_FIELDS: '{"moon":1}'})
    assert (type(error), error.id, error.fields) == (errors.PreconditionError, "moon-missing", {"moon": 1})


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a":' + "[" * 200, "x" * 9000, "\udc80"])
def test_malformed_error_fields_are_ignored(text: str) -> None:
    error = identified(errors.error_for_code(404, "why"), {ERROR_ID: "model-missing", ERROR_FIELDS: text})
    assert (type(error), error.fields) == (ModelNotFoundError, {})
