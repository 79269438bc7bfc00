"""WAV files, checked against the standard library's `wave` and PyAV."""

from __future__ import annotations

import io
import struct
import wave
from array import array

import pytest

from engine_plugin.errors import BadGatewayError
from engine_plugin.speech import pcm
from tests.speech.sounds import encoded, speech, tone, wav


def test_written_wav_is_read_by_the_standard_library() -> None:
    sound = speech(0.1)
    with wave.open(io.BytesIO(pcm.wav_header(len(sound), 24_000, 2) + sound)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 24_000)
        assert file.readframes(1 << 20) == sound


def test_seconds_of_bytes() -> None:
    assert pcm.seconds(32_000) == 1
    assert pcm.Wave(bytes(96_000), 24_000, 2).duration == 1


@pytest.mark.parametrize(
    ("codec", "off"),
    [
        ("pcm_u8", 256),
        ("pcm_s16le", 0),
        ("pcm_s24le", 1),
        ("pcm_s32le", 1),
        ("pcm_f32le", 1),
        ("pcm_f64le", 1),
    ],
)
def test_each_sample_format_is_read(codec: str, off: int) -> None:
    pytest.importorskip("av")
    sound = tone(0.1, rate=22_050)
    read = pcm.read_wave(encoded("wav", codec, sound, rate=22_050))
    assert (read.rate, read.channels) == (22_050, 1)
    differences = [abs(one - two) for one, two in zip(array("h", sound), array("h", read.samples), strict=True)]
    assert max(differences) <= off


def floats(*values: float) -> bytes:
    data = struct.pack(f"<{len(values)}f", *values)
    layout = struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32)
    return b"RIFF" + bytes(4) + b"WAVE" + b"fmt " + struct.pack("<I", 16) + layout + b"data\xff\xff\xff\xff" + data


def test_floats_are_clipped() -> None:
    read = pcm.read_wave(floats(0, 0.5, 1, -1, 3, -3, float("inf"), float("nan"), 1e-9))
    assert list(array("h", read.samples)) == [0, 16384, 32767, -32768, 32767, -32768, 32767, 0, 0]


def test_read_wav_is_written_again() -> None:
    read = pcm.read_wave(floats(0.25, -0.25))
    assert pcm.native_samples(read.to_bytes()) == array("h", [8192, -8192]).tobytes()


def test_other_chunks_are_skipped() -> None:
    sound = speech(0.1)
    plain = wav(sound)
    odd = plain[:36] + b"LIST" + (3).to_bytes(4, "little") + b"abc\0" + plain[36:] + b"more" * 3
    assert pcm.native_samples(odd) == sound
    assert pcm.read_wave(odd).samples == sound


@pytest.mark.parametrize(
    "audio",
    [
        b"",
        b"RIFF",
        wav(speech(0.1), rate=8000),
        wav(speech(0.1), channels=2),
        wav(b""),
        floats(0, 0),
        b"fLaC" + bytes(100),
    ],
)
def test_other_audio_is_not_native(audio: bytes) -> None:
    assert pcm.native_samples(audio) is None


@pytest.mark.parametrize(
    ("audio", "said"),
    [
        (b"", "RIFF header is missing"),
        (b"OggS" + bytes(99), "RIFF header is missing"),
        (b"RIFF" + bytes(4) + b"WAVE", "data chunk is missing"),
        (b"RIFF" + bytes(4) + b"WAVEdata" + bytes(8), "precedes the fmt chunk"),
        (b"RIFF" + bytes(4) + b"WAVEfmt " + (2).to_bytes(4, "little") + b"\1\0", "too short"),
        (wav(b"")[:22] + bytes(2) + wav(b"")[24:], "0 channels"),
        (wav(b"")[:20] + b"\x55\0" + wav(b"")[22:], "format 85"),
    ],
)
def test_invalid_wav_is_rejected(audio: bytes, said: str) -> None:
    with pytest.raises(BadGatewayError, match=said):
        pcm.read_wave(audio)
