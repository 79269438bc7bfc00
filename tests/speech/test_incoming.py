"""Sound in base64."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest

from engine_plugin.errors import InvalidRequestError
from engine_plugin.speech.incoming import sound_of

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
async def test_base64_and_urls(text: str) -> None:
    assert await sound_of(text) == SOUND


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
async def test_padding_may_lack(length: int) -> None:
    text = base64.b64encode(SOUND[:length]).decode()
    assert await sound_of(text) == await sound_of(text.rstrip("=")) == SOUND[:length]


@pytest.mark.parametrize("size", [3 << 20, (3 << 20) + 1, 786_432, 786_433])
async def test_big_ones_leave_the_loop_to_others(size: int) -> None:
    sound = os.urandom(size)
    text = base64.encodebytes(sound).decode()
    task = asyncio.create_task(sound_of(text))
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
async def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="audio: is not base64 of a sound file"):
        await sound_of(text)


@pytest.mark.parametrize("text", ["data:audio/wav,AAAA", "data:audio/wav;base64AAAA", "data:"])
async def test_data_urls_without_base64(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="audio: is a data: URL without base64"):
        await sound_of(text)


@pytest.mark.parametrize("text", ["", "\n", "data:audio/wav;base64,"])
async def test_nothing(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="audio: is empty"):
        await sound_of(text)
