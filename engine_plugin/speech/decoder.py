"""Decodes audio of any common format, in a process of its own (`speech.decoder_program`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, cast

from engine_plugin import catalogue
from engine_plugin.errors import BadGatewayError, InvalidRequestError, PreconditionError, UnavailableError
from engine_plugin.process.child import STDIN, STDOUT, ChildProcess
from engine_plugin.process.python import module_command, module_environ
from engine_plugin.speech.containers import is_cut_off
from engine_plugin.speech.decoder_program import CUT_OFF, LENGTH_TOLERANCE, too_long_message
from engine_plugin.speech.options import AudioLimits
from engine_plugin.speech.pcm import native_samples, seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

__all__ = ["FORMATS", "RAW", "DecodedStream", "Decoder", "Recording"]

_MODULE = "engine_plugin.speech.decoder_program"
_BLOCK = 256 * 1024
_HIGH_WATER = 256 * 1024
_STDERR_TAIL = 2000
_MAX_PARALLEL = max(2, os.cpu_count() or 2)  # files decoded at the same time
_MAX_QUEUED = 100  # files that wait for a slot

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
"""The formats that a live stream may name, with ffmpeg's names."""

RAW = frozenset(name for name, audio_format in FORMATS.items() if audio_format == "s16le")
"""The formats of raw samples."""


class Recording(NamedTuple):
    """A decoded recording: 16 kHz mono s16le, and whether the recording was truncated."""

    samples: bytes
    is_cut_off: bool


class _DecoderProcess(ChildProcess):
    """The decoder program, with back-pressure in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.stderr = bytearray()
        self.stdout = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()
        self._input_lost = False
        self._ended = False
        self._paused = False
        self._changed = asyncio.Event()

    async def write(self, data: bytes) -> None:
        """Write input; waits while the pipe is full."""
        if not self._input_lost:
            self.stdin.write(data)
        await self._writable.wait()

    async def read_frame(self) -> tuple[bytes, bytes]:
        """The letter and the payload of the next frame; (b"", b"") after the process ended without a last frame."""
        while (frame := self._next_frame()) is None:
            if self._ended:
                return b"", b""
            if self._paused:
                self._paused = False
                self._output().resume_reading()
            self._changed.clear()
            await self._changed.wait()
        return frame

    def _next_frame(self) -> tuple[bytes, bytes] | None:
        end = 5 + int.from_bytes(self.stdout[1:5], "big")
        if len(self.stdout) < max(5, end):
            return None
        kind, payload = bytes(self.stdout[:1]), bytes(self.stdout[5:end])
        del self.stdout[:end]
        return kind, payload

    def _output(self) -> asyncio.ReadTransport:
        return cast("asyncio.ReadTransport", self._transport.get_pipe_transport(STDOUT))

    # Callbacks of asyncio

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd != STDOUT:
            self.stderr = (self.stderr + data)[-_STDERR_TAIL:]
            return
        self.stdout += data
        if len(self.stdout) > _HIGH_WATER and not self._paused:
            self._paused = True
            self._output().pause_reading()
        self._changed.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        super().pipe_connection_lost(fd, exc)
        if fd == STDIN:
            self._input_lost = True
            self._writable.set()
        elif fd == STDOUT:
            self._ended = True
            self._changed.set()


class DecodedStream:
    """A live stream in the decoder. One task calls `write` and `end`, another one iterates over the samples."""

    def __init__(self, process: _DecoderProcess, *, can_install: bool) -> None:
        """`can_install`: InstallEngine installs the packages that the decoder needs."""
        self.is_cut_off = False
        self._process = process
        self._can_install = can_install

    async def write(self, data: bytes) -> None:
        """Write encoded audio; waits while the decoded audio is not read."""
        for start in range(0, len(data), _BLOCK):
            await self._process.write(data[start : start + _BLOCK])

    def end(self) -> None:
        """End the encoded audio."""
        self._process.close_stdin()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield 16 kHz mono s16le as it is decoded, then set `is_cut_off`.

        Raises InvalidRequestError for audio that cannot be decoded.
        """
        while True:
            kind, payload = await self._process.read_frame()
            if kind == b"a":
                yield payload
            elif kind == b"d":
                self.is_cut_off = payload == CUT_OFF
                return
            else:
                raise await _failure(self._process, kind, payload, can_install=self._can_install)


class Decoder:
    """Decodes WAV, MP3, FLAC, OGG, WebM, M4A and other formats to 16 kHz mono s16le.

    `site` is the package directory to which InstallEngine installs `av`; None if the user installs it beside this
    package. Each call starts a process, which is killed when the call is cancelled. Errors name the field `audio`.
    """

    def __init__(self, site: Path | None, environ: Mapping[str, str], limits: AudioLimits | None = None) -> None:
        self._site = site
        self._environ = environ
        self._limits = limits or AudioLimits()
        self._slots = asyncio.Semaphore(_MAX_PARALLEL)
        self._files = self._streams = 0

    @property
    def longest(self) -> float:
        """The length of the longest accepted recording, in seconds."""
        return self._limits.longest

    async def decode(self, audio: bytes) -> Recording:
        """Decode a recording. A WAV of 16 kHz mono s16le needs no process and no package.

        Raises InvalidRequestError if it cannot be decoded, is too long or takes too long, UnavailableError if too
        many recordings wait, and PreconditionError if the audio package is not installed.
        """
        if not audio:
            raise InvalidRequestError.at("audio", "is empty")
        plain = native_samples(audio)
        if plain is not None:
            if seconds(len(plain)) > self._limits.longest + LENGTH_TOLERANCE:
                raise InvalidRequestError.at("audio", f"{too_long_message(self._limits.longest)}")
            return Recording(plain, is_cut_off(audio))
        if self._files >= _MAX_PARALLEL + _MAX_QUEUED:
            raise UnavailableError(f"audio: {_MAX_QUEUED} recordings are waiting to be decoded; try again later")
        self._files += 1
        try:
            return await self._decoded(audio)
        finally:
            self._files -= 1

    async def _decoded(self, audio: bytes) -> Recording:
        limit = self._limits.timeout
        pieces: list[bytes] = []
        try:
            async with self._slots, asyncio.timeout(limit), self._stream(live=False) as stream:
                feeding = asyncio.create_task(_feed(stream, audio))
                try:
                    pieces = [piece async for piece in stream]
                finally:
                    feeding.cancel()
                    await asyncio.wait({feeding})
        except TimeoutError:
            raise InvalidRequestError.at(
                "audio", f"takes longer than {limit:g} s to decode; send a shorter recording"
            ) from None
        return Recording(await asyncio.to_thread(b"".join, pieces), stream.is_cut_off)

    @asynccontextmanager
    async def stream(self, audio_format: str, rate: int, channels: int) -> AsyncIterator[DecodedStream]:
        """Decode audio as it arrives. `audio_format` is one of FORMATS; `rate` and `channels` describe raw samples.

        Raises InvalidRequestError for an unknown format, UnavailableError at the limit `max_live`.
        """
        if audio_format not in FORMATS:
            raise InvalidRequestError.at(
                "format", f"{audio_format[:40]!r} is unknown; use one of {', '.join(FORMATS)}"
            )
        if self._streams >= self._limits.max_live:
            raise UnavailableError(
                f"{self._streams} live streams are being decoded, the limit of engine.audio.max_live in plugin.yaml. "
                "Try again later, or send raw 16 kHz samples (format pcm), which need no decoder"
            )
        self._streams += 1
        try:
            async with self._stream(
                live=True, audio_format=FORMATS[audio_format], rate=rate, channels=channels
            ) as stream:
                yield stream
        finally:
            self._streams -= 1

    @asynccontextmanager
    async def _stream(
        self, *, live: bool, audio_format: str = "", rate: int = 0, channels: int = 0
    ) -> AsyncIterator[DecodedStream]:
        longest = 0 if live else self._limits.longest
        settings = {"live": live, "format": audio_format, "rate": rate, "channels": channels, "longest": longest}
        head = json.dumps(settings).encode() + b"\n"
        command, environ = module_command(_MODULE), module_environ(self._environ, self._site)
        process = _DecoderProcess()
        await process.spawn(command, environ, stdin=head)
        try:
            yield DecodedStream(process, can_install=self._site is not None)
        finally:
            await process.kill()


async def _feed(stream: DecodedStream, audio: bytes) -> None:
    await stream.write(audio)
    stream.end()


async def _failure(process: _DecoderProcess, kind: bytes, payload: bytes, *, can_install: bool) -> Exception:
    """The error that an `e` or `m` frame, or the end of the process, stands for."""
    text = payload.decode("utf-8", "replace")
    if kind == b"e":
        return InvalidRequestError.at("audio", f"{text}")
    if kind == b"m":
        found = f"audio: the Python package {text}, which decodes audio, is not installed"
        if can_install:
            return catalogue.ENGINE_NOT_INSTALLED.error(found=found)
        return PreconditionError(
            f"{found} beside engine-plugin. Install it into the same Python: pip install 'av>=16'. Or send 16 kHz "
            "mono 16-bit samples, raw or as WAV, which need no package"
        )
    with suppress(TimeoutError):
        async with asyncio.timeout(1):
            await asyncio.wait({process.exited})
    status = process.exited.result() if process.exited.done() else 0
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    words = process.stderr.decode("utf-8", "replace").strip().splitlines()
    return BadGatewayError(f"audio: the decoder exited with {how}: {words[-1] if words else 'it wrote no error'}")
