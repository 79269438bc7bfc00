"""WAV files in and out. Not for the loop: numpy is imported here, and an hour of audio takes its time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import InvalidRequestError
from engine_plugin.speech.pcm import RATE, wav_format, wav_header

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RATE", "read_mono", "write"]

_PCM, _FLOAT = 1, 3
_RATES = range(1000, 768001)
"""The sampling rates that are accepted, in Hz."""
_LONGEST = 5 * 3600
"""Seconds. At a low sampling rate, a body within the size limit could expand beyond the memory."""


def read_mono(data: bytes) -> bytes:
    """Any PCM WAV file as 16 kHz mono 32-bit floats (little-endian). Raises InvalidRequestError."""
    try:
        (code, channels, rate, bits), at, size = wav_format(data)
    except ValueError as error:
        raise InvalidRequestError.at("file", f"is not a valid WAV file: {error}; send 16-bit PCM") from None
    if not channels or rate not in _RATES:
        raise InvalidRequestError.at("file", f"has {channels} channels at {rate} Hz, which is not supported")
    content = data[at : at + size]  # a stream's size is more than there is
    return _samples(content, code == _FLOAT if code in (_PCM, _FLOAT) else None, bits, channels, rate)


def _samples(content: bytes, is_float: bool | None, bits: int, channels: int, rate: int) -> bytes:
    """Bare samples as 16 kHz mono 32-bit floats (little-endian). Raises RequestError."""
    import numpy as np

    frame = channels * bits // 8
    kind = {(False, 8): "u1", (False, 16): "<i2", (False, 32): "<i4", (True, 32): "<f4", (True, 64): "<f8"}
    if is_float is None or ((is_float, bits) not in kind and (is_float, bits) != (False, 24)):
        raise InvalidRequestError.at("file", f"its samples ({bits} bits) are not PCM; send 16-bit PCM")
    content = content[: len(content) // frame * frame]
    if not content:
        raise InvalidRequestError.at("file", "has no audio")
    if len(content) // frame > _LONGEST * rate:
        raise InvalidRequestError.at("file", f"is longer than {_LONGEST // 3600} hours; send it in parts")
    if bits == 24:
        whole = np.zeros((len(content) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(content, np.uint8).reshape(-1, 3)
        numbers: Any = whole.view("<i4").reshape(-1)
        bits = 32
    else:
        numbers = np.frombuffer(content, kind[is_float, bits])
    if bits == 8:
        samples = (numbers.astype(np.float32) - 128) / 128
    elif is_float:
        samples = numbers.astype(np.float32)
    else:
        samples = numbers.astype(np.float32) / float(1 << (bits - 1))
    if not np.isfinite(samples).all():
        raise InvalidRequestError.at("file", "has samples that are not finite numbers")
    if channels > 1:
        samples = samples.reshape(-1, channels).mean(axis=1)
    mono: bytes = _at_rate(samples, rate).astype("<f4").tobytes()
    return mono


def _at_rate(samples: np.ndarray[Any, np.dtype[np.float32]], rate: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    if rate == RATE:
        return samples
    import soxr

    resampled: np.ndarray[Any, np.dtype[np.float32]] = soxr.resample(samples, rate, RATE)
    return resampled


def write(pcm: bytes, rate: int, as_file: bool = True) -> bytes:
    """32-bit floats of one channel as a WAV file of 16-bit samples, or as the samples alone."""
    import numpy as np

    samples = np.nan_to_num(np.frombuffer(pcm, "<f4"))
    data: bytes = (np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes()
    return wav_header(len(data), rate) + data if as_file else data
