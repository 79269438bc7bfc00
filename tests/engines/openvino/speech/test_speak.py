"""text-to-speech: answers and files."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import stat
import sys
import time
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError
from engine_plugin.transport.http1 import Http1Client
from tests.engines.openvino.speech.conftest import SPOKEN_RATE, speech_on
from tests.patience import LIMIT
from tests.speech.sounds import wav

if TYPE_CHECKING:
    from tests.engines.openvino.speech.conftest import Server, Speech


async def speak(speech: Speech, **fields: Any) -> dict[str, Any]:
    async with asyncio.timeout(LIMIT):
        shape: dict[str, Any] = json.loads(await speech.speak("served", {"model": "asked", **fields}))
    return shape


def contents(url: str) -> bytes:
    path = Path(url)
    assert path.is_absolute()
    return path.read_bytes()


def there(url: str) -> bool:
    return Path(url).exists()


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_wav_is_in_the_answer_and_in_a_file(speech: Speech, server: Server) -> None:
    answer = await speak(speech, text="Hello.", voice="amy", speed=1.5, language="en")
    data = base64.b64decode(answer.pop("audio"))
    assert contents(answer.pop("url")) == data
    assert answer == {"format": "wav", "sample_rate": SPOKEN_RATE, "duration": 0.5, "model": "asked"}
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, SPOKEN_RATE)
        assert file.getnframes() == SPOKEN_RATE // 2
    asked = {"voice": "amy", "speed": 1.5, "language": "en"}
    assert server.bodies == [{"model": "served", "input": "Hello.", "response_format": "wav", **asked}]


async def test_input_is_an_alias_of_text(speech: Speech, server: Server) -> None:
    await speak(speech, input="Hi.", voice=None)
    assert server.bodies == [{"model": "served", "input": "Hi.", "response_format": "wav"}]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
async def test_files_are_for_this_user_only(speech: Speech) -> None:
    path = Path((await speak(speech, text="x"))["url"])
    assert permissions(path) == 0o600
    assert permissions(path.parent) == 0o700
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208  # not in async code


async def test_only_the_newest_files_are_kept(server: Server, tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    stale, fresh = output / "speech-1.part", output / "speech-2.part"
    for path in (stale, fresh):
        path.write_bytes(b"half")
    os.utime(stale, (1, 1))
    async with speech_on(Http1Client(("127.0.0.1", server.port)), output, max_files=3) as speech:
        urls = []
        for number in range(5):
            urls.append((await speak(speech, text="x"))["url"])
            os.utime(urls[-1], (number + 1, time.time() - 100 + number))
        answers = await asyncio.gather(*(speak(speech, text="x") for _ in range(6)))
    left = {entry.name for entry in output.iterdir()}
    assert {"notes.txt", "speech-2.part"} < left
    assert len(left) == 5, left
    assert not left & {Path(url).name for url in urls[:2]}
    assert any(there(answer["url"]) for answer in answers)


async def test_unwritable_folder_is_reported(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    async with speech_on(Http1Client(("127.0.0.1", server.port)), tmp_path / "file" / "output") as speech:
        with pytest.raises(EnginePluginError, match="cannot write the audio file"):
            await speak(speech, text="x")


@pytest.mark.parametrize("sound", [b"", b"ID3 mp3 it is", wav(b"")])
async def test_invalid_audio_of_the_engine_is_reported(speech: Speech, server: Server, sound: bytes) -> None:
    server.wav = sound
    with pytest.raises(BadGatewayError, match="engine"):
        await speak(speech, text="x")


async def test_error_of_the_server_is_raised(speech: Speech, server: Server) -> None:
    server.refusal = (400, "voice: 'bob' is not one of amy")
    with pytest.raises(InvalidRequestError, match="'bob' is not one of amy"):
        await speak(speech, text="x", voice="bob")


async def test_cancelled_call_reaches_the_server(speech: Speech, server: Server) -> None:
    server.gate.clear()
    task = asyncio.create_task(speak(speech, text="x"))
    async with asyncio.timeout(LIMIT):
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.cancelled.wait()
