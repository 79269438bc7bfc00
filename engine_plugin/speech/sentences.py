"""Cutting a live stream into sentences, by pauses. No clock and no tasks: samples in, sentences out."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from engine_plugin.speech.agreement import Agreement
from engine_plugin.speech.voice import (
    FRAME_BYTES,
    FRAME_SECONDS,
    LOUDEST_FIRST_BACKGROUND,
    VoiceDetector,
    level,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engine_plugin.speech.options import LiveOptions

__all__ = ["Cutter", "Spoken", "frames", "overlap_of"]


def frames(seconds: float, least: int = 1) -> int:
    """A length of time in whole frames."""
    return max(least, round(seconds / FRAME_SECONDS))


def overlap_of(options: LiveOptions) -> int:
    """How many frames two windows share. A sentence is split within as many, so that the split is where audio is."""
    return min(frames(options.overlap), frames(options.window) // 4)


class Spoken:
    """One sentence's audio, and how far it is transcribed. All places are frames from the stream's beginning."""

    def __init__(self, number: int, start: int, begin: int, audio: bytes, tail: int) -> None:
        self.number = number
        self.begin = begin
        """Where the speech begins; the audio begins earlier."""
        self.start = start
        """Where the kept audio begins; what is before it was transcribed for good."""
        self.voiced_until = 0
        """Where the latest speech ends; 0 as long as there was none."""
        self.heard_until = start
        """Where the latest window ended."""
        self.closed = False
        self.cut_short = False
        """Whether speech goes on where it ends."""
        self.shown: str | None = None
        """The text that was last told."""
        self.agreement = Agreement()
        self._audio = bytearray(audio)
        self._tail: deque[tuple[float, bool]] = deque(maxlen=tail)

    @property
    def end(self) -> int:
        """Where the audio ends."""
        return self.start + len(self._audio) // FRAME_BYTES

    @property
    def pending(self) -> int:
        """Frames that no window has heard."""
        return max(0, self.end - self.heard_until)

    def add(self, frame: bytes, loudness: float, *, speech: bool) -> None:
        """One frame more."""
        self._audio += frame
        self._tail.append((loudness, speech))
        if speech:
            self.voiced_until = self.end

    def audio(self, until: int) -> bytes:
        """The kept audio up to a place."""
        return bytes(self._audio[: (until - self.start) * FRAME_BYTES])

    def forget(self, until: int) -> None:
        """Free what is before a place."""
        if until > self.start:
            del self._audio[: (until - self.start) * FRAME_BYTES]
            self.start = until

    def cut(self, at: int) -> bytes:
        """End the audio at a place; returns what was after it."""
        place = max(0, at - self.start) * FRAME_BYTES
        after = bytes(self._audio[place:])
        del self._audio[place:]
        return after

    def split(self) -> Spoken:
        """End it at the quietest of the last frames; returns the sentence that begins there."""
        tail = list(self._tail)
        quietest = min(range(len(tail)), key=lambda index: tail[index][0])
        first = self.end - len(tail)
        at = first + quietest
        rest = Spoken(self.number + 1, at, at, b"", self._tail.maxlen or 1)
        after = self.cut(at)
        for index, (loudness, speech) in enumerate(tail[quietest:]):
            rest.add(after[index * FRAME_BYTES : (index + 1) * FRAME_BYTES], loudness, speech=speech)
        self.voiced_until = min(self.voiced_until, at)
        self.closed = self.cut_short = True
        return rest


class Cutter:
    """Finds the sentences of one stream. `sentences` holds those that are not transcribed to the end; whoever does
    that removes the first."""

    def __init__(self, options: LiveOptions) -> None:
        self._silence = frames(options.silence)
        self._longest = frames(options.longest_sentence)
        self._lead = frames(options.lead, 0)
        self._attack = frames(options.shortest_speech)
        self._tail = min(overlap_of(options), self._longest // 2)
        self._detector = VoiceDetector(options.speech_threshold, options.quietest, self._attack)
        self._before: deque[bytes] = deque(maxlen=self._lead + self._attack)
        self._rest = b""
        self._now = 0
        self._count = 0
        self._open: Spoken | None = None
        self._open_since = 0
        # A recording that is speech from its first to its last frame shows no background to tell speech from. What
        # came before the first sentence is kept, so that a stream without any is heard as one.
        self._unspoken: deque[tuple[float, bytes]] = deque(maxlen=frames(options.window))
        self.sentences: deque[Spoken] = deque()

    @property
    def pending(self) -> int:
        """Frames of speech that no window has heard."""
        return sum(spoken.pending for spoken in self.sentences)

    def hear(self, audio: bytes) -> None:
        """Take more of the stream: 16 kHz mono s16le, any number of bytes."""
        data = self._rest + audio
        whole = len(data) - len(data) % FRAME_BYTES
        for place in range(0, whole, FRAME_BYTES):
            self._hear_frame(data[place : place + FRAME_BYTES])
        self._rest = data[whole:]

    def finish(self) -> None:
        """The stream is over: what is being said is a sentence, and so is all of a loud stream that had none."""
        if len(self._rest) > 1:
            self.hear(bytes(FRAME_BYTES - len(self._rest)))
        if any(loudness >= LOUDEST_FIRST_BACKGROUND for loudness, _ in self._unspoken):
            self._begin([frame for _, frame in self._unspoken], len(self._unspoken))
        if self._open is not None:
            self._close(self._open)

    def _hear_frame(self, frame: bytes) -> None:
        loudness = level(frame)
        speech = self._detector.hear(loudness)
        self._now += 1
        if self._open is None:
            self._before.append(frame)
            if not self._count:
                self._unspoken.append((loudness, frame))
            if speech:
                self._begin(self._before, self._attack)
            return
        self._open.add(frame, loudness, speech=speech)
        if self._now - max(self._open.voiced_until, self._open.begin) >= self._silence:
            self._close(self._open)
        elif self._now - self._open_since >= self._longest:
            self._go_on(self._open.split())

    def _begin(self, before: Iterable[bytes], voiced: int) -> None:
        """A sentence begins with the frames `before` now, the last `voiced` of which are speech."""
        audio = b"".join(before)
        self._before.clear()
        self._unspoken.clear()
        start = self._now - len(audio) // FRAME_BYTES
        begin = max(start, self._now - voiced)
        spoken = Spoken(self._count, start, begin, audio, self._tail)
        spoken.voiced_until = self._now
        self._go_on(spoken)

    def _go_on(self, spoken: Spoken) -> None:
        self._count = spoken.number + 1
        self._open, self._open_since = spoken, spoken.begin
        self.sentences.append(spoken)

    def _close(self, spoken: Spoken) -> None:
        """End a sentence. The pause after it may be the beginning of the next one's audio."""
        self._open = None
        spoken.closed = True
        pause = spoken.audio(spoken.end)[-self._silence * FRAME_BYTES :]
        self._before.extend(pause[place : place + FRAME_BYTES] for place in range(0, len(pause), FRAME_BYTES))
        if not spoken.voiced_until:  # the end of a long one that was split
            self.sentences.pop()
            return
        spoken.cut(spoken.voiced_until + self._lead)
