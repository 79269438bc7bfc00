"""Live transcription: audio in, sentences out while it still arrives.

A stream is cut into sentences by its pauses (`speech.sentences`). The sentence that is being spoken is
transcribed again and again, in windows that overlap; words that two successive windows hear alike stay
(`speech.agreement`). One transcription of a stream is under way at a time, always of the latest audio, so that
none piles up: a slow model gives fewer partial sentences. When more speech waits than `max_pending`, no more is read,
so that the sender is held back, and nothing is lost.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.errors import UnavailableError
from engine_plugin.speech.agreement import words_of
from engine_plugin.speech.sentences import Cutter, frames, overlap_of
from engine_plugin.speech.voice import FRAME_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from engine_plugin.speech.options import LiveOptions
    from engine_plugin.speech.sentences import Spoken
    from engine_plugin.speech.subtitles import Segment

__all__ = ["Sentence", "transcribed_live"]

_SLICE = 16_000  # bytes that are looked at in one go: half a second, 0.7 ms of work
_PAUSE_HEARD = 5  # frames of the pause after a sentence; a window that had them need not be heard again
_QUEUE = 8


@dataclass(frozen=True, slots=True)
class Sentence:
    """What is known of a sentence now. Times are milliseconds from the stream's beginning."""

    number: int
    text: str
    stable: str
    """The beginning of the text that later answers keep."""
    begin_ms: int
    end_ms: int
    final: bool


if TYPE_CHECKING:
    Transcribe = Callable[[bytes], Awaitable[Sequence[Segment]]]
    """16 kHz mono s16le → what is said in it, in seconds from its beginning."""


@asynccontextmanager
async def transcribed_live(
    audio: AsyncIterator[bytes], transcribe: Transcribe, options: LiveOptions
) -> AsyncIterator[AsyncIterator[Sentence]]:
    """The sentences of a stream of 16 kHz mono s16le, partial ones and then each one's final form, in order.

    `transcribe` has one call at a time, cancelled when the block is left. The iterator ends when the audio has ended
    and all of it is transcribed, and raises what `audio` or `transcribe` raised. Called for each conversation.
    """
    stream = _Stream(transcribe, options)
    tasks = [asyncio.create_task(stream.run(work)) for work in (stream.listen(audio), stream.work())]
    try:
        yield stream.sentences()
    finally:
        stream.over = True
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


class _Stream:
    """Two tasks: one listens, one has the model transcribe. What they find goes through a short queue."""

    def __init__(self, transcribe: Transcribe, options: LiveOptions) -> None:
        self.over = False
        self._transcribe = transcribe
        self._cutter = Cutter(options)
        self._window = frames(options.window)
        self._overlap = overlap_of(options)
        self._room = frames(options.max_pending)
        self._step = min(frames(options.step), self._room, self._window)
        self._ended = False
        self._news = asyncio.Event()
        self._progress = asyncio.Event()
        self._queue: asyncio.Queue[Sentence | BaseException | None] = asyncio.Queue(_QUEUE)

    async def run(self, work: Awaitable[None]) -> None:
        """One of the tasks; its error reaches whoever iterates."""
        try:
            await work
        except asyncio.CancelledError:
            if self.over:
                raise
            await self._queue.put(UnavailableError("the transcription was cancelled by the engine's stop"))
        except Exception as error:  # noqa: BLE001  # raised again by `sentences`
            await self._queue.put(error)

    async def sentences(self) -> AsyncIterator[Sentence]:
        """What `transcribed_live` yields."""
        while (item := await self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    async def listen(self, audio: AsyncIterator[bytes]) -> None:
        """Cut what arrives into sentences, no further ahead of the model than is allowed."""
        async for data in audio:
            for place in range(0, len(data), _SLICE):
                self._cutter.hear(data[place : place + _SLICE])
                self._news.set()
                await asyncio.sleep(0)  # a big message must not keep the loop from others
                while self._cutter.pending >= self._room:
                    self._progress.clear()
                    await self._progress.wait()
        self._cutter.finish()
        self._ended = True
        self._news.set()

    async def work(self) -> None:
        """Transcribe what is due, the oldest sentence first, until all is done."""
        sentences = self._cutter.sentences
        while not (self._ended and not sentences):
            if sentences and self._is_due(sentences[0]):
                await self._advance(sentences[0])
                self._progress.set()
            else:
                self._news.clear()
                await self._news.wait()
        await self._queue.put(None)

    def _is_due(self, spoken: Spoken) -> bool:
        """Whether there is enough to transcribe; a pause is not, unless the listener waits for us."""
        new = spoken.pending >= self._step and spoken.voiced_until > spoken.heard_until
        return spoken.closed or new or spoken.pending >= self._room

    async def _advance(self, spoken: Spoken) -> None:
        """One window further, or the end of a sentence."""
        if not self._is_heard(spoken):
            await self._hear_window(spoken)
        if self._is_heard(spoken):
            self._cutter.sentences.popleft()
            spoken.agreement.cut(spoken.end * FRAME_SECONDS)
            await self._tell(spoken, final=True)
        else:
            await self._tell(spoken, final=False)

    def _is_heard(self, spoken: Spoken) -> bool:
        """Whether a window has had the end of the sentence, and nothing of the next one."""
        enough = min(spoken.voiced_until + _PAUSE_HEARD, spoken.end)
        too_much = spoken.cut_short and spoken.heard_until > spoken.end
        return spoken.closed and spoken.heard_until >= enough and not too_much

    async def _hear_window(self, spoken: Spoken) -> None:
        until = min(spoken.start + self._window, spoken.end)
        if until > spoken.start:
            segments = await self._transcribe(spoken.audio(until))
            spoken.agreement.hear(words_of(segments, spoken.start * FRAME_SECONDS))
        spoken.heard_until = until
        if until < spoken.end or until + self._step > spoken.start + self._window:
            self._move_window(spoken, until)

    def _move_window(self, spoken: Spoken, until: int) -> None:
        """Have the next window begin a little before the words that are not settled. Where windows do not agree in
        time, what this one heard is settled but for its end."""
        if spoken.closed and until >= spoken.end:
            return
        agreement = spoken.agreement
        start = frames(agreement.settled_until, 0) - self._overlap
        if start < spoken.start + self._window // 4:
            agreement.settle((until - self._overlap) * FRAME_SECONDS)
            start = until - 2 * self._overlap
        spoken.forget(min(start, until - self._overlap))

    async def _tell(self, spoken: Spoken, *, final: bool) -> None:
        text = spoken.agreement.text
        if (spoken.shown is None and not text) or (text == spoken.shown and not final):
            return
        spoken.shown = text
        end = spoken.voiced_until if final else min(spoken.heard_until, spoken.voiced_until)
        begin_ms, end_ms = (round(place * FRAME_SECONDS * 1000) for place in (spoken.begin, end))
        stable = text if final else spoken.agreement.stable
        await self._queue.put(Sentence(spoken.number, text, stable, begin_ms, max(begin_ms, end_ms), final))
