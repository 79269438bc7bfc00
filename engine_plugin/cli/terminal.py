"""Prints an answer as it arrives: at a terminal with dimmed thinking, elsewhere its text only."""

from __future__ import annotations

import os
import sys
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import click

from engine_plugin.cli.conversation import piece_of
from engine_plugin.cli.output import as_shown, print_json, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from engine_plugin.cli.conversation import Conversation, Picture, Piece
    from engine_plugin.host import PluginClient

__all__ = ["AnswerPrinter", "print_answer", "show_answer", "waiting"]

_CUT_OFF = "length"


class AnswerPrinter:
    """Writes one answer to standard output, piece by piece. Callers must call `end`, after errors too."""

    def __init__(self) -> None:
        self.text = ""
        self._at_terminal = sys.stdout.isatty()
        self._line_begun = self._thinking = False

    def show(self, piece: Piece) -> None:
        """Write a piece. Raises OSError if the reader has closed the pipe."""
        self.text += piece.text
        if piece.thinking and self._at_terminal:
            self._write(piece.thinking, dim=os.environ.get("TERM") != "dumb")
            self._thinking = True
        text = piece.text
        if self._thinking and (text := text.lstrip("\n")):
            text = ("\n\n" if self._line_begun else "\n") + text
            self._thinking = False
        self._write(text)

    def end(self) -> None:
        """End the line."""
        if self._line_begun:
            click.echo()
            self._line_begun = False

    def _write(self, text: str, *, dim: bool = False) -> None:
        if text := as_shown(text):
            self._line_begun = not text.endswith("\n")
            click.echo(click.style(text, dim=True) if dim else text, nl=False)


@contextmanager
def waiting(what: str) -> Iterator[Callable[[], None]]:
    """Show a status on a terminal's standard error until the block ends or the yielded function is called."""
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
    """Send the prompt and write the answer as it arrives. Cancelling this stops the engine's work.

    Raises what the call raises, after writing what arrived before.
    """
    finish = ""
    try:
        with waiting("waiting for the model") as begun:
            async with aclosing(conversation.answer(client, prompt, pictures)) as events:
                async for event in events:
                    piece = piece_of(event)
                    finish = piece.finish or finish
                    if piece.text or piece.thinking:
                        begun()
                        printer.show(piece)
    finally:
        printer.end()
    if finish == _CUT_OFF:
        say("(truncated: the answer reached --max-tokens or the model's context length)")


async def show_answer(
    client: PluginClient, conversation: Conversation, prompt: str, pictures: Sequence[Picture] = (), *, as_json: bool
) -> None:
    """Send the prompt and print the answer's text, or its events as lines of JSON. Raises as `print_answer`."""
    if not as_json:
        await print_answer(client, conversation, prompt, pictures, AnswerPrinter())
        return
    async with aclosing(conversation.answer(client, prompt, pictures)) as events:
        async for event in events:
            print_json(event)
