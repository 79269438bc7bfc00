"""The engine with an attached server: no configuration, no start, never stopped."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING

import pytest

from engine_plugin.engines.base import HealthState
from engine_plugin.engines.ollama import address
from engine_plugin.errors import (
    InvalidRequestError,
    ManifestError,
    ModelInUseError,
    ModelNotFoundError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.process.ports import free_ports
from tests.engines.ollama.contract.handle import ContractServer
from tests.models.fakes import pulled
from tests.patience import LIMIT

from .engine import HELLO, answer, plugin_in

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.plugin import Plugin


@pytest.fixture
async def plugin(
    shared_server: ContractServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Plugin]:
    """The shipped plugin on a machine where Ollama runs, which the tests do not change."""
    monkeypatch.setenv("OLLAMA_HOST", shared_server.address)
    shared_server.forget()
    async with plugin_in(tmp_path) as found:
        yield found


@pytest.fixture
async def alone(
    contract_server: ContractServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Plugin]:
    """The shipped plugin with a server for this test only."""
    monkeypatch.setenv("OLLAMA_HOST", contract_server.address)
    async with plugin_in(tmp_path) as found:
        yield found


@pytest.mark.promise("P32")
async def test_running_ollama_needs_no_configuration_and_no_start(
    alone: Plugin, contract_server: ContractServer, tmp_path: Path
) -> None:
    contract_server.add("young:latest", modified_at="2099-01-01T00:00:00Z")
    completion = await answer(alone, "chat", messages=HELLO, max_tokens=4)
    assert completion["object"] == "chat.completion"
    assert completion["choices"][0]["message"]["content"]
    assert completion["model"] == "young:latest"
    vectors = await answer(alone, "embed", input="Hello")
    assert vectors["model"] == "embed:latest"
    assert vectors["data"][0]["embedding"]
    text = await answer(alone, "generate", prompt="Hello", max_tokens=4)
    assert text["object"] == "text_completion"
    health = await alone.health()
    assert health.state is HealthState.READY
    assert health.detail == f"attached to Ollama {await alone.version()} at {contract_server.url}"
    assert (await alone.check()).installed
    names = {model.name for model in await alone.list_models()}
    assert {"young:latest", "embed:latest"} <= names
    assert {model.name for model in await alone.running_models()} == {"young:latest", "embed:latest"}
    assert alone.config()["host"] == contract_server.address
    assert not (tmp_path / "data").exists(), "no data directory was needed"


async def test_address_in_manifest_overrides_environment(contract_server: ContractServer, tmp_path: Path) -> None:
    for place, changes in (
        ("a", {"engine_host": f"{contract_server.url}/v1"}),
        ("b", {"address": contract_server.address}),
    ):
        (tmp_path / place).mkdir()
        async with plugin_in(tmp_path / place, **changes) as plugin:  # type: ignore[arg-type]  # options of all kinds
            assert (await plugin.health()).state is HealthState.READY


def test_invalid_address_is_reported_with_its_line(tmp_path: Path) -> None:
    async def begin(**changes: str) -> None:
        async with plugin_in(tmp_path, **changes):  # type: ignore[arg-type]  # options of all kinds
            raise AssertionError

    with pytest.raises(ManifestError, match=r"plugin\.yaml:\d+: .*engine\.address"):
        asyncio.run(begin(address="box:x"))
    with pytest.raises(ManifestError, match=r"plugin\.yaml:\d+: .*engine_host"):
        asyncio.run(begin(engine_host="ftp://box"))


@pytest.mark.promise("P7", "P32")
async def test_start_attaches_and_stop_detaches(alone: Plugin, contract_server: ContractServer) -> None:
    await alone.start("auto")
    await answer(alone, "chat", messages=HELLO, max_tokens=2)
    await alone.stop()
    for refused in (
        answer(alone, "chat", messages=HELLO),
        answer(alone, "chat", model="tiny-chat", messages=HELLO),
        alone.list_models(),
        alone.load_model("tiny-chat"),
        alone.delete_model("tiny-chat"),
        alone.health(),
    ):
        with pytest.raises(UnavailableError, match="StartEngine"):
            await refused
    assert await alone.running_models() == ()
    assert contract_server.process.poll() is None
    assert contract_server.names(), "it keeps running, with its models"
    await alone.stop()
    await alone.start("auto")
    assert (await alone.health()).state is HealthState.READY
    await answer(alone, "chat", messages=HELLO, max_tokens=2)
    assert not [entry for entry in contract_server.requests() if entry["body"] and "keep_alive" in entry["body"]], (
        "models of an attached server are not unloaded"
    )


@pytest.mark.promise("P32")
async def test_software_of_attached_server_is_not_changed(plugin: Plugin, shared_server: ContractServer) -> None:
    for description in (
        await plugin.install(cover=False),
        await plugin.install(cover=True),
        await plugin.upgrade(),
        (await plugin.check()).detail,
    ):
        assert f"at {shared_server.url} is an attached server, which the plugin does not change" in description
    assert "engine.server: manage" in await plugin.upgrade()


@pytest.mark.promise("P32")
async def test_missing_server_does_not_delay_the_start_and_names_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [port] = free_ports(1)
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{port}")
    async with plugin_in(tmp_path) as plugin:
        found = await plugin.check()
        assert not found.installed
        assert "ollama serve" in found.detail
        assert "call InstallEngine" in found.detail
        for failing in (
            answer(plugin, "chat", messages=HELLO),
            plugin.list_models(),
            plugin.health(),
            plugin.start("auto"),
        ):
            with pytest.raises(UnavailableError) as caught:
                await failing
            message = str(caught.value)
            assert message.startswith(f"no Ollama server answers at http://127.0.0.1:{port} (Connection refused). ")
            assert "ollama serve" in message
            assert "call InstallEngine" in message
        assert await plugin.running_models() == ()
        # A server that is started now is used at once, without StartEngine.
        server = await asyncio.to_thread(ContractServer, tmp_path / "theirs", port=port)
        try:
            assert (await answer(plugin, "chat", messages=HELLO, max_tokens=2))["choices"]
        finally:
            await asyncio.to_thread(server.close)
        with pytest.raises(UnavailableError, match="no Ollama server answers"):
            await answer(plugin, "chat", model="tiny-chat", messages=HELLO)
        with pytest.raises(UnavailableError, match="no Ollama server answers"):
            await plugin.health()


@pytest.mark.promise("P32")
async def test_attach_never_installs(tmp_path: Path) -> None:
    async with plugin_in(tmp_path, server="attach") as plugin:
        assert not (await plugin.check()).installed
        assert "nothing to upgrade: no Ollama server answers" in await plugin.upgrade()
        with pytest.raises(UnavailableError, match="no Ollama server answers"):
            await plugin.install(cover=False)
        with pytest.raises(UnavailableError, match="no Ollama server answers") as caught:
            await plugin.start("auto")
        assert "engine install" not in str(caught.value)
        with pytest.raises(PreconditionError, match="no Ollama server answers"):
            await plugin.version()


async def test_invalid_ollama_host_is_reported(
    tmp_path: Path, shared_server: ContractServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "box:x")
    [port] = free_ports(1)
    monkeypatch.setattr(address, "DEFAULT_PORT", port)
    async with plugin_in(tmp_path) as plugin:
        expected = r"\(Connection refused; OLLAMA_HOST is ignored: 'box:x' .* 'x' is not a valid port\)\. Start it"
        with pytest.raises(UnavailableError, match=expected):
            await answer(plugin, "chat", messages=HELLO)
    monkeypatch.setattr(address, "DEFAULT_PORT", int(shared_server.address.rpartition(":")[2]))
    async with plugin_in(tmp_path) as plugin:
        detail = (await plugin.health()).detail
        assert (
            f"at {shared_server.url} (OLLAMA_HOST is ignored: 'box:x' is not a valid address: "
            "'x' is not a valid port)" in detail
        )


async def test_concurrent_calls_share_one_probe(plugin: Plugin, shared_server: ContractServer) -> None:
    await asyncio.gather(*(answer(plugin, "chat", messages=HELLO, max_tokens=1) for _ in range(8)))
    paths = [entry["path"] for entry in shared_server.requests()]
    assert paths.count("/") == 1
    assert paths.count("/api/chat") == 8


async def test_call_with_model_is_one_request(plugin: Plugin, shared_server: ContractServer) -> None:
    await answer(plugin, "chat", model="tiny-chat", messages=HELLO, max_tokens=1)
    shared_server.forget()
    await answer(plugin, "chat", model="tiny-chat", messages=HELLO, max_tokens=1)
    assert [entry["path"] for entry in shared_server.requests()] == ["/api/chat"]


async def test_too_old_server_is_reported_by_all_methods(alone: Plugin, contract_server: ContractServer) -> None:
    contract_server.be_version("0.3.12")
    for failing in (
        alone.start("auto"),
        alone.health(),
        alone.list_models(),
        answer(alone, "chat", messages=HELLO),
    ):
        with pytest.raises(PreconditionError, match=r"0\.3\.12 is too old; 0\.5\.0 or newer is needed"):
            await failing
    assert "0.3.12" in (await alone.check()).detail


async def test_mode_of_attached_server_has_no_effect(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedError, match="NPU"):
        await plugin.start("npu")
    caplog.set_level(logging.INFO)
    await plugin.start("gpu")
    assert "mode gpu has no effect" in caplog.text
    assert (await plugin.health()).state is HealthState.READY


# Models and calls


async def test_wrong_kind_of_model_is_rejected(plugin: Plugin) -> None:
    with pytest.raises(InvalidRequestError, match=r"embed:latest is a model for embed .*chat needs one for chat"):
        await answer(plugin, "chat", model="embed", messages=HELLO)
    with pytest.raises(InvalidRequestError, match=r"tiny-chat:latest is a model for chat"):
        await answer(plugin, "embed", model="tiny-chat", input="x")
    with pytest.raises(InvalidRequestError, match=r"speech-to-text needs one for chat that hears audio"):
        await answer(plugin, "speech-to-text", model="tiny-chat", audio="AAAA")


async def test_missing_and_deleted_models_are_reported(alone: Plugin, contract_server: ContractServer) -> None:
    with pytest.raises(ModelNotFoundError, match="PullModel nobody") as caught:
        await answer(alone, "chat", model="nobody", messages=HELLO)
    assert caught.value.pull == "nobody"
    await answer(alone, "chat", model="tools:7b", messages=HELLO, max_tokens=1)
    await asyncio.to_thread(contract_server.ask, "DELETE", "/api/delete", {"model": "tools:7b"})
    for _ in range(2):
        with pytest.raises(ModelNotFoundError) as caught:
            await answer(alone, "chat", model="tools:7b", messages=HELLO)
        assert caught.value.pull == "tools:7b"


async def test_unsupported_services_are_rejected(plugin: Plugin) -> None:
    assert plugin.engine.services == {"chat", "generate", "embed", "speech-to-text", "speech-to-text-ws"}
    with pytest.raises(UnsupportedError, match="embed does not stream with Ollama"):
        async with plugin.engine.stream("embed", {"model": "embed", "input": "x"}):
            raise AssertionError
    with pytest.raises(UnsupportedError, match="chat is not bidirectional"):
        async with plugin.engine.converse("chat", None, ""):  # type: ignore[arg-type]  # it is not looked at
            raise AssertionError


@pytest.mark.parametrize("native", [False, True])
async def test_streams_in_both_formats(shared_server: ContractServer, tmp_path: Path, *, native: bool) -> None:
    request = {"messages": HELLO, "max_tokens": 4, "options": {"num_predict": 4}}
    if native:
        del request["max_tokens"]
    async with (
        plugin_in(tmp_path, engine_host=shared_server.url, native=native) as plugin,
        plugin.stream("chat", json.dumps({**request, "stream": True}).encode()) as chunks,
    ):
        blocks = b"".join([chunk async for chunk in chunks]).decode()
    events = [event.removeprefix("data: ") for event in blocks.split("\n\n") if event]
    assert blocks.endswith("\n\n")
    if native:
        assert json.loads(events[-1])["done"] is True
        assert json.loads(events[0])["message"]["role"] == "assistant"
    else:
        assert events[-1] == "[DONE]"
        assert json.loads(events[0])["object"] == "chat.completion.chunk"


@pytest.mark.promise("F23")
async def test_closed_stream_stops_the_servers_work(alone: Plugin, contract_server: ContractServer) -> None:
    contract_server.add("fault-endless:latest")
    request = json.dumps({"model": "fault-endless", "messages": HELLO}).encode()
    async with alone.stream("chat", request) as chunks:
        await anext(aiter(chunks))
    await contract_server.wait("/api/chat", state="left")


async def test_model_in_use_is_not_deleted(alone: Plugin, contract_server: ContractServer) -> None:
    contract_server.add("fault-endless:latest")
    request = json.dumps({"model": "fault-endless", "messages": HELLO}).encode()
    async with alone.stream("chat", request) as chunks:
        await anext(aiter(chunks))
        with pytest.raises(ModelInUseError, match="is answering 1 requests"):
            await alone.delete_model("fault-endless")
    await alone.delete_model("fault-endless")
    assert "fault-endless:latest" not in contract_server.names()


@pytest.mark.promise("P5", "P32")
async def test_stop_ends_streams_and_pulls_but_not_the_server(alone: Plugin, contract_server: ContractServer) -> None:
    from engine_plugin.models.request import PullRequest

    contract_server.add("fault-endless:latest")

    async def chat() -> None:
        request = json.dumps({"model": "fault-endless", "messages": HELLO}).encode()
        async with alone.stream("chat", request) as chunks:
            async for _ in chunks:
                pass

    async def pull() -> None:
        await pulled(alone, PullRequest("fault-pull-gated"))

    working = [asyncio.create_task(chat()), asyncio.create_task(pull())]
    try:
        await contract_server.wait("/api/chat")
        await contract_server.wait("/api/pull")
        await alone.stop()
        ended = await asyncio.wait_for(asyncio.gather(*working, return_exceptions=True), LIMIT)
    finally:
        for task in working:
            task.cancel()
    assert all(isinstance(error, UnavailableError) for error in ended), ended
    await contract_server.wait("/api/pull", state="left")
    await contract_server.wait("/api/chat", state="left")
    assert contract_server.process.poll() is None
