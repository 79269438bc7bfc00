"""Incremental conversion of tokens to text, in whole characters, and detection of stop strings."""

from __future__ import annotations

import codecs
import random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["LONGEST_TOKEN", "Detokenizer", "StopStrings", "held_back"]

LONGEST_TOKEN = 1024
"""The longest token in bytes, for tokenizers without a vocabulary."""

_TRIALS = 48  # random texts that a table of tokens must get right
_TRIAL_TOKENS = 24
_BROKEN = "\ufffd"
_WINDOW = 24  # tokens that are decoded again with each new one
_OVERLAP = 6
_PATIENCE = 8  # tokens of an incomplete character, after which it is shown as U+FFFD


class Detokenizer:
    """Makes text streams for one model.

    In most vocabularies a token is a sequence of bytes, and the text of several tokens is the concatenation of their
    bytes. A table of these takes 1 µs for a token, the model's detokenizer 50 µs. The table is compared with the
    detokenizer first, and is used only if both agree.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._visible: list[bytes] | None = None
        self._raw: list[bytes] = []
        self.longest = LONGEST_TOKEN
        """Bytes of the longest token, from which a lower bound for the tokens of a text follows."""
        self._read_vocabulary()

    @property
    def by_table(self) -> bool:
        """Whether the table is used, not the model's detokenizer."""
        return self._visible is not None

    def stream(self, special: bool = False) -> _Table | _Window:
        """A new stream; with `special`, its text includes special tokens."""
        if self._visible is not None:
            return _Table(self._raw if special else self._visible)
        return _Window(self._tokenizer, special)

    def token(self, number: int) -> tuple[str, bytes]:
        """One token's text and bytes, for log probabilities."""
        if self._visible is not None and number < len(self._raw):
            data = self._raw[number]
            return data.decode("utf-8", "replace"), data
        text = str(self._tokenizer.decode([number], skip_special_tokens=False))
        return text, text.encode()

    def _read_vocabulary(self) -> None:
        try:
            vocabulary = self._tokenizer.get_vocab()
        except RuntimeError:  # the tokenizer has no vocabulary to read
            return
        numbers = sorted(vocabulary.values())
        if not numbers or numbers[0] < 0:
            return
        raw = [b""] * (numbers[-1] + 1)
        for data, number in vocabulary.items():
            raw[number] = data if isinstance(data, bytes) else str(data).encode()
        self.longest = max(1, *map(len, raw))
        shown = self._tokenizer.decode([[number] for number in numbers])
        visible = list(raw)
        for number, text in zip(numbers, shown, strict=True):
            if not text:
                visible[number] = b""
        if self._agrees(numbers, visible):
            self._raw, self._visible = raw, visible

    def _agrees(self, numbers: list[int], table: list[bytes]) -> bool:
        # A fixed seed, so that a model always gets the same result.
        chance = random.Random(1)  # noqa: S311
        trials = [[chance.choice(numbers) for _ in range(_TRIAL_TOKENS)] for _ in range(_TRIALS)]
        trials += [[number, number] for number in chance.sample(numbers, min(len(numbers), 8 * _TRIALS))]
        for trial in trials:
            expected = str(self._tokenizer.decode(trial))
            made = b"".join([table[number] for number in trial]).decode("utf-8", "replace")
            if expected.replace(_BROKEN, "") != made.replace(_BROKEN, ""):
                return False
        return True


class _Table:
    """The text of one sequence of tokens, by a table of the tokens' bytes."""

    def __init__(self, table: list[bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete."""
        table = self._table
        try:
            data = table[tokens[0]] if len(tokens) == 1 else b"".join([table[number] for number in tokens])
        except IndexError:  # logits may be padded beyond the vocabulary
            data = b"".join([table[number] for number in tokens if number < len(table)])
        return self._decoder.decode(data)

    def end(self) -> str:
        """The rest of the text, at the end of the answer."""
        return self._decoder.decode(b"", True)


class _Window:
    """As `_Table`, by the tokenizer: it decodes the last few tokens again with each new one, because the text of a
    token depends on those before."""

    def __init__(self, tokenizer: Any, special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = not special
        self._tokens: list[int] = []
        self._shown = ""
        self._waiting = 0

    def feed(self, tokens: Sequence[int]) -> str:
        self._tokens += tokens
        text = self._decode()
        self._waiting += len(tokens)
        whole = text if self._waiting > _PATIENCE else text.rstrip(_BROKEN)
        added = whole[len(self._shown) :]
        if not added:
            return ""
        self._waiting = 0
        self._shown = whole
        if len(self._tokens) > _WINDOW and whole == text:
            del self._tokens[:-_OVERLAP]
            self._shown = self._decode()
        return added

    def end(self) -> str:
        added = self._decode()[len(self._shown) :]
        self._tokens.clear()
        self._shown = ""
        return added

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=self._skip))


class StopStrings:
    """Ends a text at the first stop string. Text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        self._stops = [stop for stop in stops if stop]
        self._keep = keep
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """The text that can be shown now, and whether a stop string has ended it."""
        text = self._held + text
        found = [(text.find(stop), stop) for stop in self._stops]
        hits = sorted((at, len(stop)) for at, stop in found if at >= 0)
        if hits:
            at, length = hits[0]
            self._held = ""
            return text[: at + length if self._keep else at], True
        held = max((held_back(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def end(self) -> str:
        """The rest of the text, at the end of the answer."""
        held, self._held = self._held, ""
        return held


def held_back(text: str, mark: str) -> int:
    """The number of characters at the end of the text that may be the beginning of `mark`."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0
