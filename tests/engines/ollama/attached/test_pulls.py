"""Pulls: by the server, as a copy, and of local files."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest

from engine_plugin.download.events import ChunkProgress, PullEvent, StepStarted, Success
from engine_plugin.engines.ollama.models import ServerModels
from engine_plugin.engines.ollama.options import OllamaOptions
from engine_plugin.engines.ollama.pulls import Pulls
from engine_plugin.engines.ollama.references import References
from engine_plugin.errors import (
    AuthError,
    DownloadError,
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    PreconditionError,
    PullError,
    UnavailableError,
)
from engine_plugin.models.request import PullRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from engine_plugin.engines.ollama.client import OllamaClient
    from tests.engines.ollama.contract.handle import ContractServer


@pytest.fixture
async def pulls() -> AsyncIterator[Pulls]:
    found = Pulls(ServerModels(OllamaOptions()))
    yield found
    await found.aclose()


async def events_of(pulls: Pulls, client: OllamaClient, request: PullRequest) -> list[PullEvent]:
    async with aclosing(pulls.pull(client, request)) as events:
        return [event async for event in events]


async def test_pull_reports_steps_layers_and_result(
    pulls: Pulls, attached: OllamaClient, contract_server: ContractServer
) -> None:
    events = await events_of(pulls, attached, PullRequest("fresh"))
    statuses = [event.text for event in events if isinstance(event, StepStarted)]
    assert statuses == ["pulling manifest", "verifying sha256 digest", "writing manifest"]
    layers: dict[str, ChunkProgress] = {}
    for event in events:
        if isinstance(event, ChunkProgress):
            assert event.digest not in layers or event.completed >= layers[event.digest].completed
            layers[event.digest] = event
    assert [(layer.completed, layer.total) for layer in layers.values()] == [
        (size, size) for size in (40_000_000, 8_000_000, 1_500, 480)
    ]
    last = events[-1]
    assert isinstance(last, Success)
    assert (last.model, last.size) == ("fresh:latest", 48_001_980)
    assert last.digest.startswith("sha256:")
    assert "fresh:latest" in contract_server.names()
    assert contract_server.bodies("/api/pull") == [{"model": "fresh", "insecure": False, "stream": True}]


async def test_pull_of_present_layers_reports_no_chunks(pulls: Pulls, shared_client: OllamaClient) -> None:
    events = await events_of(pulls, shared_client, PullRequest("fault-pull-quiet"))
    assert not any(isinstance(event, ChunkProgress) for event in events)
    assert isinstance(events[-1], Success)


@pytest.mark.promise("H3")
@pytest.mark.parametrize("form", ["path", "file URL"])
async def test_model_is_found_by_the_path_it_was_pulled_from(
    attached: OllamaClient, contract_server: ContractServer, tmp_path: Path, form: str
) -> None:
    models = ServerModels(OllamaOptions(), References(tmp_path / "references.json"))
    pulls = Pulls(models)
    path = tmp_path / "mine.gguf"
    path.write_bytes(BYTES)
    reference = path.as_uri() if form == "file URL" else str(path)
    try:
        await events_of(pulls, attached, PullRequest(reference))
    finally:
        await pulls.aclose()
    for known in (models, ServerModels(OllamaOptions(), References(tmp_path / "references.json"))):
        assert (await known.get(attached, reference)).name == "mine:latest"
    [listed] = [model for model in await models.all(attached) if model.name == "mine:latest"]
    assert listed.references == (reference,)
    await models.load(attached, reference)
    await models.unload(attached, reference, 5)
    await models.delete(attached, reference)
    assert "mine:latest" not in contract_server.names()
    with pytest.raises(ModelNotFoundError):
        await models.get(attached, reference)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nobody-has-this", ModelNotFoundError, "https://ollama.com/search"),
        ("fault-pull-breaks", PullError, "max retries exceeded: unexpected EOF"),
        ("fault-pull-no-success", PullError, "stopped pulling fault-pull-no-success without an error"),
        ("fault-pull-cut", PullError, "failed: the Ollama at http://.* broke off.*Pull it again"),
        ("fault-pull-digest", PullError, "is corrupt.*digest mismatch"),
        ("fault-pull-disk", PullError, "disk of the Ollama server is full.*DeleteModel"),
        ("fault-pull-unauthorized", PullError, "ollama signin"),
        ("fault-sign-in", AuthError, "Open https://ollama.com/connect"),
        ("fault-forbidden", PreconditionError, "OLLAMA_NO_CLOUD"),
        ("fault-busy", UnavailableError, "busy"),
        ("fault-crashed", PullError, "failed: model runner has unexpectedly stopped"),
        ("not a name", InvalidRequestError, "model: 'not a name': invalid model name"),
    ],
)
async def test_failed_pull_has_a_next_step(
    pulls: Pulls, shared_client: OllamaClient, name: str, error: type[EnginePluginError], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){message}") as caught:
        await events_of(pulls, shared_client, PullRequest(name))
    assert type(caught.value) is error
    if isinstance(caught.value, ModelNotFoundError):
        assert caught.value.pull == "", "the error suggests no other pull"
    assert isinstance((await events_of(pulls, shared_client, PullRequest("fresh:1b")))[-1], Success), (
        "no pull is left running"
    )


async def test_unreachable_registry_names_the_servers_network(
    pulls: Pulls, shared_client: OllamaClient, shared_server: ContractServer
) -> None:
    shared_server.fail("gateway", path="/api/pull")
    with pytest.raises(DownloadError, match=r"cannot connect.*no such host.*network.*of the Ollama server"):
        await events_of(pulls, shared_client, PullRequest("fresh"))


@pytest.mark.promise("P17")
async def test_concurrent_pulls_share_one_request(
    pulls: Pulls, attached: OllamaClient, contract_server: ContractServer
) -> None:
    both = await asyncio.gather(
        events_of(pulls, attached, PullRequest("fresh")), events_of(pulls, attached, PullRequest("fresh"))
    )
    assert all(isinstance(events[-1], Success) for events in both)
    assert len(contract_server.requests("/api/pull")) == 1


@pytest.mark.promise("P17")
async def test_pull_ends_when_its_last_watcher_leaves(
    pulls: Pulls, attached: OllamaClient, contract_server: ContractServer
) -> None:
    first = pulls.pull(attached, PullRequest("fault-pull-gated"))
    second = pulls.pull(attached, PullRequest("fault-pull-gated"))
    assert await anext(first) == await anext(second) == StepStarted("pulling manifest")
    await first.aclose()
    assert [entry["state"] for entry in contract_server.requests("/api/pull")] == ["open"]
    await second.aclose()
    await contract_server.wait("/api/pull", state="left")
    assert isinstance((await events_of(pulls, attached, PullRequest("fresh")))[-1], Success)


async def test_pull_from_another_source_is_refused_meanwhile(pulls: Pulls, shared_client: OllamaClient) -> None:
    first = pulls.pull(shared_client, PullRequest("fault-pull-gated"))
    try:
        await anext(first)
        with pytest.raises(PreconditionError, match="is being pulled now from another source"):
            await events_of(pulls, shared_client, PullRequest("fault-pull-gated", source="model:tiny-chat"))
    finally:
        await first.aclose()


async def test_wrong_sha256_of_a_pull_fails(pulls: Pulls, shared_client: OllamaClient) -> None:
    with pytest.raises(DownloadError, match="expected sha256:0000"):
        await events_of(pulls, shared_client, PullRequest("fresh", sha256="0" * 64))


async def test_copy(pulls: Pulls, shared_client: OllamaClient, shared_server: ContractServer) -> None:
    [status, done] = await events_of(pulls, shared_client, PullRequest("mine", source="model:tiny-chat"))
    assert status == StepStarted("copying tiny-chat:latest")
    assert isinstance(done, Success)
    assert done.model == "mine:latest"
    assert {"mine:latest", "tiny-chat:latest"} <= set(shared_server.names())
    with pytest.raises(ModelNotFoundError, match="nobody"):
        await events_of(pulls, shared_client, PullRequest("mine", source="model:nobody"))


# Local files

BYTES = b"GGUF" + bytes(range(256)) * 40_000


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "Some Model.gguf"
    path.write_bytes(BYTES)
    return path


async def test_gguf_file_is_uploaded_and_created(
    pulls: Pulls, shared_client: OllamaClient, shared_server: ContractServer, gguf: Path
) -> None:
    digest = hashlib.sha256(BYTES).hexdigest()
    size = len(BYTES)
    events = await events_of(pulls, shared_client, PullRequest("own", source=str(gguf), sha256=digest))
    assert events[0] == StepStarted("reading Some Model.gguf")
    assert ChunkProgress(f"sha256:{digest}", size, size) in events
    assert isinstance(events[-1], Success)
    assert "own:latest" in shared_server.names()
    [create] = shared_server.bodies("/api/create")
    assert create == {"model": "own", "files": {"Some Model.gguf": f"sha256:{digest}"}, "stream": True}
    assert len(shared_server.requests(f"/api/blobs/sha256:{digest}", method="POST")) == 1

    again = await events_of(pulls, shared_client, PullRequest("twin", source=gguf.as_uri()))
    assert not any(isinstance(event, ChunkProgress) for event in again), "the server has the file already"
    assert isinstance(again[-1], Success)


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (PullRequest("own", source="/nowhere/x.gguf"), ModelNotFoundError, "does not exist"),
        (PullRequest("own", source="llama3.2"), InvalidRequestError, "is not a source that Ollama can pull"),
        (PullRequest("https://example.com/x.gguf"), InvalidRequestError, "is not a source that Ollama can pull"),
        (PullRequest("own", source="model:"), InvalidRequestError, "the name of a model"),
        (PullRequest(""), InvalidRequestError, "model: must be a string that is not empty"),
        (PullRequest("fresh", model_type="levitate"), InvalidRequestError, "model_type"),
        (PullRequest("fresh", sha256="abc"), InvalidRequestError, "sha256"),
        (PullRequest("fresh", username="me", password="x"), InvalidRequestError, "^username: .*`ollama signin`"),
    ],
)
async def test_invalid_pull_requests_are_rejected(
    pulls: Pulls, shared_client: OllamaClient, request_: PullRequest, error: type[EnginePluginError], message: str
) -> None:
    with pytest.raises(error, match=message):
        await events_of(pulls, shared_client, request_)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 and much more"])
async def test_file_that_is_not_gguf_is_not_sent(
    pulls: Pulls, shared_client: OllamaClient, shared_server: ContractServer, gguf: Path, content: bytes
) -> None:
    await asyncio.to_thread(gguf.write_bytes, content)
    with pytest.raises(InvalidRequestError, match="is not a GGUF file: it begins with"):
        await events_of(pulls, shared_client, PullRequest("own", source=str(gguf)))
    assert not [entry for entry in shared_server.requests() if entry["path"].startswith("/api/blobs")]


@pytest.mark.promise("P18")
async def test_file_with_wrong_sha256_is_not_sent(
    pulls: Pulls, shared_client: OllamaClient, shared_server: ContractServer, gguf: Path
) -> None:
    with pytest.raises(DownloadError, match="expected sha256:0000"):
        await events_of(pulls, shared_client, PullRequest("own", source=str(gguf), sha256="0" * 64))
    assert not shared_server.requests("/api/create")


@pytest.mark.promise("S8")
async def test_part_of_split_model_is_refused_with_the_merge_command(
    pulls: Pulls, shared_client: OllamaClient, tmp_path: Path
) -> None:
    path = tmp_path / "big-00002-of-00003.gguf"
    await asyncio.to_thread(path.write_bytes, b"GGUF")
    with pytest.raises(InvalidRequestError, match=r"--merge FIRST-PART big\.gguf"):
        await events_of(pulls, shared_client, PullRequest("own", source=str(path)))


@pytest.mark.promise("L6")
async def test_offline_environment_refuses_pulls_from_hugging_face(
    pulls: Pulls, shared_client: OllamaClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(PreconditionError, match="HF_HUB_OFFLINE=1"):
        await events_of(pulls, shared_client, PullRequest("hf.co/owner/name"))
