"""speech-to-text with audio models, by OpenAI's path /v1/audio/transcriptions, which Ollama has since 0.20."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import UnsupportedError
from engine_plugin.speech.containers import container_of
from engine_plugin.system.data_urls import base64_start

if TYPE_CHECKING:
    from engine_plugin.speech.services import SpeechServices
    from engine_plugin.transport.posting import PostingClient

__all__ = ["transcribe"]

_BASE64_OF_18_BYTES = 24


async def transcribe(speech: SpeechServices, client: PostingClient, model: str, request: dict[str, Any]) -> bytes:
    """Answer a speech-to-text request. WAV and MP3 are sent unchanged, other formats are converted to WAV first.

    Raises UnsupportedError for translation.
    """
    if (request.get("task") or "transcribe") != "transcribe":
        raise UnsupportedError("task: Ollama does not translate; leave task out")
    return await speech.transcribe(client, model, request, original=_server_reads(request["audio"]))


def _server_reads(audio: str) -> bool:
    """Whether a recording, in base64 or a data: URL, is WAV or MP3. Invalid base64 is reported when it is decoded."""
    try:
        start = base64_start(audio)
        head = base64.b64decode(audio[start : start + _BASE64_OF_18_BYTES])
    except (binascii.Error, ValueError):
        return False
    return container_of(head) in ("wav", "mp3")
