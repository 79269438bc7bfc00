"""Splits a live stream into sentences at its pauses. Synchronous, without a clock: samples in, sentences out."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from engine_plugin.speech.agreement import LocalAgreement
from engine_plugin.speech.voice_activity import (
    FRAME_BYTES,
    FRAME_SECONDS,
    LOUDEST_FIRST_BACKGROUND,
    VoiceActivityDetector,
    level,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine_plugin.speech.options import LiveOptions

__all__ = ["SentenceAudio", "SentenceSegmenter", "frames", "window_overlap"]


def frames(seconds: float, least: int = 1) -> int:
    """Convert seconds to frames, at least `least`."""
    return max(least, round(seconds / FRAME_SECONDS))


def window_overlap(options: LiveOptions) -> int:
    """How many frames two windows share. A long sentence is split within its last frames of this number."""
    return min(frames(options.overlap), frames(options.window) // 4)


class SentenceAudio:
    """The audio of one sentence and how far it is transcribed. Positions are frames from the start of the stream."""

    def __init__(self, number: int, start: int, begin: int, audio: bytes, tail: int) -> None:
        self.number = number
        self.begin = begin
        """The beginning of the speech; the audio begins earlier."""
        self.start = start
        """The beginning of the kept audio; the words before it are confirmed."""
        self.voiced_until = 0
        """The end of the latest speech; 0 before any speech."""
        self.transcribed_until = start
        """The end of the latest window."""
        self.closed = False
        self.cut_short = False
        """Whether the speech continues after the end."""
        self.last_text: str | None = None
        """The text that was sent last."""
        self.agreement = LocalAgreement()
        self._audio = bytearray(audio)
        self._tail: deque[tuple[float, bool]] = deque(maxlen=tail)

    @property
    def end(self) -> int:
        """The end of the audio."""
        return self.start + len(self._audio) // FRAME_BYTES

    @property
    def pending(self) -> int:
        """The number of frames after the latest window."""
        return max(0, self.end - self.transcribed_until)

    def add(self, frame: bytes, loudness: float, *, speech: bool) -> None:
        self._audio += frame
        self._tail.append((loudness, speech))
        if speech:
            self.voiced_until = self.end

    def audio(self, until: int) -> bytes:
        """The kept audio before `until`."""
        return bytes(self._audio[: (until - self.start) * FRAME_BYTES])

    def drop_before(self, until: int) -> None:
        """Free the audio before `until`."""
        if until > self.start:
            del self._audio[: (until - self.start) * FRAME_BYTES]
            self.start = until

    def cut(self, at: int) -> bytes:
        """End the audio at `at`; returns the audio after it."""
        place = max(0, at - self.start) * FRAME_BYTES
        after = bytes(self._audio[place:])
        del self._audio[place:]
        return after

    def split(self) -> SentenceAudio:
        """End the sentence at the quietest of the last frames; returns the sentence that begins there."""
        tail = list(self._tail)
        quietest = min(range(len(tail)), key=lambda index: tail[index][0])
        first = self.end - len(tail)
        at = first + quietest
        rest = SentenceAudio(self.number + 1, at, at, b"", self._tail.maxlen or 1)
        after = self.cut(at)
        for index, (loudness, speech) in enumerate(tail[quietest:]):
            rest.add(after[index * FRAME_BYTES : (index + 1) * FRAME_BYTES], loudness, speech=speech)
        self.voiced_until = min(self.voiced_until, at)
        self.closed = self.cut_short = True
        return rest


class SentenceSegmenter:
    """Splits one stream into sentences. `sentences` holds them in order; the caller removes each one when it is
    transcribed."""

    def __init__(self, options: LiveOptions) -> None:
        self._silence = frames(options.silence)
        self._longest = frames(options.longest_sentence)
        self._lead = frames(options.lead, 0)
        self._attack = frames(options.shortest_speech)
        self._tail = min(window_overlap(options), self._longest // 2)
        self._detector = VoiceActivityDetector(options.speech_threshold, options.quietest, self._attack)
        self._before: deque[bytes] = deque(maxlen=self._lead + self._attack)
        self._remainder = b""
        self._now = 0
        self._count = 0
        self._open: SentenceAudio | None = None
        self._open_since = 0
        # A recording that consists of speech only has no background by which speech is detected. The audio before the
        # first sentence is kept, so that a stream without any becomes one sentence.
        self._before_first: deque[tuple[float, bytes]] = deque(maxlen=frames(options.window))
        self.sentences: deque[SentenceAudio] = deque()

    @property
    def pending(self) -> int:
        """The number of frames that wait to be transcribed."""
        return sum(sentence.pending for sentence in self.sentences)

    def feed(self, audio: bytes) -> None:
        """Add audio: 16 kHz mono s16le, any number of bytes."""
        data = self._remainder + audio
        whole = len(data) - len(data) % FRAME_BYTES
        for place in range(0, whole, FRAME_BYTES):
            self._feed_frame(data[place : place + FRAME_BYTES])
        self._remainder = data[whole:]

    def finish(self) -> None:
        """End the stream and its current sentence. A loud stream without a sentence becomes one."""
        if len(self._remainder) > 1:
            self.feed(bytes(FRAME_BYTES - len(self._remainder)))
        if any(loudness >= LOUDEST_FIRST_BACKGROUND for loudness, _ in self._before_first):
            self._begin([frame for _, frame in self._before_first], len(self._before_first))
        if self._open is not None:
            self._close(self._open)

    def _feed_frame(self, frame: bytes) -> None:
        loudness = level(frame)
        speech = self._detector.update(loudness)
        self._now += 1
        if self._open is None:
            self._before.append(frame)
            if not self._count:
                self._before_first.append((loudness, frame))
            if speech:
                self._begin(self._before, self._attack)
            return
        self._open.add(frame, loudness, speech=speech)
        if self._now - max(self._open.voiced_until, self._open.begin) >= self._silence:
            self._close(self._open)
        elif self._now - self._open_since >= self._longest:
            self._append(self._open.split())

    def _begin(self, before: Iterable[bytes], voiced: int) -> None:
        """Begin a sentence with the frames `before`, the last `voiced` of which are speech."""
        audio = b"".join(before)
        self._before.clear()
        self._before_first.clear()
        start = self._now - len(audio) // FRAME_BYTES
        begin = max(start, self._now - voiced)
        sentence = SentenceAudio(self._count, start, begin, audio, self._tail)
        sentence.voiced_until = self._now
        self._append(sentence)

    def _append(self, sentence: SentenceAudio) -> None:
        self._count = sentence.number + 1
        self._open, self._open_since = sentence, sentence.begin
        self.sentences.append(sentence)

    def _close(self, sentence: SentenceAudio) -> None:
        """End a sentence. The pause after it can become the lead of the next one."""
        self._open = None
        sentence.closed = True
        pause = sentence.audio(sentence.end)[-self._silence * FRAME_BYTES :]
        self._before.extend(pause[place : place + FRAME_BYTES] for place in range(0, len(pause), FRAME_BYTES))
        if not sentence.voiced_until:  # the rest of a long sentence that was split
            self.sentences.pop()
            return
        sentence.cut(sentence.voiced_until + self._lead)
