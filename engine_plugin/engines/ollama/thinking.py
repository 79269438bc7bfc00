"""What a model thinks and what it says, told apart by the tags that it writes: `<think>…</think>`.

For models whose thinking the server does not set apart itself.
"""

from __future__ import annotations

__all__ = ["ThinkParser", "divided"]

_OPEN = "<think>"
_CLOSE = "</think>"


class ThinkParser:
    """Divides a text that comes in pieces; the same text gives the same parts, however it was cut.

    Several blocks are joined, and one that is not closed goes to the end. White space at the beginning of a block is
    not told, nor is that around a block before anything was said. Tags are never told, also a `</think>` without a
    beginning, as a template causes that has opened the block itself.
    """

    def __init__(self) -> None:
        self._held = ""  # maybe the beginning of a tag
        self._lead: list[str] = []  # white space before anything was said
        self._thinking = False
        self._begun = False
        self._after_tag = False

    @property
    def plain(self) -> bool:
        """Whether a piece without `<` would be said as it is."""
        return self._begun and not self._held and not self._thinking and not self._after_tag

    def feed(self, piece: str) -> tuple[str, str]:
        """What was thought, and what was said, with this piece."""
        if self.plain and "<" not in piece:
            return "", piece
        text, position = self._held + piece, 0
        thought: list[str] = []
        said: list[str] = []
        while True:
            at, tag = _next_tag(text, position)
            self._tell(text[position:at], thought, said)
            if not tag:
                self._held = text[at:]
                return "".join(thought), "".join(said)
            position = at + len(tag)
            self._thinking, self._lead = tag == _OPEN, []
            self._after_tag = self._thinking or not self._begun

    def end(self) -> tuple[str, str]:
        """What was held back: it is no tag."""
        held, self._held = "".join([*self._lead, self._held]), ""
        self._lead = []
        return (held, "") if self._thinking else ("", held)

    def _tell(self, text: str, thought: list[str], said: list[str]) -> None:
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
        (thought if self._thinking else said).append(text)


def _next_tag(text: str, start: int) -> tuple[int, str]:
    """Where the next tag is, and which; without one, where one may begin whose end has not come: the end, if none."""
    at = text.find("<", start)
    while at >= 0:
        for tag in (_OPEN, _CLOSE):
            if text.startswith(tag, at):
                return at, tag
            if tag.startswith(text[at : at + len(tag)]):  # a copy of all that follows would cost much for many `<`
                return at, ""
        at = text.find("<", at + 1)
    return len(text), ""


def divided(text: str) -> tuple[str, str]:
    """What was thought and said in a whole text. Before a `</think>` that comes first, all was thought."""
    head, close, rest = text.partition(_CLOSE)
    before = ""
    if close and _OPEN not in head:
        before, text = head.strip(), close + rest
    parser = ThinkParser()
    thought, said = parser.feed(text)
    last_thought, last_said = parser.end()
    return before + thought + last_thought, said + last_said
