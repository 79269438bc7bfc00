"""Separates thinking from content by the tags that models write, `<think>…</think>`.

For models whose thinking the server does not separate itself.
"""

from __future__ import annotations

import re

__all__ = ["ThinkParser", "split_thinking"]

_OPEN = "<think>"
_CLOSE = "</think>"
_TAG = re.compile("</?think>")
_BEGINNING = re.compile(r"</?(?:t(?:h(?:i(?:nk?)?)?)?)?\Z")
"""A tag that may begin at the end of a text."""


class ThinkParser:
    """Splits a text that arrives in pieces. The result does not depend on where the pieces are cut.

    Several blocks are joined; an unclosed block extends to the end. Tags are dropped, including a `</think>` without
    `<think>`, which a template causes that opens the block itself. White space is dropped at the start of a block,
    and around a block that precedes the content.
    """

    def __init__(self) -> None:
        self._held = ""  # may be the beginning of a tag
        self._lead: list[str] = []  # white space before the content
        self._thinking = False
        self._begun = False
        self._after_tag = False

    @property
    def plain(self) -> bool:
        """Whether a piece without `<` is content, unchanged."""
        return self._begun and not self._held and not self._thinking and not self._after_tag

    def feed(self, piece: str) -> tuple[str, str]:
        """The thinking and the content that this piece completes."""
        if self.plain and "<" not in piece:
            return "", piece
        text = self._held + piece
        beginning = _BEGINNING.search(text)
        self._held = beginning[0] if beginning else ""
        end, position = len(text) - len(self._held), 0
        thinking: list[str] = []
        content: list[str] = []
        for tag in _TAG.finditer(text):
            self._add(text[position : tag.start()], thinking, content)
            position = tag.end()
            self._thinking, self._lead = tag[0] == _OPEN, []
            self._after_tag = self._thinking or not self._begun
        self._add(text[position:end], thinking, content)
        return "".join(thinking), "".join(content)

    def end(self) -> tuple[str, str]:
        """The thinking and the content that were held back, now that they cannot become a tag."""
        held, self._held = "".join([*self._lead, self._held]), ""
        self._lead = []
        return (held, "") if self._thinking else ("", held)

    def _add(self, text: str, thinking: list[str], content: list[str]) -> None:
        if self._after_tag:
            text = text.lstrip()
        if not text:
            return
        if not self._thinking and not self._begun:
            if text.isspace():
                self._lead.append(text)
                return
            text, self._lead, self._begun = "".join([*self._lead, text]), [], True
        self._after_tag = False
        (thinking if self._thinking else content).append(text)


def split_thinking(text: str) -> tuple[str, str]:
    """The thinking and the content of a whole text.

    All text before a first `</think>` without `<think>` is thinking.
    """
    head, close, rest = text.partition(_CLOSE)
    before = ""
    if close and _OPEN not in head:
        before, text = head.strip(), close + rest
    parser = ThinkParser()
    thinking, content = parser.feed(text)
    last_thinking, last_content = parser.end()
    return before + thinking + last_thinking, content + last_content
