"""Audio in base64."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest

from engine_plugin.errors import InvalidRequestError
from engine_plugin.speech.base64_audio import decode_base64_audio

SOUND = bytes(range(256)) * 3


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(SOUND).decode(),
        "data:audio/wav;base64," + base64.b64encode(SOUND).decode(),
        base64.encodebytes(SOUND).decode(),
        base64.b64encode(SOUND).decode().replace("A", "A\r\n "),
    ],
    ids=["plain", "url", "lines", "spaces"],
)
async def test_base64_and_data_urls_are_decoded(text: str) -> None:
    assert await decode_base64_audio(text) == SOUND


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
async def test_missing_padding_is_accepted(length: int) -> None:
    text = base64.b64encode(SOUND[:length]).decode()
    assert await decode_base64_audio(text) == await decode_base64_audio(text.rstrip("=")) == SOUND[:length]


@pytest.mark.parametrize("size", [3 << 20, (3 << 20) + 1, 786_432, 786_433])
async def test_large_audio_does_not_block_the_loop(size: int) -> None:
    sound = os.urandom(size)
    text = base64.encodebytes(sound).decode()
    task = asyncio.create_task(decode_base64_audio(text))
    turns = 0
    while not task.done():
        turns += 1
        await asyncio.sleep(0)
    assert task.result() == sound
    assert turns > 1


@pytest.mark.parametrize(
    "text",
    [
        "hello.wav",
        "/home/me/hello.wav",
        "https://example.org/hello.wav",
        "AAAA=AAA",
        "AAA=AAAA",
        "A",
        "AA==AA==",
        "====",
        "ÄÄÄÄ",
        "AAAA" * 262_143 + "AA==" + "AAAA" * 4,
        "AAAA" * 262_144 + "=",
    ],
    ids=lambda text: text[:10],
)
async def test_invalid_base64_is_rejected(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="audio: is not valid base64"):
        await decode_base64_audio(text)


@pytest.mark.parametrize("text", ["data:audio/wav,AAAA", "data:audio/wav;base64AAAA", "data:"])
async def test_data_url_without_base64_is_rejected(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="audio: is not valid base64: a data: URL must be in base64"):
        await decode_base64_audio(text)


@pytest.mark.parametrize("text", ["", "\n", "data:audio/wav;base64,"])
async def test_empty_audio_is_rejected(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="audio: is empty"):
        await decode_base64_audio(text)
