"""speech-to-text: recordings sent unchanged or as WAV, and live transcription."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.ollama.client import OllamaClient
from engine_plugin.engines.ollama.exchange import Exchange
from engine_plugin.errors import InvalidRequestError, ModelNotFoundError, UnavailableError, UnsupportedError
from engine_plugin.messages import ConversationMessage
from engine_plugin.speech.decoder import Decoder
from engine_plugin.speech.services import SpeechServices
from engine_plugin.transport.http1 import Http1Client
from tests.patience import LIMIT
from tests.speech.sounds import encoded, silence, speech, wav

from .shapes import facts_of, no_replacement

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from engine_plugin.engines.ollama.models import ModelFacts
    from tests.engines.ollama.contract.handle import ContractServer

    from .conftest import ServiceClient

SAMPLES = silence(1.6)
RECORDING = base64.b64encode(wav(SAMPLES)).decode()
AUDIO = facts_of("audio:latest", "completion", "audio")
PATH = "/v1/audio/transcriptions"
SPEECH = SpeechServices("/v1", Decoder(None, {}), Path())


async def answer(client: OllamaClient, request: dict[str, Any], facts: ModelFacts) -> bytes:
    return await Exchange(client, "speech-to-text", facts, no_replacement).transcribe(SPEECH, request)


async def transcribed(ask: ServiceClient, audio: str, **more: Any) -> dict[str, Any]:
    request = {"model": "audio:latest", "audio": audio, **more}
    shape: dict[str, Any] = json.loads(await answer(ask.client, request, AUDIO))
    return shape


@pytest.mark.parametrize("audio", [RECORDING, f"data:audio/wav;base64,{RECORDING}"])
async def test_wav_is_sent_unchanged(ask: ServiceClient, server: ContractServer, audio: str) -> None:
    got = await transcribed(ask, audio, language="en")
    assert got["text"] == f"I heard {len(wav(SAMPLES))} bytes in en"
    assert got["segments"] == [{"id": 0, "start": 0.0, "end": 1.6, "text": got["text"]}]
    assert server.bodies(PATH)[-1]["model"] == "audio:latest"
    subtitles = await transcribed(ask, audio, response_format="srt")
    assert subtitles["text"].startswith("1\n00:00:00,000 --> 00:00:01,600\nI heard")


async def test_other_formats_are_sent_as_wav(ask: ServiceClient) -> None:
    pytest.importorskip("av")
    flac = base64.b64encode(encoded("flac", "flac", SAMPLES)).decode()
    assert (await transcribed(ask, flac))["text"] == f"I heard {len(wav(SAMPLES))} bytes"


async def test_mp3_is_sent_unchanged(ask: ServiceClient) -> None:
    mp3 = b"ID3\x04" + bytes(996)
    got = await transcribed(ask, base64.b64encode(mp3).decode())
    assert got["text"] == "I heard 1000 bytes"


async def test_unusable_recordings_are_rejected(ask: ServiceClient) -> None:
    with pytest.raises(UnsupportedError, match="task: Ollama does not translate"):
        await transcribed(ask, RECORDING, task="translate")
    with pytest.raises(InvalidRequestError, match="audio: "):
        await transcribed(ask, "!!!")
    request = {"model": "missing:latest", "audio": RECORDING}
    with pytest.raises(ModelNotFoundError):
        await answer(ask.client, request, facts_of("missing:latest"))


async def test_server_without_transcription_needs_an_upgrade(ask: ServiceClient) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 18\r\n\r\n404 page not found")
        await writer.drain()
        writer.close()

    old = await asyncio.start_server(refuse, "127.0.0.1", 0)
    http = Http1Client(old.sockets[0].getsockname()[:2])
    try:
        request = {"model": "audio:latest", "audio": RECORDING}
        with pytest.raises(UnsupportedError, match="Upgrade it"):
            await answer(OllamaClient(http), request, AUDIO)
    finally:
        http.close()
        old.close()
        await old.wait_closed()


# Live


class LiveSession:
    """One live session: raw samples in, events out. Counts the uses of the model."""

    def __init__(self, ask: ServiceClient) -> None:
        self._ask = ask
        self.held = 0

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[tuple[Exchange, str]]:
        if name != "audio":
            raise UnavailableError(f"{name} is not here")
        self.held += 1
        try:
            yield Exchange(self._ask.client, "speech-to-text-ws", AUDIO, no_replacement), AUDIO.name
        finally:
            self.held -= 1

    async def _messages(self, model: str) -> AsyncGenerator[ConversationMessage, None]:
        metadata = {"format": "pcm", "model": model, "language": "en"}
        yield ConversationMessage(speech(1.2) + silence(1.0), "binary", metadata)
        yield ConversationMessage(b'{"action": "finish-task"}')

    async def events(self, model: str) -> AsyncGenerator[dict[str, Any], None]:
        async with (
            asyncio.timeout(LIMIT),
            aclosing(self._messages(model)) as messages,
            SPEECH.converse(self.use, "", messages) as answers,
        ):
            async for answer in answers:
                yield json.loads(answer.data)


async def test_live_transcription(ask: ServiceClient) -> None:
    talk = LiveSession(ask)
    events = [event async for event in talk.events("audio")]
    kinds = [event["header"]["event"] for event in events]
    assert (kinds[0], kinds[-1]) == ("task-started", "task-finished")
    sentences = [event["payload"]["output"]["sentence"] for event in events[1:-1]]
    assert sentences[-1]["is_final"]
    assert sentences[-1]["text"].startswith("I heard ")
    assert talk.held == 0


async def test_live_transcription_with_missing_model_fails(ask: ServiceClient) -> None:
    received: list[str] = []
    try:
        async for event in LiveSession(ask).events("other"):
            received.append(event["header"]["event"])  # noqa: PERF401  # those before the error count
    except UnavailableError:
        assert received == ["task-failed"]
        return
    raise AssertionError("the session ended without an error")
