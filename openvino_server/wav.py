"""WAV files in and out. Not for the loop: numpy is imported here, and an hour of audio takes its time."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from openvino_server.errors import bad_request

if TYPE_CHECKING:
    import numpy as np

__all__ = ["RATE", "read_mono", "write"]

RATE = 16000
"""Samples a second that speech-to-text models hear."""

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_RATES = range(1000, 768001)
"""The sampling rates that are accepted, in Hz."""
_LONGEST = 5 * 3600
"""Seconds. At a low sampling rate, a body within the size limit could expand beyond the memory."""


def read_mono(data: bytes) -> bytes:
    """Any PCM WAV file as 16 kHz mono 32-bit floats (little-endian). Raises RequestError."""
    form, content = _chunks(data)
    if len(form) < 16:
        raise bad_request("file", "is not a valid WAV file: the fmt chunk is missing")
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", form)
    if code == _EXTENSIBLE and len(form) >= 26:
        (code,) = struct.unpack_from("<H", form, 24)
    if not channels or rate not in _RATES:
        raise bad_request("file", f"has {channels} channels at {rate} Hz, which is not supported")
    return _samples(content, code == _FLOAT if code in (_PCM, _FLOAT) else None, bits, channels, rate)


def _samples(content: bytes, is_float: bool | None, bits: int, channels: int, rate: int) -> bytes:
    """Bare samples as 16 kHz mono 32-bit floats (little-endian). Raises RequestError."""
    import numpy as np

    frame = channels * bits // 8
    kind = {(False, 8): "u1", (False, 16): "<i2", (False, 32): "<i4", (True, 32): "<f4", (True, 64): "<f8"}
    if is_float is None or ((is_float, bits) not in kind and (is_float, bits) != (False, 24)):
        raise bad_request("file", f"its samples ({bits} bits) are not PCM; send 16-bit PCM")
    content = content[: len(content) // frame * frame]
    if not content:
        raise bad_request("file", "has no audio")
    if len(content) // frame > _LONGEST * rate:
        raise bad_request("file", f"is longer than {_LONGEST // 3600} hours; send it in parts")
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
    return _with_header(data, rate) if as_file else data


def _with_header(data: bytes, rate: int) -> bytes:
    """Bare 16-bit samples of one channel as a WAV file."""
    head = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + len(data), b"WAVE", b"fmt ", 16, _PCM, 1, rate,
                       rate * 2, 2, 16, b"data", len(data))  # fmt: skip
    return head + data


def _chunks(data: bytes) -> tuple[bytes, bytes]:
    """The chunks `fmt ` and `data`. One whose size is more than there is reaches to the end: streams are so."""
    if len(data) < 12 or data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise bad_request("file", "is not a WAV file; send a WAV file with 16-bit PCM")
    form, at = b"", 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        at += 8
        if name == b"fmt ":
            form = data[at : at + size]
        elif name == b"data":
            return form, data[at : at + size]
        at += size + size % 2
    raise bad_request("file", "has no audio")
