"""Decodes audio of any common format, in a process of its own (`speech.decoder_program`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from engine_plugin import catalogue
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
)
from engine_plugin.process.child import STDIN, PipedProcess
from engine_plugin.process.python import module_command, module_environ
from engine_plugin.speech.containers import is_cut_off
from engine_plugin.speech.decoder_program import CUT_OFF, LENGTH_TOLERANCE, too_long_message
from engine_plugin.speech.options import AudioLimits
from engine_plugin.speech.pcm import native_samples, seconds

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping
    from pathlib import Path

__all__ = ["FORMATS", "RAW", "DecodedStream", "Decoder", "Recording"]

_MODULE = "engine_plugin.speech.decoder_program"
_BLOCK = 256 * 1024
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


class DecodedStream(PipedProcess):
    """Audio in the decoder program, with back-pressure in both directions.

    One task calls `write` and `end`, another one iterates over the samples; `decode` does both.
    """

    def __init__(self, *, can_install: bool) -> None:
        """`can_install`: InstallEngine installs the packages that the decoder needs."""
        super().__init__(take=self._keep)
        self.is_cut_off = False
        self._can_install = can_install
        self._last_words = b""
        self._writable = asyncio.Event()
        self._writable.set()

    async def write(self, data: bytes) -> None:
        """Write encoded audio; waits while the decoded audio is not read."""
        for start in range(0, len(data), _BLOCK):
            if not self.stdin.is_closing():
                self.stdin.write(data[start : start + _BLOCK])
            await self._writable.wait()

    def end(self) -> None:
        """End the encoded audio."""
        self.close_stdin()

    async def decode(self, audio: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield the samples of `audio`. An error of `audio` takes precedence over the decoder's, which may only
        reflect the sudden end."""
        feeding = asyncio.create_task(self._feed(audio))
        try:
            async for samples in self:
                yield samples
            await feeding
        except EnginePluginError:
            if feeding.done():
                feeding.result()
            raise
        finally:
            feeding.cancel()
            await asyncio.wait({feeding})

    async def _feed(self, audio: AsyncIterator[bytes]) -> None:
        """Write the audio, and end it even if the source fails."""
        try:
            async for data in audio:
                await self.write(data)
        finally:
            self.end()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Yield 16 kHz mono s16le as it is decoded, then set `is_cut_off`.

        Raises InvalidRequestError for audio that cannot be decoded.
        """
        while True:
            try:
                head = await self.output.readexactly(5)
                payload = await self.output.readexactly(int.from_bytes(head[1:], "big"))
            except asyncio.IncompleteReadError:
                raise await self._exit_error() from None
            match head[:1]:
                case b"a":
                    yield payload
                case b"d":
                    self.is_cut_off = payload == CUT_OFF
                    return
                case b"e":
                    raise InvalidRequestError.at("audio", payload.decode("utf-8", "replace"))
                case _:
                    raise self._missing(payload.decode("utf-8", "replace"))

    def _missing(self, package: str) -> EnginePluginError:
        found = f"audio: the Python package {package}, which decodes audio, is not installed"
        if self._can_install:
            return catalogue.ENGINE_NOT_INSTALLED.error(found=found)
        return PreconditionError(
            f"{found} beside engine-plugin. Install it into the same Python: pip install 'av>=16'. Or send 16 kHz "
            "mono 16-bit samples, raw or as WAV, which need no package"
        )

    async def _exit_error(self) -> BadGatewayError:
        """The error for an exit before the last frame."""
        await asyncio.wait({self.exited}, timeout=1)
        status = self.exited.result() if self.exited.done() else 0
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        words = self._last_words.decode("utf-8", "replace").strip().splitlines()
        return BadGatewayError(f"audio: the decoder exited with {how}: {words[-1] if words else 'it wrote no error'}")

    def _keep(self, _stderr: int, data: bytes) -> None:
        self._last_words = (self._last_words + data)[-_STDERR_TAIL:]

    # Callbacks of asyncio

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        super().pipe_connection_lost(fd, exc)
        if fd == STDIN:
            self._writable.set()


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
        limit, longest = self._limits.timeout, self._limits.longest
        self._files += 1
        try:
            async with self._slots, asyncio.timeout(limit), self._running(longest=longest) as stream:
                pieces = [piece async for piece in stream.decode(_whole(audio))]
        except TimeoutError:
            raise InvalidRequestError.at(
                "audio", f"takes longer than {limit:g} s to decode; send a shorter recording"
            ) from None
        finally:
            self._files -= 1
        return Recording(await asyncio.to_thread(b"".join, pieces), stream.is_cut_off)

    @asynccontextmanager
    async def stream(self, audio_format: str, rate: int, channels: int) -> AsyncIterator[DecodedStream]:
        """Decode audio as it arrives. `audio_format` is one of FORMATS; `rate` and `channels` describe raw samples.

        Raises UnavailableError at the limit `max_live`.
        """
        if self._streams >= self._limits.max_live:
            raise UnavailableError(
                f"{self._streams} live streams are being decoded, the limit of engine.audio.max_live in plugin.yaml. "
                "Try again later, or send raw 16 kHz samples (format pcm), which need no decoder"
            )
        self._streams += 1
        try:
            async with self._running(
                live=True, audio_format=FORMATS[audio_format], rate=rate, channels=channels
            ) as stream:
                yield stream
        finally:
            self._streams -= 1

    @asynccontextmanager
    async def _running(
        self, *, live: bool = False, audio_format: str = "", rate: int = 0, channels: int = 0, longest: float = 0
    ) -> AsyncIterator[DecodedStream]:
        settings = {"live": live, "format": audio_format, "rate": rate, "channels": channels, "longest": longest}
        stream = DecodedStream(can_install=self._site is not None)
        environ = module_environ(self._environ, self._site)
        await stream.spawn(module_command(_MODULE), environ, stdin=json.dumps(settings).encode() + b"\n")
        try:
            yield stream
        finally:
            await stream.kill()


async def _whole(audio: bytes) -> AsyncIterator[bytes]:
    yield audio
