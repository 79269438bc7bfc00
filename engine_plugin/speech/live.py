"""Live transcription: audio in, sentences out while the audio still arrives.

Pauses split a stream into sentences (`speech.sentences`). The current sentence is transcribed repeatedly, in
overlapping windows; words on which two successive windows agree are confirmed (`speech.agreement`). A stream has one
transcription at a time, always of the latest audio, so requests do not pile up: a slow model yields fewer partial
sentences. While more speech than `max_pending` waits, no audio is read, so the sender is slowed down and nothing is
lost.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.errors import UnavailableError
from engine_plugin.speech.agreement import split_words
from engine_plugin.speech.sentences import SentenceSegmenter, frames, window_overlap
from engine_plugin.speech.voice_activity import FRAME_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from engine_plugin.speech.options import LiveOptions
    from engine_plugin.speech.sentences import SentenceAudio
    from engine_plugin.speech.subtitles import Segment

__all__ = ["Sentence", "transcribe_live"]

_SLICE = 16_000  # bytes that are analysed at a time: half a second, 0.7 ms of work
_PAUSE_FRAMES = 5  # a window with so many frames of the pause after a sentence is the last one
_QUEUE = 8


@dataclass(frozen=True, slots=True)
class Sentence:
    """The current state of a sentence. Times are milliseconds from the beginning of the stream."""

    number: int
    text: str
    stable: str
    """The beginning of the text, which later states keep."""
    begin_ms: int
    end_ms: int
    final: bool


if TYPE_CHECKING:
    Transcribe = Callable[[bytes], Awaitable[Sequence[Segment]]]
    """16 kHz mono s16le → its segments, in seconds from its beginning."""


@asynccontextmanager
async def transcribe_live(
    audio: AsyncIterator[bytes], transcribe: Transcribe, options: LiveOptions
) -> AsyncIterator[AsyncIterator[Sentence]]:
    """Transcribe a stream of 16 kHz mono s16le. Iterates over its sentences in order, each partial, then final.

    One call of `transcribe` runs at a time; leaving the block cancels it. The iterator ends when all audio is
    transcribed. It raises the errors of `audio` and `transcribe`.
    """
    stream = _Stream(transcribe, options)
    coroutines = (stream.segment(audio), stream.transcribe_pending())
    tasks = [asyncio.create_task(stream.run(coroutine)) for coroutine in coroutines]
    try:
        yield stream.sentences()
    finally:
        stream.is_closed = True
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class _Stream:
    """Two tasks, one that segments the audio and one that transcribes it, and the queue of their results."""

    def __init__(self, transcribe: Transcribe, options: LiveOptions) -> None:
        self.is_closed = False
        self._transcribe = transcribe
        self._segmenter = SentenceSegmenter(options)
        self._window = frames(options.window)
        self._overlap = window_overlap(options)
        self._max_pending = frames(options.max_pending)
        self._step = min(frames(options.step), self._max_pending, self._window)
        self._ended = False
        self._input = asyncio.Event()
        self._progress = asyncio.Event()
        self._queue: asyncio.Queue[Sentence | BaseException | None] = asyncio.Queue(_QUEUE)

    async def run(self, coroutine: Awaitable[None]) -> None:
        """Run one of the tasks; `sentences` raises its error."""
        try:
            await coroutine
        except asyncio.CancelledError:
            if self.is_closed:
                raise
            await self._queue.put(UnavailableError("the transcription was cancelled because the engine stopped"))
        except Exception as error:  # noqa: BLE001  # raised again by `sentences`
            await self._queue.put(error)

    async def sentences(self) -> AsyncIterator[Sentence]:
        """Yield the results. Raises the error of a task."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def segment(self, audio: AsyncIterator[bytes]) -> None:
        """Split the audio into sentences, at most `max_pending` ahead of the model."""
        async for data in audio:
            for place in range(0, len(data), _SLICE):
                self._segmenter.feed(data[place : place + _SLICE])
                self._input.set()
                await asyncio.sleep(0)  # a large message must not block the loop
                while self._segmenter.pending >= self._max_pending:
                    self._progress.clear()
                    await self._progress.wait()
        self._segmenter.finish()
        self._ended = True
        self._input.set()

    async def transcribe_pending(self) -> None:
        """Transcribe the sentences, the oldest first, until the audio has ended and none is left."""
        sentences = self._segmenter.sentences
        while not (self._ended and not sentences):
            if sentences and self._is_due(sentences[0]):
                await self._advance(sentences[0])
                self._progress.set()
            else:
                self._input.clear()
                await self._input.wait()
        await self._queue.put(None)

    def _is_due(self, sentence: SentenceAudio) -> bool:
        """Whether there is enough new speech to transcribe, or the segmenter waits."""
        new = sentence.pending >= self._step and sentence.voiced_until > sentence.transcribed_until
        return sentence.closed or new or sentence.pending >= self._max_pending

    async def _advance(self, sentence: SentenceAudio) -> None:
        """Transcribe one more window, and finish the sentence if it was the last one."""
        if not self._is_transcribed(sentence):
            await self._transcribe_window(sentence)
        if self._is_transcribed(sentence):
            self._segmenter.sentences.popleft()
            sentence.agreement.cut(sentence.end * FRAME_SECONDS)
            await self._emit(sentence, final=True)
        else:
            await self._emit(sentence, final=False)

    def _is_transcribed(self, sentence: SentenceAudio) -> bool:
        """Whether the latest window reached the end of the sentence and no further."""
        enough = min(sentence.voiced_until + _PAUSE_FRAMES, sentence.end)
        too_much = sentence.cut_short and sentence.transcribed_until > sentence.end
        return sentence.closed and sentence.transcribed_until >= enough and not too_much

    async def _transcribe_window(self, sentence: SentenceAudio) -> None:
        until = min(sentence.start + self._window, sentence.end)
        if until > sentence.start:
            segments = await self._transcribe(sentence.audio(until))
            sentence.agreement.add_window(split_words(segments, sentence.start * FRAME_SECONDS))
        sentence.transcribed_until = until
        if until < sentence.end or until + self._step > sentence.start + self._window:
            self._move_window(sentence, until)

    def _move_window(self, sentence: SentenceAudio, until: int) -> None:
        """Begin the next window shortly before the tentative words. If too few words are confirmed for that, confirm
        all but the end of this window."""
        if sentence.closed and until >= sentence.end:
            return
        agreement = sentence.agreement
        start = frames(agreement.confirmed_until, 0) - self._overlap
        if start < sentence.start + self._window // 4:
            agreement.confirm((until - self._overlap) * FRAME_SECONDS)
            start = until - 2 * self._overlap
        sentence.drop_before(min(start, until - self._overlap))

    async def _emit(self, sentence: SentenceAudio, *, final: bool) -> None:
        text = sentence.agreement.text
        if (sentence.last_text is None and not text) or (text == sentence.last_text and not final):
            return
        sentence.last_text = text
        end = sentence.voiced_until if final else min(sentence.transcribed_until, sentence.voiced_until)
        begin_ms, end_ms = (round(place * FRAME_SECONDS * 1000) for place in (sentence.begin, end))
        stable = text if final else sentence.agreement.stable
        await self._queue.put(Sentence(sentence.number, text, stable, begin_ms, max(begin_ms, end_ms), final))
