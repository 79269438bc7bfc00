"""Decoding audio of any common format, in a process of its own (`speech.decode`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from engine_plugin import catalogue
from engine_plugin.errors import BadGatewayError, InvalidRequestError, PreconditionError, UnavailableError
from engine_plugin.process.child import STDIN, STDOUT, ChildProcess
from engine_plugin.process.python import module_command, module_environ
from engine_plugin.speech.containers import is_cut_off
from engine_plugin.speech.decode import CUT_OFF, SPARE, too_long
from engine_plugin.speech.pcm import plain_speech, seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

__all__ = ["FORMATS", "RAW", "AudioLimits", "DecodedStream", "Decoder", "Recording"]

_MODULE = "engine_plugin.speech.decode"
_BLOCK = 256 * 1024
_HIGH_WATER = 256 * 1024
_LAST_WORDS = 2000
_BUSY = max(2, os.cpu_count() or 2)  # files decoded at once
_WAITING = 100  # files that wait for that

FORMATS = {
    "pcm": "s16le",
    "s16le": "s16le",
    "raw": "s16le",
    "wav": "wav",
    "mp3": "mp3",
    "flac": "flac",
    "ogg": "ogg",
    "opus": "ogg",
    "vorbis": "ogg",
    "webm": "matroska",
    "mkv": "matroska",
    "m4a": "mov",
    "mp4": "mov",
    "aac": "aac",
    "aiff": "aiff",
    "au": "au",
    "amr": "amr",
    "caf": "caf",
    "w64": "w64",
}
"""The formats that a live stream may name, and ffmpeg's names for them."""

RAW = frozenset(name for name, form in FORMATS.items() if form == "s16le")
"""Those of samples without a container."""


def _number(default: Any, low: float, high: float) -> Any:
    return field(default=default, metadata={"min": low, "max": high})


@dataclass(frozen=True, slots=True)
class AudioLimits:
    """How much audio one request may bring; keys of plugin.yaml. Seconds."""

    longest: float = _number(3600.0, 1, 86_400)
    """The longest recording that is transcribed. One hour takes about 115 MB of memory while it is."""

    timeout: float = _number(120.0, 1, 86_400)
    """How long decoding one recording may take."""

    max_live: int = _number(16, 1, 1000)
    """How many live streams are decoded at once; a further one is refused with 503. Each decoder has 37 MB in memory,
    13 MB of it private. Raw samples of 16 kHz need no decoder and are not counted."""


class Recording(NamedTuple):
    """A decoded recording: 16 kHz mono s16le, and whether its end is missing."""

    samples: bytes
    is_cut_off: bool


class _DecoderProcess(ChildProcess):
    """The subprocess with back-pressure in both directions."""

    def __init__(self, take: Any) -> None:
        super().__init__(take)
        self.said = bytearray()
        self.heard = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()
        self._input_lost = False
        self._ended = False
        self._paused = False
        self._news = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Hand over some input and wait while there is too much that the process has not taken yet."""
        if not self._input_lost:
            self._stdin().write(data)
        await self._writable.wait()

    async def frame(self) -> tuple[bytes, bytes]:
        """The next frame: its letter and its bytes; (b"", b"") when the process has ended without a last one."""
        while (frame := self._next_frame()) is None:
            if self._ended:
                return b"", b""
            if self._paused:
                self._paused = False
                self._output().resume_reading()
            self._news.clear()
            await self._news.wait()
        return frame

    def _next_frame(self) -> tuple[bytes, bytes] | None:
        end = 5 + int.from_bytes(self.heard[1:5], "big")
        if len(self.heard) < max(5, end):
            return None
        kind, payload = bytes(self.heard[:1]), bytes(self.heard[5:end])
        del self.heard[:end]
        return kind, payload

    def _output(self) -> asyncio.ReadTransport:
        return cast("asyncio.ReadTransport", self._transport.get_pipe_transport(STDOUT))

    # Called by asyncio

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != STDOUT:
            self.said = (self.said + data)[-_LAST_WORDS:]
            return
        self.heard += data
        if len(self.heard) > _HIGH_WATER and not self._paused:
            self._paused = True
            self._output().pause_reading()
        self._news.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        super().pipe_connection_lost(fd, exc)
        if fd == STDIN:
            self._input_lost = True
            self._writable.set()
        elif fd == STDOUT:
            self._ended = True
            self._news.set()


class DecodedStream:
    """A live stream on its way through the decoder. `write`, then `end`, in one task; iterated in another."""

    def __init__(self, process: _DecoderProcess, *, is_ours: bool) -> None:
        """`is_ours`: InstallEngine installs what it needs."""
        self.is_cut_off = False
        self._process = process
        self._is_ours = is_ours

    async def write(self, data: bytes) -> None:
        """Hand over encoded audio; waits while the decoded audio is not fetched."""
        for start in range(0, len(data), _BLOCK):
            await self._process.write(data[start : start + _BLOCK])

    def end(self) -> None:
        """No more will come."""
        self._process.close_stdin()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """16 kHz mono s16le as it comes. Raises InvalidRequestError for audio that cannot be decoded.

        Afterwards `is_cut_off` says whether the end of a recording is missing.
        """
        while True:
            kind, payload = await self._process.frame()
            if kind == b"a":
                yield payload
            elif kind == b"d":
                self.is_cut_off = payload == CUT_OFF
                return
            else:
                raise await _failure(self._process, kind, payload, is_ours=self._is_ours)


class Decoder:
    """Makes 16 kHz mono s16le of any WAV, MP3, FLAC, OGG, WebM or M4A.

    `site` is the package directory where InstallEngine put `av`; None: it is beside this package, if anybody has
    installed it there. Each call has a process of its own,
    which is killed when the call is cancelled. Errors name the field `audio`.
    """

    def __init__(self, site: Path | None, environ: Mapping[str, str], limits: AudioLimits | None = None) -> None:
        self._site = site
        self._environ = environ
        self._limits = limits or AudioLimits()
        self._turns = asyncio.Semaphore(_BUSY)
        self._files = self._streams = 0

    @property
    def longest(self) -> float:
        """Seconds of the longest recording that is taken."""
        return self._limits.longest

    async def decode(self, audio: bytes) -> Recording:
        """A whole recording. Raises InvalidRequestError when it is not audio, too long, or slow to decode,
        UnavailableError when too many wait, and PreconditionError where no audio packages are installed: a WAV of
        16 kHz mono s16le needs none."""
        if not audio:
            raise InvalidRequestError.at("audio", "is empty")
        plain = plain_speech(audio)
        if plain is not None:
            if seconds(len(plain)) > self._limits.longest + SPARE:
                raise InvalidRequestError.at("audio", f"{too_long(self._limits.longest)}")
            return Recording(plain, is_cut_off(audio))
        if self._files >= _BUSY + _WAITING:
            raise UnavailableError(f"audio: {_WAITING} recordings wait to be decoded; try again later")
        self._files += 1
        try:
            return await self._decoded(audio)
        finally:
            self._files -= 1

    async def _decoded(self, audio: bytes) -> Recording:
        limit = self._limits.timeout
        pieces: list[bytes] = []
        try:
            async with self._turns, asyncio.timeout(limit), self._stream(live=False) as stream:
                feeding = asyncio.create_task(_feed(stream, audio))
                try:
                    pieces = [piece async for piece in stream]
                finally:
                    feeding.cancel()
                    await asyncio.wait({feeding})
        except TimeoutError:
            raise InvalidRequestError.at(
                "audio", f"takes longer than {limit:g} s to decode; send a shorter one"
            ) from None
        return Recording(await asyncio.to_thread(b"".join, pieces), stream.is_cut_off)

    @asynccontextmanager
    async def stream(self, form: str, rate: int, channels: int) -> AsyncIterator[DecodedStream]:
        """Decode audio as it arrives. `form` is one of FORMATS; `rate` and `channels` are those of raw samples.

        Raises UnavailableError when as many streams are decoded as may be.
        """
        if form not in FORMATS:
            raise InvalidRequestError.at("format", f"{form[:40]!r} is unknown; use one of {', '.join(FORMATS)}")
        if self._streams >= self._limits.max_live:
            raise UnavailableError(
                f"{self._streams} live streams are being decoded, as many as engine.audio.max_live in plugin.yaml "
                "allows. Try again later, or send raw samples of 16 kHz (format pcm), which need no decoder"
            )
        self._streams += 1
        try:
            async with self._stream(live=True, form=FORMATS[form], rate=rate, channels=channels) as stream:
                yield stream
        finally:
            self._streams -= 1

    @asynccontextmanager
    async def _stream(
        self, *, live: bool, form: str = "", rate: int = 0, channels: int = 0
    ) -> AsyncIterator[DecodedStream]:
        longest = 0 if live else self._limits.longest
        settings = {"live": live, "format": form, "rate": rate, "channels": channels, "longest": longest}
        head = json.dumps(settings).encode() + b"\n"
        command, environ = module_command(_MODULE), module_environ(self._environ, self._site)
        process = await _DecoderProcess.spawn(command, environ, lambda _fd, _data: None, stdin=head)
        try:
            yield DecodedStream(cast("_DecoderProcess", process), is_ours=self._site is not None)
        finally:
            await process.kill()


async def _feed(stream: DecodedStream, audio: bytes) -> None:
    await stream.write(audio)
    stream.end()


async def _failure(process: _DecoderProcess, kind: bytes, payload: bytes, *, is_ours: bool) -> Exception:
    """What a frame that is no audio means."""
    text = payload.decode("utf-8", "replace")
    if kind == b"e":
        return InvalidRequestError.at("audio", f"{text}")
    if kind == b"m":
        found = f"audio: the Python package {text}, which reads audio, is not installed"
        if is_ours:
            return catalogue.ENGINE_NOT_INSTALLED.error(found=found)
        return PreconditionError(
            f"{found} beside engine-plugin. Install it into the same Python: pip install 'av>=16'. Or send 16-bit "
            "mono samples of 16 kHz, as WAV or as they are: these need no package"
        )
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            await asyncio.wait({process.exited})
    status = process.exited.result() if process.exited.done() else 0
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    words = process.said.decode("utf-8", "replace").strip().splitlines()
    return BadGatewayError(f"audio: the decoder ended with {how}: {words[-1] if words else 'it said nothing'}")
