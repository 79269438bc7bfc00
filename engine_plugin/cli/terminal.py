"""An answer on its way to the person: its thinking dimmed at a terminal, only its text where none is."""

from __future__ import annotations

import sys
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import click

from engine_plugin.cli.conversation import answer, piece_of
from engine_plugin.cli.output import as_shown, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from engine_plugin.cli.conversation import Conversation, Picture, Piece
    from engine_plugin.host import PluginClient

__all__ = ["AnswerPrinter", "print_answer", "waiting"]

_CUT_OFF = "length"


class AnswerPrinter:
    """Writes one answer to standard output, piece by piece; `end` must be called whatever happens."""

    def __init__(self) -> None:
        self.text = ""
        self._console: Console | None = None
        self._line_begun = self._thinking = False
        if sys.stdout.isatty():
            from rich.console import Console

            self._console = Console()

    def show(self, piece: Piece) -> None:
        """Write what has come. Raises OSError when nobody reads any longer."""
        self.text += piece.text
        if self._console is None:
            if piece.text:
                self._line_begun = not piece.text.endswith("\n")
                click.echo(as_shown(piece.text), nl=False)
            return
        if piece.thinking:
            self._write(self._console, piece.thinking, dim=True)
            self._thinking = True
        text = piece.text
        if text and self._thinking:
            text = text.lstrip("\n")
            if text:
                self._write(self._console, "\n\n" if self._line_begun else "\n", dim=False)
                self._thinking = False
        if text:
            self._write(self._console, text, dim=False)

    def end(self) -> None:
        """End the line."""
        if self._line_begun:
            click.echo()
            self._line_begun = False

    def _write(self, console: Console, text: str, *, dim: bool) -> None:
        text = as_shown(text)
        if text:
            self._line_begun = not text.endswith("\n")
            console.out(text, style="dim" if dim else None, highlight=False, end="")


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Say at a terminal what is waited for, on standard error, until the block ends or what it gives is called."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True).status(Text(what)) as status:
        yield status.stop


async def print_answer(
    client: PluginClient,
    conversation: Conversation,
    prompt: str,
    pictures: Sequence[Picture],
    printer: AnswerPrinter,
) -> None:
    """Ask, and write the answer as it comes. Cancelling this ends the engine's work on it.

    Raises what the call raises; what came before has been written then.
    """
    finish = ""
    try:
        with waiting("waiting for the model") as begun:
            request = conversation.request(prompt, pictures)
            async with aclosing(answer(client, conversation.spec, request)) as events:
                async for event in events:
                    piece = piece_of(event)
                    finish = piece.finish or finish
                    if piece.text or piece.thinking:
                        begun()
                        printer.show(piece)
    finally:
        printer.end()
    if finish == _CUT_OFF:
        say("(cut off: the answer has all the tokens that --max-tokens, or the model's context, gives it)")
