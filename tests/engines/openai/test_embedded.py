"""All services with the embedded server as attached server, with samples, a key and TCP."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from engine_plugin.engines.openai.engine import OpenAIEngine
from engine_plugin.errors import ModelNotFoundError
from engine_plugin.messages import ConversationMessage
from engine_plugin.plugin import Plugin
from tests.engines.openai.conftest import manifest_of
from tests.engines.openai.test_servers import HELLO, call, models, streamed
from tests.openvino_server.embedded import embedded_server
from tests.patience import LIMIT
from tests.speech.sounds import speech

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytest.importorskip("openvino_genai")

MODELS = ("tiny-chat", "tiny-embed", "tiny-rerank", "tiny-image", "tiny-transcribe", "tiny-speak")
KEY = "only-for-this-test"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[int]:
    """The server with all samples loaded."""
    async with embedded_server(tmp_path_factory.mktemp("served"), MODELS, KEY) as address:
        yield int(address.rpartition(":")[2])


@pytest.fixture
async def plugin(port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Plugin]:
    """An attached plugin, whose base URL does not contain /v3."""
    monkeypatch.setenv("THE_KEY", KEY)
    options = {"key_variable": "THE_KEY", "send_key": "always", "base_url": f"127.0.0.1:{port}"}
    engine = OpenAIEngine(manifest_of(tmp_path / "p", **options))
    attached = Plugin(engine.manifest, engine)
    try:
        yield attached
    finally:
        await attached.aclose()


async def test_embedded_server_is_identified(plugin: Plugin, port: int) -> None:
    await plugin.start("")
    assert f"http://127.0.0.1:{port}/v3 serves 6 models" in (await plugin.health()).detail
    assert {name: model.kind for name, model in (await models(plugin)).items()} == {
        "tiny-chat": "chat",
        "tiny-embed": "embed",
        "tiny-rerank": "rerank",
        "tiny-image": "text-to-image",
        "tiny-transcribe": "speech-to-text",
        "tiny-speak": "text-to-speech",
    }
    assert len(await plugin.running_models()) == 6


async def test_models_have_kind_and_context(plugin: Plugin) -> None:
    found = {name: model.capabilities for name, model in (await models(plugin)).items()}
    assert (found["tiny-chat"].context_length, found["tiny-chat"].context_source) == (1024, "engine")
    assert "completion" in found["tiny-chat"].features
    assert found["tiny-image"].context_length == 0
    assert {name: list(found[name].features) for name in found if name != "tiny-chat"} == {
        "tiny-embed": ["embedding"],
        "tiny-rerank": ["rerank"],
        "tiny-image": ["image"],
        "tiny-transcribe": ["transcription"],
        "tiny-speak": ["speech"],
    }


async def test_chat_answers(plugin: Plugin) -> None:
    answer = await call(plugin, "chat", **HELLO)
    text = answer["choices"][0]["message"]["content"]
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny-chat")
    told = await streamed(plugin, "chat", **HELLO, stream_options={"include_usage": True})
    pieces = [choice["delta"].get("content") or "" for event in told for choice in event["choices"]]
    assert "".join(pieces) == text
    assert told[-1]["usage"]["completion_tokens"] == answer["usage"]["completion_tokens"]


async def test_generate_answers(plugin: Plugin) -> None:
    answer = await call(plugin, "generate", prompt=["a", "b"], max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert len(await streamed(plugin, "generate", prompt="a", max_tokens=3)) > 1


async def test_embed_answers(plugin: Plugin) -> None:
    answer = await call(plugin, "embed", input=["a", "b"])
    assert [len(entry["embedding"]) for entry in answer["data"]] == [32, 32]


async def test_rerank_answers(plugin: Plugin) -> None:
    request = {"query": "a", "documents": ["b", {"text": "c"}, "d"], "top_n": 2, "return_documents": True}
    results = (await call(plugin, "rerank", **request))["results"]
    scores = [result["relevance_score"] for result in results]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    assert {result["document"]["text"] for result in results} <= {"b", "c", "d"}


async def test_text_to_image_answers(plugin: Plugin) -> None:
    answer = await call(plugin, "text-to-image", prompt="a", size="64*32", num_inference_steps=1, seed=5)
    assert base64.b64decode(answer["data"][0]["b64_json"]).startswith(b"\x89PNG")


async def test_generated_speech_is_transcribed(plugin: Plugin) -> None:
    said = await call(plugin, "text-to-speech", text="hello")
    heard = await call(plugin, "speech-to-text", audio=said["audio"], response_format="verbose_json")
    assert heard["duration"] == pytest.approx(said["duration"], abs=0.1)
    assert isinstance(heard["segments"], list)


async def test_live_stream_is_transcribed(plugin: Plugin) -> None:
    async def messages() -> AsyncIterator[ConversationMessage]:
        yield ConversationMessage(speech(1.5), "binary", {"format": "pcm", "sample_rate": "16000"})
        yield ConversationMessage(b'{"action": "finish-task"}')

    async with asyncio.timeout(LIMIT), plugin.converse("speech-to-text-ws", messages()) as answers:
        told = [json.loads(answer.data)["header"]["event"] async for answer in answers]
    assert (told[0], told[-1]) == ("task-started", "task-finished")


@pytest.mark.parametrize(
    ("service", "request_"), [("chat", HELLO), ("embed", {"input": "a"}), ("text-to-speech", {"text": "a"})]
)
async def test_missing_model_is_reported(plugin: Plugin, service: str, request_: dict[str, Any]) -> None:
    with pytest.raises(ModelNotFoundError, match=r"tiny-chats'.* Did you mean tiny-chat"):
        await call(plugin, service, **request_, model="tiny-chats")
    assert "model" in await call(plugin, "embed", input="a")
