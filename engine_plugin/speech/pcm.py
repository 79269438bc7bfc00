"""Samples and WAV files, as the engine gets and returns them. All supported systems are little-endian, as WAV is."""

from __future__ import annotations

import math
import struct
from array import array
from dataclasses import dataclass
from itertools import repeat
from operator import mul

from engine_plugin.errors import BadGatewayError
from engine_plugin.speech.containers import UNKNOWN_LENGTH, wav_chunks

__all__ = ["BYTES_A_SECOND", "RATE", "Wave", "native_samples", "read_wave", "seconds", "wav_format", "wav_header"]

RATE = 16_000
"""Samples per second of transcribed audio, which is mono s16le."""

BYTES_A_SECOND = 2 * RATE

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_WIDTHS = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}


@dataclass(frozen=True, slots=True)
class Wave:
    """The samples of a WAV file as s16le, channels interleaved."""

    samples: bytes
    rate: int
    channels: int

    @property
    def duration(self) -> float:
        """The duration in seconds."""
        return len(self.samples) / (2 * self.rate * self.channels)

    def to_bytes(self) -> bytes:
        """The content of a WAV file."""
        return wav_header(len(self.samples), self.rate, self.channels) + self.samples


def seconds(pcm_bytes: int) -> float:
    """The duration of `pcm_bytes` bytes of 16 kHz mono s16le, in seconds."""
    return pcm_bytes / BYTES_A_SECOND


def wav_header(size: int, rate: int = RATE, channels: int = 1) -> bytes:
    """The 44-byte header of a WAV file with `size` bytes of s16le samples."""
    align = 2 * channels
    layout = (16, _PCM, channels, rate, rate * align, align, 16)
    return struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVEfmt ", *layout, b"data", size)


def native_samples(audio: bytes) -> bytes | None:
    """The samples of a WAV of 16 kHz mono s16le, which may be truncated; None for any other audio."""
    try:
        (kind, channels, rate, bits), place, size = wav_format(audio)
    except ValueError:
        return None
    if (kind, channels, rate, bits) != (_PCM, 1, RATE, 16):
        return None
    there = len(audio) - place
    size = there if size == 0 or size >= UNKNOWN_LENGTH else min(size, there)
    return audio[place : place + size - size % 2] or None


def read_wave(audio: bytes) -> Wave:
    """Convert a WAV file from an engine to s16le. Raises BadGatewayError if it is not a valid WAV file.

    Samples beyond full scale are clipped, NaN becomes silence. Run it in a thread: ten seconds of 24 kHz floats take
    about 60 ms.
    """
    try:
        (kind, channels, rate, bits), place, size = wav_format(audio)
        if not channels or not rate or (kind, bits) not in _WIDTHS:
            raise ValueError(f"unsupported samples: format {kind}, {bits} bits, {channels} channels, {rate} Hz")
    except ValueError as error:
        raise BadGatewayError(f"the engine's audio is not a valid WAV file: {error}") from None
    data = audio[place : place + size]
    frame = channels * bits // 8
    return Wave(_to_s16(data[: len(data) - len(data) % frame], kind, bits), rate, channels)


def wav_format(audio: bytes) -> tuple[tuple[int, int, int, int], int, int]:
    """The format (tag, channels, rate, bits) of a WAV, and the position and declared size in bytes of its samples.

    Raises ValueError for anything else.
    """
    if audio[:4] != b"RIFF" or audio[8:12] != b"WAVE":
        raise ValueError("the RIFF header is missing")
    form = None
    for name, place, size in wav_chunks(audio):
        if name == b"fmt ":
            fields = audio[place : place + size]
            if len(fields) < 16:
                raise ValueError("the fmt chunk is too short")
            kind, channels, rate, bits = struct.unpack_from("<HHI6xH", fields)
            if kind == _EXTENSIBLE:
                kind = int.from_bytes(fields[24:26], "little")
            form = (kind, channels, rate, bits)
        elif name == b"data":
            if form is None:
                raise ValueError("the data chunk precedes the fmt chunk")
            return form, place, size
    raise ValueError("the data chunk is missing")


def _to_s16(data: bytes, kind: int, bits: int) -> bytes:
    if bits == 16:
        return data
    if kind == _FLOAT:
        numbers: array[float] = array("f" if bits == 32 else "d", data)
        return array("h", map(_clipped, map(mul, numbers, repeat(32768.0)))).tobytes()
    if bits == 8:
        return array("h", [(value - 128) << 8 for value in data]).tobytes()
    step = bits // 8
    top = bytearray(len(data) // step * 2)
    top[0::2], top[1::2] = data[step - 2 :: step], data[step - 1 :: step]  # the two most significant bytes
    return bytes(top)


def _clipped(value: float) -> int:
    if -32768.0 <= value <= 32767.0:
        return round(value)
    return 0 if math.isnan(value) else 32767 if value > 0 else -32768
