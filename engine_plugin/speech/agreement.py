"""Which words of a live transcription stay: those that two successive windows heard alike."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from engine_plugin.speech.subtitles import Segment

__all__ = ["Agreement", "Word", "words_of"]

# Scripts that put no spaces between words: each sign counts as a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"\s*(?:[{_SPACELESS}]|[^\s{_SPACELESS}]+)")
_SPACED = re.compile(rf"[^\s{_SPACELESS}\u3000-\u303f\uff00-\uffef]")
_NO_LETTERS = re.compile(r"[\W_]+")
_LONGEST_MATCH = 6  # words
_NEAR = 1.5  # seconds by which two windows may differ about when a word was said


@dataclass(frozen=True, slots=True)
class Word:
    """A word with the space before it, in seconds from the beginning of the stream."""

    text: str
    start: float
    end: float

    @property
    def key(self) -> str:
        """What two windows must agree on: not the punctuation, and not whether it begins a sentence."""
        return _NO_LETTERS.sub("", self.text).casefold() or self.text.strip()


def words_of(segments: Sequence[Segment], offset: float) -> list[Word]:
    """The words of a window that begins at `offset`. Within a segment time is shared out by length."""
    words: list[Word] = []
    for segment in segments:
        parts = _WORD.findall(segment.text)
        total = sum(map(len, parts))
        a_letter = (segment.end - segment.start) / total if total else 0.0
        at = offset + segment.start
        for number, part in enumerate(parts):
            joined = f" {part}" if not number and words and _SPACED.match(part) else part
            words.append(Word(joined, at, at + len(part) * a_letter))
            at = words[-1].end
    return words


class Agreement:
    """One sentence's text while it grows: what is settled, and what the latest window heard after that."""

    def __init__(self) -> None:
        self.settled: list[Word] = []
        self._latest: list[Word] = []

    @property
    def text(self) -> str:
        """The sentence as it is known now."""
        return "".join(word.text for word in self._all()).strip()

    @property
    def stable(self) -> str:
        """The part of the text that stays."""
        return "".join(word.text for word in self.settled).strip()

    @property
    def settled_until(self) -> float:
        """The end of the last settled word, 0 when there is none."""
        return self.settled[-1].end if self.settled else 0.0

    def hear(self, words: list[Word]) -> None:
        """Take what a window heard, which begins within what is settled, or with it."""
        new = self._after_settled(words)
        alike = 0
        while alike < min(len(new), len(self._latest)) and new[alike].key == self._latest[alike].key:
            alike += 1
        self.settled += new[:alike]
        self._latest = new[alike:]

    def settle(self, until: float) -> None:
        """Settle what was heard before a moment, since no later window will hear it again."""
        while self._latest and self._latest[0].end <= until:
            self.settled.append(self._latest.pop(0))

    def cut(self, at: float) -> None:
        """Leave what begins after a moment to the next sentence."""
        self.settled = [word for word in self.settled if word.start < at]
        self._latest = [word for word in self._latest if word.start < at]

    def _all(self) -> Iterator[Word]:
        yield from self.settled
        yield from self._latest

    def _after_settled(self, words: list[Word]) -> list[Word]:
        """The words of a window that come after what is settled: found by the settled words themselves, else by
        time, which windows tell less exactly."""
        if not self.settled:
            return words
        tail = [word.key for word in self.settled[-_LONGEST_MATCH:]]
        keys = [word.key for word in words]
        until = self.settled_until
        best = (0, 0.0, -1)  # the longest match, the nearest of those, its end
        for end in range(1, len(words) + 1):
            length = _common_suffix(tail, keys[:end])
            distance = abs(words[end - 1].end - until)
            if length and distance <= _NEAR:
                best = max(best, (length, -distance, end))
        if best[0]:
            return words[best[2] :]
        return [word for word in words if (word.start + word.end) / 2 > until]


def _common_suffix(first: list[str], second: list[str]) -> int:
    length = 0
    while length < min(len(first), len(second)) and first[-1 - length] == second[-1 - length]:
        length += 1
    return length
