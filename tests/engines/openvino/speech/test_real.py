"""The speech services on the embedded server with real models. Their weights are random, and so are their answers."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from engine_plugin.errors import InvalidRequestError
from engine_plugin.transport.http1 import Http1Client
from tests.engines.openvino.speech.conftest import speech_on
from tests.engines.openvino.speech.test_live import ALL, FINISH, Talk, cut, run, sent
from tests.extras import needs
from tests.openvino_server.embedded import embedded_server
from tests.patience import LIMIT
from tests.speech.sounds import silence, speech, wav

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.engines.openvino.speech.conftest import Speech

needs("openvino_genai")

MODELS = ("tiny-transcribe", "tiny-speak")
KEY = "only-for-this-test"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def port(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[int]:
    """The server with both models loaded."""
    async with embedded_server(tmp_path_factory.mktemp("served"), MODELS, KEY) as address:
        yield int(address.rpartition(":")[2])


@pytest.fixture
async def real(port: int, tmp_path: Path) -> AsyncIterator[Speech]:
    http = Http1Client(("127.0.0.1", port), {"authorization": f"Bearer {KEY}"})
    async with asyncio.timeout(LIMIT), speech_on(http, tmp_path / "output") as made:
        yield made


async def test_recording_is_transcribed(real: Speech) -> None:
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(speech(2.0))).decode()}
    answer = json.loads(await real.transcribe("tiny-transcribe", {**request, "response_format": "verbose_json"}))
    assert answer["duration"] == 2.0
    assert isinstance(answer["text"], str)
    for segment in answer["segments"]:
        assert 0 <= segment["start"] <= segment["end"] <= 2.0
    assert json.loads(await real.transcribe("tiny-transcribe", request))["text"] == answer["text"], "not by chance"


async def test_recording_of_one_sample_is_transcribed(real: Speech) -> None:
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(b"\0\0")).decode()}
    assert "text" in json.loads(await real.transcribe("tiny-transcribe", request))


async def test_unknown_language_is_rejected(real: Speech) -> None:
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(speech(0.5))).decode(), "language": "xx"}
    with pytest.raises(InvalidRequestError, match="language"):
        await real.transcribe("tiny-transcribe", request)


async def test_generated_speech_can_be_transcribed(real: Speech) -> None:
    spoken = json.loads(await real.speak("tiny-speak", {"model": "tiny-speak", "text": "Hi."}))
    assert spoken["duration"] > 0
    request = {"model": "tiny-transcribe", "audio": spoken["audio"], "response_format": "srt"}
    assert isinstance(json.loads(await real.transcribe("tiny-transcribe", request))["text"], str)


async def test_live_stream_is_transcribed(real: Speech) -> None:
    talk = Talk(real, "{}")
    sound = silence(0.5) + speech(2) + silence(1.2) + speech(1.5) + silence(1)
    await talk.hold(sent([run(model="tiny-transcribe", language="en"), *cut(sound, format="pcm"), FINISH]))
    assert talk.kinds in (ALL, ["task-started", "task-finished"])
    times = [(sentence["begin_time"], sentence["end_time"]) for sentence in talk.final]
    assert all(400 <= begin <= end <= 6200 for begin, end in times)
    assert times == sorted(times)


async def test_live_streams_and_a_recording_are_transcribed_at_once(real: Speech) -> None:
    talks = [Talk(real, "{}"), Talk(real, "{}")]
    messages = [run(model="tiny-transcribe"), *cut(speech(3) + silence(1), format="pcm"), FINISH]
    request = {"model": "tiny-transcribe", "audio": base64.b64encode(wav(speech(1.0))).decode()}
    recording = asyncio.create_task(real.transcribe("tiny-transcribe", request))
    await asyncio.gather(recording, *(talk.hold(sent(messages)) for talk in talks))
    assert [talk.kinds[-1] for talk in talks] == ["task-finished"] * 2
    times = [[(sentence["begin_time"], sentence["end_time"]) for sentence in talk.final] for talk in talks]
    assert times[0] == times[1]
    assert "segments" in json.loads(recording.result())
