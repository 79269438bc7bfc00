"""Local agreement: a word of a live transcription is confirmed when two successive windows agree on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.speech.subtitles import Segment

__all__ = ["LocalAgreement", "Word", "split_words"]

# Scripts without spaces between words: each character counts as a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"\s*(?:[{_SPACELESS}]|[^\s{_SPACELESS}]+)")
_SPACED = re.compile(rf"[^\s{_SPACELESS}\u3000-\u303f\uff00-\uffef]")
_NO_LETTERS = re.compile(r"[\W_]+")
_LONGEST_MATCH = 6  # words
_NEAR = 1.5  # seconds by which the times of a word in two windows may differ


@dataclass(frozen=True, slots=True)
class Word:
    """A word with the space before it. Times are seconds from the beginning of the stream."""

    text: str
    start: float
    end: float

    @property
    def key(self) -> str:
        """The text that two windows must agree on, without punctuation and case."""
        return _NO_LETTERS.sub("", self.text).casefold() or self.text.strip()


def split_words(segments: Sequence[Segment], offset: float) -> list[Word]:
    """Split the segments of a window that begins at `offset` (seconds) into words.

    A word's share of its segment's time is its share of the segment's text.
    """
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


class LocalAgreement:
    """The text of a growing sentence: confirmed words, then the tentative words of the latest window."""

    def __init__(self) -> None:
        self.confirmed: list[Word] = []
        self._tentative: list[Word] = []

    @property
    def text(self) -> str:
        """The confirmed and the tentative words."""
        return "".join(word.text for word in (*self.confirmed, *self._tentative)).strip()

    @property
    def stable(self) -> str:
        """The confirmed words, which no later window changes."""
        return "".join(word.text for word in self.confirmed).strip()

    @property
    def confirmed_until(self) -> float:
        """The end of the last confirmed word, in seconds; 0 without one."""
        return self.confirmed[-1].end if self.confirmed else 0.0

    def add_window(self, words: list[Word]) -> None:
        """Add the words of a window that begins no later than the confirmed words end."""
        new = self._after_confirmed(words)
        alike = 0
        while alike < min(len(new), len(self._tentative)) and new[alike].key == self._tentative[alike].key:
            alike += 1
        self.confirmed += new[:alike]
        self._tentative = new[alike:]

    def confirm(self, until: float) -> None:
        """Confirm the words that end before `until`, since no later window covers them."""
        while self._tentative and self._tentative[0].end <= until:
            self.confirmed.append(self._tentative.pop(0))

    def cut(self, at: float) -> None:
        """Drop the words that begin after `at`: they belong to the next sentence."""
        self.confirmed = [word for word in self.confirmed if word.start < at]
        self._tentative = [word for word in self._tentative if word.start < at]

    def _after_confirmed(self, words: list[Word]) -> list[Word]:
        """The words after the confirmed ones, found by matching those words; without a match by time, which is less
        exact."""
        if not self.confirmed:
            return words
        tail = [word.key for word in self.confirmed[-_LONGEST_MATCH:]]
        keys = [word.key for word in words]
        until = self.confirmed_until
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
