"""speech-to-text: recordings."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin import deadlines
from engine_plugin.errors import BadGatewayError, DeadlineError, InvalidRequestError, UnavailableError
from engine_plugin.speech import services
from tests.patience import LIMIT
from tests.speech.sounds import encoded, silence, spoken, tone, wav

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tests.engines.openvino.speech.conftest import Server, Speech

SOUND = spoken(0, 3)


async def transcribe(speech: Speech, audio: bytes = b"", **fields: Any) -> dict[str, Any]:
    text = base64.b64encode(audio or wav(SOUND)).decode()
    async with asyncio.timeout(LIMIT):
        answer = await speech.transcribe("served/name", {"model": "asked", "audio": text, **fields})
    shape: dict[str, Any] = json.loads(answer)
    return shape


async def test_answer_has_words_and_segments(speech: Speech, server: Server) -> None:
    answer = await transcribe(speech)
    assert answer["text"] == "word0 word1 word2"
    assert answer["model"] == "asked"
    assert [segment["text"] for segment in answer["segments"]] == ["word0", "word1", "word2"]
    assert [segment["id"] for segment in answer["segments"]] == [0, 1, 2]
    assert (answer["segments"][1]["start"], answer["segments"][1]["end"]) == (0.38, 0.68)
    assert set(answer) == {"text", "model", "segments"}
    assert server.forms == [{"model": "served/name", "timestamp_granularities[]": "segment"}]
    assert server.samples == [SOUND]


async def test_other_formats_are_converted_to_wav(speech: Speech, server: Server) -> None:
    pytest.importorskip("av")
    await transcribe(speech, encoded("mp3", "libmp3lame", tone(1, rate=44_100), rate=44_100, layout="stereo"))
    assert len(server.samples[0]) == pytest.approx(32_000, abs=2000)


@pytest.mark.promise("S13")
@pytest.mark.parametrize("form", ["json", "verbose_json", "text", "srt", "vtt"])
async def test_truncated_recording_is_marked(speech: Speech, form: str) -> None:
    assert (await transcribe(speech, wav(SOUND)[:-3200], response_format=form))["truncated"] is True
    assert "truncated" not in await transcribe(speech, wav(SOUND), response_format=form)


@pytest.mark.promise("S10")
async def test_transcription_may_take_a_minute_beyond_the_recordings_length(
    speech: Speech, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[float | None] = []

    def deadline(seconds: float | None, what: str, remedy: str) -> AbstractAsyncContextManager[None]:
        allowed.append(seconds)
        return deadlines.deadline(seconds, what, remedy)

    monkeypatch.setattr(services, "deadline", deadline)
    await transcribe(speech, wav(silence(120)))
    assert allowed == [180]
    monkeypatch.setattr(services, "_BASE_TIMEOUT", -119.9)
    server.gate.clear()
    with pytest.raises(DeadlineError, match="speech-to-text"):
        await transcribe(speech, wav(silence(120)))


async def test_options_are_passed_to_the_server(speech: Speech, server: Server) -> None:
    await transcribe(speech, language="de", temperature=0.2, timestamp_granularities=["word", "segment"])
    await transcribe(speech, language="", temperature=0, task="translate")
    first, second = server.forms
    assert first["language"] == "de"
    assert first["temperature"] == "0.2"
    assert first["timestamp_granularities[]"] == "word"
    assert (second.get("language"), second["temperature"]) == (None, "0")
    assert (first.get("task"), second["task"]) == (None, "translate")
    assert server.paths == ["/v3/audio/transcriptions", "/v3/audio/translations"]


async def test_verbose_json_has_the_additional_fields(speech: Speech, server: Server) -> None:
    words = [{"word": "a", "start": 0.0, "end": 0.3}]
    server.answer = {"text": "a", "language": "fr", "segments": [], "words": words}
    answer = await transcribe(speech, response_format="verbose_json", timestamp_granularities=["word"])
    assert answer["words"] == words
    assert (answer["task"], answer["language"], answer["duration"]) == ("transcribe", "fr", 1.14)
    assert answer["segments"] == [{"id": 0, "start": 0.0, "end": 1.14, "text": "a"}]
    assert "words" not in await transcribe(speech, response_format="verbose_json")


async def test_srt_and_vtt_are_formatted(speech: Speech) -> None:
    srt = (await transcribe(speech, response_format="srt"))["text"]
    assert srt.startswith("1\n00:00:00,000 --> 00:00:00,300\nword0\n\n2\n")
    vtt = (await transcribe(speech, response_format="vtt"))["text"]
    assert vtt.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:00.300\nword0\n\n")
    assert (await transcribe(speech, response_format="text"))["text"] == "word0 word1 word2"


async def test_segments_are_clamped_to_the_audio(speech: Speech, server: Server) -> None:
    """Models may omit or guess the end of the last segment."""
    times = [(-0.5, 0.4), (0.4, 99), (0.9, -1)]
    server.answer = {
        "text": "",
        "segments": [{"id": 0, "start": start, "end": end, "text": "x"} for start, end in times],
    }
    found = [(segment["start"], segment["end"]) for segment in (await transcribe(speech))["segments"]]
    assert found == [(0, 0.4), (0.4, 1.14), (0.9, 1.14)]


async def test_very_short_audio_is_padded(speech: Speech, server: Server) -> None:
    await transcribe(speech, wav(tone(0.01)))
    assert len(server.samples[0]) == 3200


@pytest.mark.parametrize("audio", ["hello.mp3", base64.b64encode(b"no sound " * 99).decode(), ""])
async def test_undecodable_audio_is_rejected(speech: Speech, server: Server, audio: str) -> None:
    pytest.importorskip("av")
    async with asyncio.timeout(LIMIT):
        with pytest.raises(InvalidRequestError, match=r"^audio: "):
            await speech.transcribe("m", {"model": "m", "audio": audio})
    assert server.forms == []


@pytest.mark.parametrize(
    ("status", "kind"), [(400, InvalidRequestError), (503, UnavailableError), (500, BadGatewayError)]
)
async def test_error_of_the_server_is_raised(
    speech: Speech, server: Server, status: int, kind: type[Exception]
) -> None:
    server.refusal = (status, "language: xx is not supported")
    with pytest.raises(kind, match="xx is not supported"):
        await transcribe(speech)


@pytest.mark.parametrize("answer", [[], "text", {"segments": [{"start": 1}]}, {"segments": ["x"]}])
async def test_invalid_answer_of_the_server_is_reported(speech: Speech, server: Server, answer: object) -> None:
    server.answer = answer
    with pytest.raises(BadGatewayError, match="the engine's transcription"):
        await transcribe(speech)


async def test_cancelled_call_reaches_the_server(speech: Speech, server: Server) -> None:
    server.gate.clear()
    task = asyncio.create_task(transcribe(speech))
    async with asyncio.timeout(LIMIT):
        await server.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await server.cancelled.wait()
