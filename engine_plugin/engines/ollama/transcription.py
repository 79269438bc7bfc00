"""speech-to-text with audio models, by OpenAI's path /v1/audio/transcriptions, which Ollama has since 0.20."""

from __future__ import annotations

import base64
import binascii
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import UnsupportedError
from engine_plugin.speech.containers import container_of
from engine_plugin.speech.services import SpeechServices
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

_NO_VOICES = Path()
_BASE64_OF_18_BYTES = 24


class _AudioClient(PostingClient):
    """The client of a server for requests that name one model."""

    def __init__(self, client: OllamaClient, model: str) -> None:
        self._client = client
        self._model = model

    def _posted(self, path: str, body: bytes, content_type: str) -> AbstractAsyncContextManager[HttpResponse]:
        return self._client.request("POST", path, body, content_type, model=self._model)


async def transcribe(client: OllamaClient, request: dict[str, Any], facts: ModelFacts, decoder: Decoder) -> bytes:
    """Answer a speech-to-text request. WAV and MP3 are sent unchanged, other formats are converted to WAV first.

    Raises UnsupportedError for translation.
    """
    if (request.get("task") or "transcribe") != "transcribe":
        raise UnsupportedError("task: Ollama does not translate; leave task out")
    speech, original = SpeechServices("/v1", decoder, _NO_VOICES), _server_reads(request["audio"])
    return await speech.transcribe(_AudioClient(client, facts.name), facts.name, request, original=original)


def _server_reads(audio: str) -> bool:
    """Whether a recording, in base64 or a data: URL, is WAV or MP3. Invalid base64 is reported when it is decoded."""
    try:
        start = base64_start(audio)
        head = base64.b64decode(audio[start : start + _BASE64_OF_18_BYTES])
    except (binascii.Error, ValueError):
        return False
    return container_of(head) in ("wav", "mp3")


def converse(
    use_model: Callable[[str], AbstractAsyncContextManager[tuple[OllamaClient, ModelFacts]]],
    default_model: str,
    messages: AsyncIterator[BidiMessage],
    decoder: Decoder,
    live: LiveOptions | None = None,
) -> AbstractAsyncContextManager[AsyncIterator[BidiMessage]]:
    """Answer live transcription (see `SpeechServices.converse`).

    `use_model` yields the client and the facts of a named model.
    """

    @asynccontextmanager
    async def use(name: str) -> AsyncIterator[tuple[PostingClient, str]]:
        async with use_model(name) as (client, facts):
            yield _AudioClient(client, facts.name), facts.name

    return SpeechServices("/v1", decoder, _NO_VOICES, live).converse(use, default_model, messages)
