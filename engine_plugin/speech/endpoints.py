"""Speech: recordings and live streams to text, text to speech, on any server with OpenAI's audio paths.

The engine holds the model and knows the server (`Dialect`), this module the sound.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import threading
import time
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from math import isfinite
from typing import TYPE_CHECKING, Any, Protocol

from engine_plugin.deadlines import deadline
from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError
from engine_plugin.jsontext import write_json
from engine_plugin.openai_api.bodies import answer_object
from engine_plugin.speech import containers, pcm
from engine_plugin.speech.conversation import Conversation
from engine_plugin.speech.decoder import RAW
from engine_plugin.speech.incoming import sound_of
from engine_plugin.speech.live import transcribed_live
from engine_plugin.speech.options import LiveOptions
from engine_plugin.speech.subtitles import Segment, answer
from engine_plugin.system.files import in_thread, private_folder

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from engine_plugin.messages import BidiMessage
    from engine_plugin.speech.decoder import DecodedStream, Decoder

__all__ = ["KEPT", "Answer", "Dialect", "Speech", "SpeechClient"]

KEPT = 100
"""How many spoken files stay: the newest. They are `speech-<UTC time>-<random>.wav`; nothing else is touched."""

_TEXT_LIMIT = 64 * 1024 * 1024
_SOUND_LIMIT = 512 * 1024 * 1024
_SHORTEST = pcm.BYTES_A_SECOND // 10  # a model wants some sound to look at
_STALE = 3600.0
_KEEPING = threading.Lock()  # two at once would each delete what the other keeps

_PATIENCE = 60.0
"""Seconds that a transcription may take beside the recording's length."""
_SLOWEST = 500
"""Bytes per second assumed for a recording whose length only the server knows; speech codecs produce more."""


class Answer(Protocol):
    """A server's answer whose head has arrived and is good."""

    async def read(self, limit: int) -> bytes:
        """The whole body; BadGatewayError when it is longer than `limit` bytes."""


class SpeechClient(Protocol):
    """How the server is reached. Each method's block holds an answer; leaving it early ends the server's work.

    What the server complains of is raised as one of `errors`.
    """

    def post_json(self, path: str, body: bytes) -> AbstractAsyncContextManager[Answer]:
        """Send JSON."""

    def post_form(
        self, path: str, fields: Mapping[str, str], file: bytes, file_name: str
    ) -> AbstractAsyncContextManager[Answer]:
        """Send a form with a file, which is its field `file`."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one kind of server is asked for speech."""

    paths: Mapping[str, str]
    """Where `transcribe`, `translate` and `speak` are. The engine refuses what its server has no path for."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What goes into every form beside the request's own fields, such as a response_format that has segments."""
    original: bool = False
    """Whether a recording is sent as it came; otherwise as a WAV of 16 kHz mono s16le, which every server reads."""


class Speech:
    """The speech services on the server behind `client`. Owned by the engine driver, used from one event loop.

    `client` gives the client of the running server, or raises UnavailableError. `output` is the folder for what is
    spoken, made when it is first needed, for this user only.
    """

    def __init__(
        self,
        client: Callable[[], SpeechClient],
        dialect: Dialect,
        decoder: Decoder,
        output: Path,
        live: LiveOptions | None = None,
        kept: int = KEPT,
    ) -> None:
        self._client = client
        self._dialect = dialect
        self._decoder = decoder
        self._output = output
        self._live = live or LiveOptions()
        self._kept = kept

    # Speech to text

    async def transcribe(self, model: str, request: dict[str, Any]) -> bytes:
        """Answer a speech-to-text request, with a model that is loaded. Errors name the field."""
        sound = await sound_of(request["audio"])
        if self._dialect.original:
            plain, is_cut_off = None, await in_thread(containers.is_cut_off, sound)
            most = min(len(sound) / _SLOWEST, self._decoder.longest)
        else:
            plain, is_cut_off = await self._decoder.decode(sound)
            most = pcm.seconds(len(plain))
        task = request.get("task") or "transcribe"
        words = "word" in (request.get("timestamp_granularities") or ())
        fields = _form_fields(model, request, words=words)
        if task != "transcribe":
            fields["task"] = task
        async with deadline(_PATIENCE + most, "speech-to-text", "Try again, or send the recording in parts"):
            if plain is not None:
                heard = await self._post_samples(task, fields, plain)
            else:
                name = containers.container_of(sound[: containers.HEAD]) or "mp3"
                heard = await self._post(task, fields, sound, f"audio.{name}")
                plain = pcm.plain_speech(sound)
        duration = _duration(heard) if plain is None else pcm.seconds(len(plain))
        segments = _segments(heard, duration)
        more: dict[str, Any] = {
            "task": task,
            "language": str(heard.get("language") or request.get("language") or ""),
            "duration": round(duration, 3),
        }
        if words:
            more["words"] = heard.get("words") or []
        text = str(heard.get("text") or "").strip()
        form = request.get("response_format") or "json"
        shape = answer(form, request["model"], text, segments, more)
        if is_cut_off:
            shape["truncated"] = True
        return write_json(shape)

    async def _post_samples(self, task: str, fields: dict[str, str], samples: bytes) -> dict[str, Any]:
        padded = samples + bytes(max(0, _SHORTEST - len(samples)))
        return await self._post(task, fields, pcm.wav_header(len(padded)) + padded, "audio.wav")

    async def _post(self, task: str, fields: dict[str, str], file: bytes, name: str) -> dict[str, Any]:
        sent = {**fields, **self._dialect.fields}
        async with self._client().post_form(self._dialect.paths[task], sent, file, name) as response:
            data = await response.read(_TEXT_LIMIT)
        return answer_object(data, "the engine's transcription")

    # Text to speech

    async def speak(self, model: str, request: dict[str, Any]) -> bytes:
        """Answer a text-to-speech request: a WAV of s16le, in base64 and as a file of ours."""
        asked = {name: request[name] for name in ("voice", "speed", "language") if request.get(name) is not None}
        text = request.get("text") or request.get("input")
        body = json.dumps({"model": model, "input": text, **asked, "response_format": "wav"}).encode()
        async with self._client().post_json(self._dialect.paths["speak"], body) as response:
            data = await response.read(_SOUND_LIMIT)
        return await in_thread(self._spoken, request["model"], data)

    def _spoken(self, model: str, data: bytes) -> bytes:
        wave = pcm.read_wave(data)
        if not wave.samples:
            raise BadGatewayError("the engine spoke nothing")
        wav = wave.to_bytes()
        try:
            path = self._keep(wav)
        except OSError as error:
            raise EnginePluginError(f"{self._output}: cannot be written: {error.strerror or error}") from error
        shape = {
            "url": str(path),
            "audio": base64.b64encode(wav).decode("ascii"),
            "format": "wav",
            "sample_rate": wave.rate,
            "duration": round(wave.duration, 3),
            "model": model,
        }
        return write_json(shape)

    def _keep(self, wav: bytes) -> Path:
        """Write a file that is never seen half written, and delete the oldest ones."""
        private_folder(self._output)
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        path = self._output.absolute() / f"speech-{stamp}-{secrets.token_hex(6)}.wav"
        temporary = path.with_suffix(".part")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(wav)
            with _KEEPING:
                temporary.replace(path)
                self._prune(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _prune(self, newest: Path) -> None:
        """Keep the newest files; what a killed plugin left half written goes, too."""
        dated: list[tuple[float, Path]] = []
        for path in newest.parent.glob("speech-*"):
            with suppress(OSError):  # another call deleted it
                written = path.stat().st_mtime
                if path.suffix == ".wav" and path != newest:
                    dated.append((written, path))
                elif path.suffix == ".part" and written < time.time() - _STALE:
                    path.unlink(missing_ok=True)
        for _written, path in sorted(dated, reverse=True)[max(0, self._kept - 1) :]:
            with suppress(OSError):  # Windows: somebody reads it; the next call tries again
                path.unlink(missing_ok=True)

    # Live

    @asynccontextmanager
    async def converse(
        self,
        use: Callable[[str], AbstractAsyncContextManager[str]],
        default_model: str,
        messages: AsyncIterator[BidiMessage],
    ) -> AsyncIterator[AsyncIterator[BidiMessage]]:
        """Answer a live conversation (`speech.conversation` has the messages).

        `use` holds a model of this name while in its block and gives the name that the server knows it by. What
        goes wrong is told as task-failed, then raised. Leaving the block stops the engine's work.
        """
        async with aclosing(self._answers(use, default_model, messages)) as answers:
            yield answers

    async def _answers(
        self,
        use: Callable[[str], AbstractAsyncContextManager[str]],
        default_model: str,
        messages: AsyncIterator[BidiMessage],
    ) -> AsyncGenerator[BidiMessage, None]:
        talk = Conversation(messages)
        try:
            await talk.begin()
            model = talk.model or default_model
            if not model:
                raise InvalidRequestError.at("model", "is missing: name one in the first message")
            async with use(model) as served:
                yield talk.started()
                fields = _form_fields(served, {"language": talk.language}, words=False)

                async def transcribe(samples: bytes) -> list[Segment]:
                    heard = await self._post_samples("transcribe", fields, samples)
                    return _segments(heard, pcm.seconds(len(samples)))

                async with (
                    aclosing(self._samples(talk)) as samples,
                    transcribed_live(samples, transcribe, self._live) as sentences,
                ):
                    async for sentence in sentences:
                        yield talk.result(sentence)
            yield talk.finished()
        except EnginePluginError as error:
            yield talk.failed(error)
            raise

    async def _samples(self, talk: Conversation) -> AsyncGenerator[bytes, None]:
        """The conversation's sound as 16 kHz mono s16le. Raw samples of this kind need no decoder."""
        await talk.sound_begins()
        async with aclosing(talk.sound()) as sound:
            if talk.form in RAW and (talk.sample_rate, talk.channels) == (pcm.RATE, 1):
                odd = b""
                async for data in sound:  # a message may end in the middle of a sample
                    samples = odd + data
                    whole = len(samples) & ~1
                    odd = samples[whole:]
                    yield samples[:whole]
            else:
                async with (
                    self._decoder.stream(talk.form, talk.sample_rate, talk.channels) as decoded,
                    aclosing(_decoded(sound, decoded)) as pieces,
                ):
                    async for samples in pieces:
                        yield samples


async def _decoded(sound: AsyncIterator[bytes], decoded: DecodedStream) -> AsyncGenerator[bytes, None]:
    """What the decoder makes of the sound. An error of the sound's source goes before the decoder's, which may well
    complain of the sudden end."""
    feeding = asyncio.create_task(_feed(sound, decoded))
    try:
        async for samples in decoded:
            yield samples
        await feeding
    except EnginePluginError:
        if feeding.done():
            feeding.result()
        raise
    finally:
        feeding.cancel()
        await asyncio.wait({feeding})


async def _feed(sound: AsyncIterator[bytes], decoded: DecodedStream) -> None:
    """Have the decoder hear all of it; also when the source fails, so that the decoder ends."""
    try:
        async for data in sound:
            await decoded.write(data)
    finally:
        decoded.end()


def _form_fields(model: str, request: dict[str, Any], *, words: bool) -> dict[str, str]:
    fields = {"model": model, "timestamp_granularities[]": "word" if words else "segment"}
    for name in ("language", "temperature"):
        if request.get(name) not in (None, ""):
            fields[name] = str(request[name])
    return fields


def _segments(heard: dict[str, Any], duration: float) -> list[Segment]:
    """The engine's segments, inside the audio and in order; without any, the text is one.

    A model that does not say when a segment ends is understood to mean the audio's end. A duration of 0 is unknown.
    """
    found: list[Segment] = []
    for shape in _told_segments(heard):
        try:
            start, end, text = float(shape["start"]), float(shape["end"]), str(shape["text"]).strip()
            if not (isfinite(start) and isfinite(end)):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise BadGatewayError(f"the engine's transcription has a segment like {str(shape)[:80]!r}") from None
        latest = duration or max(start, end)
        start = min(max(0.0, start), latest)
        found.append(Segment(start, latest if end < start else min(end, latest), text))
    text = str(heard.get("text") or "").strip()
    return found or ([Segment(0.0, duration, text)] if text else [])


def _told_segments(heard: dict[str, Any]) -> list[Any]:
    found = heard.get("segments") or []
    if not isinstance(found, list):
        raise BadGatewayError(f"the engine's transcription has segments like {str(found)[:80]!r}")
    return found


def _duration(heard: dict[str, Any]) -> float:
    """Seconds of a recording that only the server has read: what it says, else where the last segment ends; or 0."""
    ends = [shape.get("end") for shape in _told_segments(heard) if isinstance(shape, dict)]
    for value in (heard.get("duration"), ends[-1] if ends else None):
        try:
            seconds = float(value or 0)
        except (TypeError, ValueError):
            continue
        if 0 < seconds < float("inf"):
            return seconds
    return 0.0
