"""The speech services on any server with OpenAI's audio endpoints: speech-to-text, also live, and text-to-speech.

The engine loads the model and has the client of its server; this module handles the audio.
"""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from contextlib import aclosing, suppress
from math import isfinite
from typing import TYPE_CHECKING, Any

from engine_plugin.deadlines import deadline
from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError
from engine_plugin.jsontext import answer_object, write_json
from engine_plugin.speech import containers, pcm
from engine_plugin.speech.base64_audio import decode_base64_audio
from engine_plugin.speech.decoder import RAW
from engine_plugin.speech.live import transcribe_live
from engine_plugin.speech.live_task import LiveTask
from engine_plugin.speech.options import LiveOptions
from engine_plugin.speech.subtitles import Segment, format_transcription
from engine_plugin.system.files import in_thread, private_folder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from engine_plugin.messages import ConversationMessage
    from engine_plugin.speech.decoder import Decoder
    from engine_plugin.transport.posting import PostingClient

__all__ = ["MAX_FILES", "SpeechServices"]

MAX_FILES = 100
"""How many generated files are kept, the newest ones. Only files named `speech-<UTC time>-<random>.wav` count."""

_ENDPOINTS = {"transcribe": "transcriptions", "translate": "translations"}
_TEXT_LIMIT = 64 * 1024 * 1024
_SOUND_LIMIT = 512 * 1024 * 1024
_SHORTEST = pcm.BYTES_A_SECOND // 10  # models fail on shorter audio
_STALE = 3600.0
_SAVING = threading.Lock()  # two calls at once would each delete the other's newest file

_BASE_TIMEOUT = 60.0
"""Seconds that a transcription may take in addition to the length of the recording."""
_SLOWEST = 500
"""Bytes per second assumed for a recording of unknown length; speech codecs produce more."""


class SpeechServices:
    """The speech services on servers with OpenAI's audio endpoints below `prefix` (`/v3`). Used from one event loop.

    The engine rejects requests for which its server has no endpoint. `output` is the folder of the generated files,
    created on first use for this user only.
    """

    def __init__(
        self, prefix: str, decoder: Decoder, output: Path, live: LiveOptions | None = None, max_files: int = MAX_FILES
    ) -> None:
        self._prefix = prefix
        self._decoder = decoder
        self._output = output
        self._live = live or LiveOptions()
        self._max_files = max_files

    # Speech to text

    async def transcribe(
        self, client: PostingClient, model: str, request: dict[str, Any], *, original: bool = False
    ) -> bytes:
        """Answer a speech-to-text request with a loaded model. Errors name the field.

        `original`: send the recording unchanged; otherwise it is converted to WAV of 16 kHz mono s16le.
        """
        audio = await decode_base64_audio(request["audio"])
        if original:
            plain, is_cut_off = None, await in_thread(containers.is_cut_off, audio)
            most = min(len(audio) / _SLOWEST, self._decoder.longest)
        else:
            plain, is_cut_off = await self._decoder.decode(audio)
            most = pcm.seconds(len(plain))
        task = request.get("task") or "transcribe"
        words = "word" in (request.get("timestamp_granularities") or ())
        fields = _form_fields(model, request, words=words)
        if task != "transcribe":
            fields["task"] = task
        async with deadline(_BASE_TIMEOUT + most, "speech-to-text", "Try again, or send the recording in parts"):
            if plain is not None:
                result = await self._post_samples(client, task, fields, plain)
            else:
                name = containers.container_of(audio[: containers.HEAD]) or "mp3"
                result = await self._post(client, task, fields, audio, f"audio.{name}")
                plain = pcm.native_samples(audio)
        duration = _duration(result) if plain is None else pcm.seconds(len(plain))
        segments = _segments(result, duration)
        more: dict[str, Any] = {
            "task": task,
            "language": str(result.get("language") or request.get("language") or ""),
            "duration": round(duration, 3),
        }
        if words:
            more["words"] = result.get("words") or []
        text = str(result.get("text") or "").strip()
        response_format = request.get("response_format") or "json"
        shape = format_transcription(response_format, request["model"], text, segments, more)
        if is_cut_off:
            shape["truncated"] = True
        return write_json(shape)

    async def _post_samples(
        self, client: PostingClient, task: str, fields: dict[str, str], samples: bytes
    ) -> dict[str, Any]:
        padded = samples + bytes(max(0, _SHORTEST - len(samples)))
        return await self._post(client, task, fields, pcm.wav_header(len(padded)) + padded, "audio.wav")

    async def _post(
        self, client: PostingClient, task: str, fields: dict[str, str], file: bytes, name: str
    ) -> dict[str, Any]:
        path = f"{self._prefix}/audio/{_ENDPOINTS[task]}"
        async with client.post_form(path, fields, file, name) as response:
            data = await response.read(_TEXT_LIMIT)
        return answer_object(data, "the engine's transcription")

    # Text to speech

    async def speak(self, client: PostingClient, model: str, request: dict[str, Any]) -> bytes:
        """Answer a text-to-speech request with a WAV of s16le, in base64 and as a file in `output`."""
        asked = {name: request[name] for name in ("voice", "speed", "language") if request.get(name) is not None}
        text = request.get("text") or request.get("input")
        body = json.dumps({"model": model, "input": text, **asked, "response_format": "wav"}).encode()
        async with client.post_json(f"{self._prefix}/audio/speech", body) as response:
            data = await response.read(_SOUND_LIMIT)
        return await in_thread(self._speech_answer, request["model"], data)

    def _speech_answer(self, model: str, data: bytes) -> bytes:
        wave = pcm.read_wave(data)
        if not wave.samples:
            raise BadGatewayError("the engine generated no audio")
        wav = wave.to_bytes()
        try:
            path = self._save(wav)
        except OSError as error:
            raise EnginePluginError(
                f"{self._output}: cannot write the audio file: {error.strerror or error}"
            ) from error
        shape = {
            "url": str(path),
            "audio": base64.b64encode(wav).decode("ascii"),
            "format": "wav",
            "sample_rate": wave.rate,
            "duration": round(wave.duration, 3),
            "model": model,
        }
        return write_json(shape)

    def _save(self, wav: bytes) -> Path:
        """Write a file atomically and delete the oldest ones."""
        private_folder(self._output)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        path = self._output.absolute() / f"speech-{stamp}-{secrets.token_hex(6)}.wav"
        temporary = path.with_suffix(".part")
        temporary.touch(0o600, exist_ok=False)
        try:
            temporary.write_bytes(wav)  # not synced to the disk, which would delay the answer
            with _SAVING:
                temporary.replace(path)
                self._prune(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _prune(self, newest: Path) -> None:
        """Delete all but the newest files, and partial files that a killed plugin left."""
        dated: list[tuple[float, Path]] = []
        for path in newest.parent.glob("speech-*"):
            with suppress(OSError):  # another call deleted it
                written = path.stat().st_mtime
                if path.suffix == ".wav" and path != newest:
                    dated.append((written, path))
                elif path.suffix == ".part" and written < time.time() - _STALE:
                    path.unlink(missing_ok=True)
        for _written, path in sorted(dated, reverse=True)[max(0, self._max_files - 1) :]:
            with suppress(OSError):  # Windows: the file is open; the next call tries again
                path.unlink(missing_ok=True)

    # Live

    def converse(
        self,
        use: Callable[[str], AbstractAsyncContextManager[tuple[PostingClient, str]]],
        default_model: str,
        messages: AsyncIterator[ConversationMessage],
    ) -> AbstractAsyncContextManager[AsyncIterator[ConversationMessage]]:
        """Answer a live conversation (`speech.live_task` defines the messages).

        `use` keeps the named model loaded within its block and returns the client of its server and the server's
        name for it. Errors are sent as task-failed, then raised. Leaving the block stops the engine's work.
        """
        return aclosing(self._answers(use, default_model, messages))

    async def _answers(
        self,
        use: Callable[[str], AbstractAsyncContextManager[tuple[PostingClient, str]]],
        default_model: str,
        messages: AsyncIterator[ConversationMessage],
    ) -> AsyncGenerator[ConversationMessage, None]:
        task = LiveTask(messages)
        try:
            await task.begin()
            model = task.model or default_model
            if not model:
                raise InvalidRequestError.at("model", "is missing: name one in the first message")
            async with use(model) as (client, served):
                yield task.event("task-started")
                fields = _form_fields(served, {"language": task.language}, words=False)

                async def transcribe(samples: bytes) -> list[Segment]:
                    result = await self._post_samples(client, "transcribe", fields, samples)
                    return _segments(result, pcm.seconds(len(samples)))

                async with (
                    aclosing(self._samples(task)) as samples,
                    transcribe_live(samples, transcribe, self._live) as sentences,
                ):
                    async for sentence in sentences:
                        yield task.result(sentence)
            yield task.event("task-finished")
        except EnginePluginError as error:
            yield task.failed(error)
            raise

    async def _samples(self, task: LiveTask) -> AsyncGenerator[bytes, None]:
        """The audio as 16 kHz mono s16le. Raw samples of this format need no decoder."""
        audio_format, rate, channels = await task.detect_format()
        async with aclosing(task.audio()) as audio:
            if audio_format in RAW and (rate, channels) == (pcm.RATE, 1):
                odd = b""
                async for data in audio:  # a message may end within a sample
                    samples = odd + data
                    whole = len(samples) & ~1
                    odd = samples[whole:]
                    yield samples[:whole]
            else:
                async with (
                    self._decoder.stream(audio_format, rate, channels) as decoded,
                    aclosing(decoded.decode(audio)) as pieces,
                ):
                    async for samples in pieces:
                        yield samples


def _form_fields(model: str, request: dict[str, Any], *, words: bool) -> dict[str, str]:
    fields = {"model": model, "timestamp_granularities[]": "word" if words else "segment"}
    for name in ("language", "temperature"):
        if request.get(name) not in (None, ""):
            fields[name] = str(request[name])
    return fields


def _segments(result: dict[str, Any], duration: float) -> list[Segment]:
    """The segments of an engine's answer, clamped to the audio; without segments, the text is the only one.

    A segment whose end precedes its start lasts to the end of the audio. A duration of 0 is unknown.
    """
    reported = result.get("segments") or []
    if not isinstance(reported, list):
        raise BadGatewayError(f"the engine's transcription has invalid segments: {str(reported)[:80]!r}")
    found: list[Segment] = []
    for shape in reported:
        try:
            start, end, text = float(shape["start"]), float(shape["end"]), str(shape["text"]).strip()
            if not (isfinite(start) and isfinite(end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadGatewayError(f"the engine's transcription has an invalid segment: {str(shape)[:80]!r}") from None
        latest = duration or max(start, end)
        start = min(max(0.0, start), latest)
        found.append(Segment(start, latest if end < start else min(end, latest), text))
    text = str(result.get("text") or "").strip()
    return found or ([Segment(0.0, duration, text)] if text else [])


def _duration(result: dict[str, Any]) -> float:
    """The duration in seconds that the server reports, else the end of the last segment, else 0."""
    reported = result.get("segments")
    last = reported[-1] if isinstance(reported, list) and reported else None
    for value in (result.get("duration"), last.get("end") if isinstance(last, dict) else None):
        try:
            seconds = float(value or 0)
        except (TypeError, ValueError):
            continue
        if 0 < seconds < float("inf"):
            return seconds
    return 0.0
