"""`engine-plugin chat`: one answer, or a conversation at a terminal."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from engine_plugin.cli.conversation import SERVICE, ChatParameters, Conversation, Picture
from engine_plugin.cli.files import STANDARD, read_bytes, read_text
from engine_plugin.cli.options import Command, model_options
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.session import serving
from engine_plugin.cli.terminal import show_answer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.cli.context import Options

__all__ = ["chat"]

# 63 MiB in base64.
_MOST_PICTURE = 47 * 1024 * 1024


@click.command(cls=Command)
@click.argument("prompt", nargs=-1, metavar="[PROMPT]...")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--think/--no-think", default=None, help="Enable or disable thinking, for models that support it.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Picture to send with the first message; may be given several times.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Maximum number of tokens in an answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="X",
    help="Sampling temperature; 0 always picks the most likely token.",
)
@model_options
async def chat(
    options: Options, prompt: tuple[str, ...], images: tuple[str, ...], auto_pull: bool, **settings: Any
) -> None:
    """Chat with a model. With PROMPT, or with input on standard input, print one answer and exit.

    "-" in PROMPT stands for standard input: git diff | engine-plugin chat "What is new here?" -
    """
    spec = chosen_manifest(options).service(SERVICE)
    conversation = Conversation(spec, ChatParameters(**settings))
    if prompt or not sys.stdin.isatty():
        text = await _text(prompt or (STANDARD,))
        await _answer_once(options, conversation, text, await _pictures(images), auto_pull)
        return
    if options.json or not sys.stdout.isatty():
        raise click.UsageError("the prompt is missing. Give a PROMPT, or - to read it from standard input")
    from engine_plugin.cli.repl import talk

    await talk(options, conversation, await _pictures(images), auto_pull)


async def _text(prompt: Sequence[str]) -> str:
    """Return the prompt: the arguments joined by spaces, with standard input in place of `-`. Raises UsageError."""
    read = f"\n\n{await read_text(STANDARD)}\n\n" if STANDARD in prompt else ""
    text = " ".join(read if word == STANDARD else word for word in prompt).strip()
    if not text:
        raise click.UsageError("the prompt is empty. Give a PROMPT, or write one to standard input")
    return text


async def _pictures(names: Sequence[str]) -> list[Picture]:
    return [Picture(name, await read_bytes(name, _MOST_PICTURE, "Make it smaller")) for name in names]


async def _answer_once(
    options: Options, conversation: Conversation, prompt: str, pictures: Sequence[Picture], auto_pull: bool
) -> None:
    settings = conversation.settings
    async with serving(options, SERVICE, settings.model, auto_pull=auto_pull) as (client, settings.model):
        try:
            await show_answer(client, conversation, prompt, pictures, as_json=options.json)
        except BrokenPipeError:
            _stop_writing()


def _stop_writing() -> None:
    """Discard further output: the reader has closed the pipe, and flushing at exit would fail again."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    finally:
        os.close(null)
