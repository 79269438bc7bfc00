"""speech-to-text with audio models, by OpenAI's path /v1/audio/transcriptions, which Ollama has since 0.20."""

from __future__ import annotations

import base64
import binascii
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import UnavailableError, UnsupportedError
from engine_plugin.speech.containers import container_of
from engine_plugin.speech.services import Dialect, SpeechServices
from engine_plugin.system.data_urls import base64_start
from engine_plugin.transport.posting import PostingClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.models import ModelFacts
    from engine_plugin.messages import BidiMessage
    from engine_plugin.speech.decoder import Decoder
    from engine_plugin.speech.options import LiveOptions
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["converse", "transcribe"]

_PATHS = {"transcribe": "/v1/audio/transcriptions"}
_ORIGINAL = Dialect(_PATHS, original=True)
_AS_WAV = Dialect(_PATHS)
_NO_VOICES = Path()
_BASE64_OF_18_BYTES = 24


class _AudioClient(PostingClient):
    """The client for `SpeechServices`. `served` is set while a call uses a model: its client and its facts."""

    def __init__(self, served: tuple[OllamaClient, ModelFacts] | None = None) -> None:
        self.served = served

    def _posted(self, path: str, body: bytes, content_type: str) -> AbstractAsyncContextManager[HttpResponse]:
        if self.served is None:
            raise UnavailableError("no Ollama server is in use")
        client, facts = self.served
        return client.request("POST", path, body, content_type, model=facts.name)


async def transcribe(client: OllamaClient, request: dict[str, Any], facts: ModelFacts, decoder: Decoder) -> bytes:
    """Answer a speech-to-text request. WAV and MP3 are sent unchanged, other formats are converted to WAV first.

    Raises UnsupportedError for translation.
    """
    if (request.get("task") or "transcribe") != "transcribe":
        raise UnsupportedError("task: Ollama does not translate; leave task out")
    dialect = _ORIGINAL if _server_reads(request["audio"]) else _AS_WAV
    speech = SpeechServices(lambda: _AudioClient((client, facts)), dialect, decoder, _NO_VOICES)
    return await speech.transcribe(facts.name, request)


def _server_reads(audio: str) -> bool:
    """Whether a recording, in base64 or a data: URL, is WAV or MP3. Invalid base64 is reported when it is decoded."""
    try:
        start = base64_start(audio)
        head = base64.b64decode(audio[start : start + _BASE64_OF_18_BYTES])
    except (binascii.Error, ValueError):
        return False
    return container_of(head) in ("wav", "mp3")


@asynccontextmanager
async def converse(
    use_model: Callable[[str], AbstractAsyncContextManager[tuple[OllamaClient, ModelFacts]]],
    default_model: str,
    messages: AsyncIterator[BidiMessage],
    decoder: Decoder,
    live: LiveOptions | None = None,
) -> AsyncIterator[AsyncIterator[BidiMessage]]:
    """Answer live transcription;

    see `SpeechServices.converse`. `use_model` yields the client and the facts of a named model.
    """
    server = _AudioClient()

    @asynccontextmanager
    async def served(name: str) -> AsyncIterator[str]:
        async with use_model(name) as held:
            server.served = held
            try:
                yield held[1].name
            finally:
                server.served = None

    async with SpeechServices(lambda: server, _AS_WAV, decoder, _NO_VOICES, live).converse(
        served, default_model, messages
    ) as answers:
        yield answers
