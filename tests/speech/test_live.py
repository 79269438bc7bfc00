"""Live transcription with a model that transcribes perfectly or not at all."""

from __future__ import annotations

import asyncio
import dataclasses
import tracemalloc
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from engine_plugin.errors import BadGatewayError
from engine_plugin.speech.live import Sentence, transcribe_live
from engine_plugin.speech.options import LiveOptions
from engine_plugin.speech.subtitles import Segment
from tests.patience import LIMIT
from tests.speech.sounds import GAP, WORD, Listener, noise, silence, speech, spoken, tone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

A_WORD = (WORD + GAP) * 0.02
OPTIONS = LiveOptions()


async def pieces(sound: bytes, size: int = 3200) -> AsyncIterator[bytes]:
    """Yield the audio in messages, with a turn of the event loop after each one, as a network does."""
    for place in range(0, len(sound), size):
        yield sound[place : place + size]
        for _ in range(5):
            await asyncio.sleep(0)


class Model:
    """Transcribes with a `Listener`; waits while `gate` is not set."""

    def __init__(self) -> None:
        self.listener = Listener()
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = 0
        self.cancelled = 0

    async def transcribe(self, samples: bytes) -> list[Segment]:
        self.busy += 1
        assert self.busy == 1, "one at a time"
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.busy -= 1
        return self.listener.hear(samples)


async def heard(
    sound: bytes, options: LiveOptions = OPTIONS, *, model: Model | None = None, size: int = 3200
) -> list[Sentence]:
    """All states of the sentences of a stream."""
    transcribe = (model or Model()).transcribe
    async with asyncio.timeout(LIMIT), transcribe_live(pieces(sound, size), transcribe, options) as sentences:
        return [sentence async for sentence in sentences]


def final(told: list[Sentence]) -> list[Sentence]:
    return [sentence for sentence in told if sentence.final]


def words(first: int, count: int) -> list[str]:
    return [f"word{number}" for number in range(first, first + count)]


async def test_each_pause_ends_a_sentence() -> None:
    sound = silence(1) + spoken(0, 4) + silence(1.5) + spoken(4, 3) + silence(1)
    first, second = final(await heard(sound))
    assert first.text.split() == words(0, 4)
    assert second.text.split() == words(4, 3)
    begin = 1000 + round(4 * A_WORD * 1000) + 1500
    assert (first.number, second.number) == (0, 1)
    assert first.begin_ms == pytest.approx(1000, abs=60)
    assert first.end_ms == pytest.approx(1000 + 4 * A_WORD * 1000 - GAP * 20, abs=60)
    assert second.begin_ms == pytest.approx(begin, abs=60)


async def test_speech_yields_partial_sentences() -> None:
    told = await heard(silence(0.5) + spoken(0, 12) + silence(1))
    partial = [sentence for sentence in told if not sentence.final]
    assert len(partial) >= 3
    assert told[-1].final
    assert told[-1].text.split() == words(0, 12)
    lengths = [len(sentence.text.split()) for sentence in told]
    assert lengths == sorted(lengths)
    assert {sentence.begin_ms for sentence in told} == {told[0].begin_ms}


async def test_confirmed_words_stay() -> None:
    told = await heard(spoken(0, 20) + silence(1))
    for before, after in pairwise(told):
        assert before.text.startswith(before.stable)
        assert after.stable.startswith(before.stable)
        assert after.text.startswith(before.stable)
    stable = [sentence.stable for sentence in told if not sentence.final]
    assert any(stable)
    assert not [text for text in stable if "wo1" in text.split()[-1:]], "a word that was cut never settles"


@pytest.mark.parametrize(
    "sound",
    [partial(silence, 5), partial(noise, 5, 0.0005), partial(tone, 6, 50, 0.02), lambda: b"", lambda: b"\x01"],
    ids=["silence", "dither", "hum", "nothing", "half a sample"],
)
async def test_sound_without_speech_yields_no_sentence(sound: Callable[[], bytes]) -> None:
    model = Model()
    assert await heard(sound(), model=model) == []
    assert model.listener.windows == []


@pytest.mark.promise("T5")
@pytest.mark.parametrize("seconds", [0.5, 4, 11])
async def test_stream_of_speech_only_is_one_sentence(seconds: float) -> None:
    model = Model()
    await heard(tone(seconds, 440, 0.05), model=model)
    assert sum(model.listener.windows) >= seconds


async def test_end_of_stream_ends_the_sentence() -> None:
    told = await heard(silence(0.5) + spoken(0, 2))
    assert [sentence.text.split() for sentence in final(told)] == [words(0, 2)]


@pytest.mark.parametrize("size", [640, 1001, 32_000, 10_000_000])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"window": 4.0, "overlap": 1.0},
        {"window": 3.0, "step": 0.3, "longest_sentence": 600.0},
        {"window": 2.0, "overlap": 7.0, "longest_sentence": 6.0},
        {"longest_sentence": 3.0, "overlap": 0.8},
        {"max_pending": 1.0, "step": 5.0},
        {"silence": 5.0, "window": 2.5, "max_pending": 2.0},
        {"lead": 0.0},
        {"lead": 2.0, "shortest_speech": 0.02},
    ],
    ids=str,
)
async def test_every_word_is_transcribed_once_and_in_order(changes: dict[str, float], size: int) -> None:
    """For any window, length of speech and size of messages."""
    sound = silence(0.4) + spoken(0, 30) + silence(1.2) + spoken(30, 5) + silence(0.3) + spoken(35, 8)
    model = Model()
    options = dataclasses.replace(OPTIONS, **changes)
    told = final(await heard(sound, options, model=model, size=size))
    assert " ".join(sentence.text for sentence in told).split() == words(0, 43)
    assert max(model.listener.windows) <= options.window + 0.01
    times = [time for sentence in told for time in (sentence.begin_ms, sentence.end_ms)]
    assert times == sorted(times)
    assert [sentence.number for sentence in told] == sorted({sentence.number for sentence in told})


@asynccontextmanager
async def gated(
    sound: bytes, options: LiveOptions, model: Model
) -> AsyncIterator[tuple[AsyncIterator[Sentence], Callable[[], int]]]:
    """A stream with a blocked model. Return how many bytes it read before it stopped reading."""
    read = 0

    async def source() -> AsyncIterator[bytes]:
        nonlocal read
        async for piece in pieces(sound):
            read += len(piece)
            yield piece

    model.gate.clear()
    async with asyncio.timeout(LIMIT), transcribe_live(source(), model.transcribe, options) as sentences:
        before = -1
        while read != before or not model.busy:
            before = read
            for _ in range(200):
                await asyncio.sleep(0)
        yield sentences, lambda: read


async def test_fast_sender_is_slowed_down_without_loss() -> None:
    model = Model()
    sound = b"".join(spoken(number, 10) + silence(1) for number in range(0, 100, 10))
    options = dataclasses.replace(OPTIONS, max_pending=6.0)
    async with gated(sound, options, model) as (sentences, read):
        assert read() / 32_000 < 6 + 3.5, "what may wait, the pauses between, and a message"
        model.gate.set()
        told = final([sentence async for sentence in sentences])
    assert " ".join(sentence.text for sentence in told).split() == words(0, 100)


async def test_slow_model_skips_partial_sentences() -> None:
    """A slow model transcribes a finished sentence once, without its partial states."""
    model = Model()
    sound = b"".join(spoken(number, 10) + silence(1) for number in range(0, 50, 10))
    async with gated(sound, dataclasses.replace(OPTIONS, max_pending=60.0), model) as (sentences, read):
        assert read() == len(sound)
        model.gate.set()
        told = [sentence async for sentence in sentences]
    assert len(model.listener.windows) <= 6
    assert len(final(told)) == 5


async def test_two_streams_run_at_once() -> None:
    one, two = Model(), Model()
    first, second = await asyncio.gather(
        heard(spoken(0, 15) + silence(1), model=one),
        heard(silence(0.3) + spoken(50, 15) + silence(1), model=two),
    )
    assert final(first)[0].text.split() == words(0, 15)
    assert final(second)[0].text.split() == words(50, 15)


async def test_leaving_the_block_cancels_model_and_source() -> None:
    model = Model()
    async with gated(spoken(0, 10), OPTIONS, model):
        pass
    assert (model.cancelled, model.busy) == (1, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_error_of_the_model_is_raised() -> None:
    async def broken(_samples: bytes) -> list[Segment]:
        raise BadGatewayError("the engine died")

    async with asyncio.timeout(LIMIT):
        async with transcribe_live(pieces(spoken(0, 90)), broken, OPTIONS) as sentences:
            with pytest.raises(BadGatewayError, match="the engine died"):
                await anext(sentences)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_error_of_the_source_is_raised() -> None:
    async def source() -> AsyncIterator[bytes]:
        yield silence(1)
        raise ValueError("no more")

    async with asyncio.timeout(LIMIT), transcribe_live(source(), Model().transcribe, OPTIONS) as sentences:
        with pytest.raises(ValueError, match="no more"):
            await anext(sentences)


async def test_cancelled_transcription_ends_the_stream_with_an_error() -> None:
    async def stopped(_samples: bytes) -> list[Segment]:
        raise asyncio.CancelledError

    async with asyncio.timeout(LIMIT), transcribe_live(pieces(spoken(0, 9)), stopped, OPTIONS) as sentences:
        with pytest.raises(Exception, match="cancelled because the engine stopped"):
            await anext(sentences)


async def test_large_message_does_not_block_the_loop() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    await heard(silence(60), size=10_000_000)
    task.cancel()
    assert turns > 100


async def test_memory_of_a_long_stream_is_bounded() -> None:
    """Of 2.2 MB of audio, one window and the pending speech are kept."""
    sound = spoken(0, 40) + silence(2)

    async def source() -> AsyncIterator[bytes]:
        for _ in range(4):
            yield sound

    model = Model()
    options = dataclasses.replace(OPTIONS, window=3.0, max_pending=2.0)
    async with asyncio.timeout(LIMIT), transcribe_live(source(), model.transcribe, options) as sentences:
        await anext(sentences)
        tracemalloc.start()
        try:
            count = len(final([sentence async for sentence in sentences]))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert count >= 4
    assert peak < 1 << 20


async def test_speech_without_words_yields_no_sentence() -> None:
    """A cough, which the model transcribes as an empty text."""
    asked = 0

    async def deaf(_samples: bytes) -> list[Segment]:
        nonlocal asked
        asked += 1
        return []

    sound = silence(1) + speech(1.5) + silence(1)
    async with asyncio.timeout(LIMIT), transcribe_live(pieces(sound), deaf, OPTIONS) as sentences:
        assert [sentence async for sentence in sentences] == []
    assert asked


async def test_partial_sentence_that_becomes_empty_is_retracted() -> None:
    said = ["maybe"]

    async def fickle(_samples: bytes) -> list[Segment]:
        return [Segment(0, 1, said.pop())] if said else []

    sound = spoken(0, 5) + silence(1)
    async with asyncio.timeout(LIMIT), transcribe_live(pieces(sound), fickle, OPTIONS) as sentences:
        told = [(sentence.text, sentence.final) async for sentence in sentences]
    assert told[0] == ("maybe", False)
    assert told[-1] == ("", True)
