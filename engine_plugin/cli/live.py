"""`engine-plugin transcribe --live`: streams audio to speech-to-text-ws and prints sentences as they arrive."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine_plugin.cli.files import STANDARD, pieces
from engine_plugin.cli.output import as_shown, harmless, print_json, say
from engine_plugin.cli.session import serving
from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError
from engine_plugin.speech.subtitles import Segment, srt, vtt

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from engine_plugin.cli.context import Options
    from engine_plugin.host import BidiCall

__all__ = ["live_transcription"]

_SERVICE = "speech-to-text-ws"
_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "webm", "mkv", "m4a", "mp4", "aac")
_FINISH = json.dumps({"action": "finish-task"})
_CLEAR = "\r\x1b[K"
_NARROWEST = 20


async def live_transcription(
    options: Options, source: str, form: str, wanted: Mapping[str, Any], model: str | None, *, auto_pull: bool
) -> None:
    """Stream a file or standard input and print the sentences (`form`: text, srt, vtt or json) as they arrive.

    `wanted` holds `language` and, for raw samples, `sample_rate`; `auto_pull` pulls a missing model first. At a
    terminal, standard error shows the unfinished sentence.
    """
    metadata = {name: str(value) for name, value in wanted.items()} | _format(source, raw="sample_rate" in wanted)
    printed = _Sentences(form)
    async with serving(options, _SERVICE, model, auto_pull=auto_pull) as (plugin, named):
        if named:
            metadata["model"] = named
        async with plugin.invoke_bidi(_SERVICE) as conversation:
            sending = asyncio.create_task(_send(conversation, source, metadata))
            try:
                async for event in _events(conversation):
                    printed.show(event)
            finally:
                sending.cancel()
                await asyncio.wait({sending})
    if not sending.cancelled():
        if isinstance(error := sending.exception(), OSError):
            raise error
        if not error and not sending.result():
            name = "standard input" if source == STANDARD else source
            raise InvalidRequestError(f"{name} is empty. Send audio to transcribe")
    if not printed.finished:
        raise BadGatewayError("the plugin ended the transcription before the end of the audio. See its log")
    if not printed.sentences:
        say("no speech detected. Without --live, the model receives the whole file")


def _format(source: str, *, raw: bool) -> dict[str, str]:
    """Return the format for the metadata; for standard input the plugin detects it. Raises UsageError."""
    if raw or source == STANDARD:
        return {"format": "pcm"} if raw else {}
    suffix = Path(source).suffix.lower().removeprefix(".")
    if suffix not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise click.UsageError(
            f"{source}: unknown audio file extension (known: {known}). For raw samples give --rate HZ"
        )
    return {"format": suffix}


async def _send(conversation: BidiCall, source: str, metadata: Mapping[str, str]) -> int:
    """Send the audio and the finish command; return the number of audio bytes."""
    first: Mapping[str, str] | None = metadata
    sent = 0
    try:
        async with aclosing(pieces(source)) as parts:
            async for part in parts:
                await conversation.send(part, metadata=first)
                first = None
                sent += len(part)
        await conversation.send(_FINISH, metadata=first)
        await conversation.done_sending()
    except OSError:
        await conversation.aclose()
        raise
    return sent


async def _events(conversation: BidiCall) -> AsyncIterator[dict[str, Any]]:
    """Yield the plugin's events. A task-failed event is raised, unless an error with a code follows it."""
    failed = ""
    async for message in conversation:
        try:
            event = json.loads(message.data)
            kind, header = event["header"]["event"], event["header"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadGatewayError(f"not a valid {_SERVICE} event: {message.data[:200]!r}") from error
        if kind == "task-failed":
            failed = str(header.get("error_message") or "the transcription failed")
            continue
        yield event
        if kind == "task-finished":
            return
    if failed:
        raise EnginePluginError(failed)


class _Sentences:
    """Prints the sentences of the events."""

    def __init__(self, form: str) -> None:
        self._form = form
        self.sentences = 0
        self.finished = False
        self._partial = sys.stderr.isatty() and form == "text"
        if form == "vtt":
            click.echo("WEBVTT\n")

    def show(self, event: dict[str, Any]) -> None:
        """Print the sentence of an event if it is final."""
        self.finished = self.finished or event["header"]["event"] == "task-finished"
        sentence = ((event.get("payload") or {}).get("output") or {}).get("sentence")
        final = sentence is not None and sentence.get("is_final", True)
        self.sentences += final
        if self._form == "json":
            print_json(event)
            return
        if sentence is None:
            return
        text = as_shown(str(sentence.get("text", ""))).strip()
        if not final:
            if self._partial:
                click.echo(f"{_CLEAR}… {_end_of(harmless(text))}", err=True, nl=False)
            return
        if self._partial:
            click.echo(_CLEAR, err=True, nl=False)
        if self._form == "text":
            click.echo(text)
            return
        begin, end = (int(sentence.get(name) or 0) / 1000 for name in ("begin_time", "end_time"))
        cues = [Segment(begin, end, text)]
        click.echo(srt(cues, first=self.sentences) if self._form == "srt" else vtt(cues, header=""))


def _end_of(text: str) -> str:
    """Return the end of a text that fits one terminal line; of a wrapped line only the last row could be erased."""
    from rich.cells import cell_len

    room = max(_NARROWEST, os.get_terminal_size(sys.stderr.fileno()).columns - len("… ") - 1)
    while cell_len(text) > room:
        text = text[max(1, (cell_len(text) - room) // 2) :]
    return text
