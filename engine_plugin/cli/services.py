"""`engine-plugin embed`, `rerank`, `image`, `transcribe`, `speak`: one call of a service each.

Options that belong to a request are named after its fields, and passed on in `fields`.
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine_plugin.cli.files import STANDARD, check_target, read_bytes, read_text, texts, write_bytes
from engine_plugin.cli.live import live_transcription
from engine_plugin.cli.options import Command, model_options
from engine_plugin.cli.output import as_json, as_shown, print_json, print_table, report, say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.cli.progress import steps_display
from engine_plugin.cli.session import serving
from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from engine_plugin.cli.context import Options
    from engine_plugin.host import PluginClient

__all__ = ["embed", "image", "rerank", "speak", "transcribe"]

# 63 MiB in base64.
_MOST_AUDIO = 47 * 1024 * 1024

_OUTPUT = click.option(
    "-o", "--output", default=STANDARD, metavar="FILE", help="Output file. [default: standard output]"
)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that have a value."""
    return {name: value for name, value in fields.items() if value not in (None, "")}


async def _call(
    options: Options, service: str, request: dict[str, Any], model: str | None, auto_pull: bool, *, draw: bool = False
) -> dict[str, Any]:
    """Call a service with its engine running; `draw` makes a streamed call and shows its steps."""
    async with serving(options, service, model, auto_pull=auto_pull) as (plugin, named):
        request |= _given({"model": named})
        return await (_draw(plugin, request) if draw else plugin.invoke(service, request))


@click.command(cls=Command)
@click.argument("inputs", nargs=-1, required=True, metavar="TEXT...")
@_OUTPUT
@model_options
async def embed(options: Options, inputs: tuple[str, ...], output: str, model: str | None, auto_pull: bool) -> None:
    """Compute embeddings: one line of JSON for each text. "-" reads one text per line from standard input."""
    check_target(output)
    answer = await _call(options, "embed", {"input": await texts(inputs)}, model, auto_pull)
    if options.json:
        _write(output, as_json(answer), "the answer")
        return
    with _shaped("embed"):
        lines = [json.dumps(entry["embedding"]) for entry in answer["data"]]
    _write(output, "\n".join(lines), f"{len(lines)} vectors")


@click.command(cls=Command)
@click.argument("query")
@click.argument("documents", nargs=-1, required=True, metavar="DOCUMENT...")
@click.option("--top", "top_n", type=click.IntRange(min=1), metavar="N", help="Print only the best N.")
@model_options
async def rerank(
    options: Options, query: str, documents: tuple[str, ...], model: str | None, auto_pull: bool, **fields: Any
) -> None:
    """Order documents by relevance to QUERY, best first. "-" reads one document per line from standard input."""
    wanted = await texts(documents)
    request = _given(fields) | {"query": query, "documents": wanted}
    answer = await _call(options, "rerank", request, model, auto_pull)
    if options.json:
        print_json(answer)
        return
    with _shaped("rerank"):
        hits = [(hit["relevance_score"], hit["index"]) for hit in answer["results"]]
        print_table(
            ("SCORE", "INDEX", "DOCUMENT"), [(f"{score:.4f}", str(index), wanted[index]) for score, index in hits]
        )


@click.command(cls=Command)
@click.argument("prompt")
@click.option("-o", "--output", required=True, metavar="FILE.png", help="Where to write; - is standard output.")
@click.option("--size", metavar="WxH", help="Width and height in pixels. [default: the model's]")
@click.option(
    "--steps",
    "num_inference_steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of inference steps; more take longer.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="Random seed; the same seed gives the same picture."
)
@click.option(
    "--negative", "negative_prompt", metavar="TEXT", help="Negative prompt: what the picture should not show."
)
@click.option("--guidance", "guidance_scale", type=float, metavar="X", help="How closely to follow PROMPT.")
@click.option(
    "-n",
    "--count",
    type=click.IntRange(1, 10),
    default=1,
    help="Number of pictures, written to FILE-1.png, FILE-2.png…",
)
@model_options
async def image(
    options: Options, prompt: str, output: str, count: int, model: str | None, auto_pull: bool, **fields: Any
) -> None:
    """Draw a picture of PROMPT. "-" reads the prompt from standard input."""
    if count > 1 and output == STANDARD:
        raise click.UsageError("--count above 1 needs a file name: -o FILE.png")
    check_target(output, "png")
    request = _given(fields) | {"prompt": await _text(prompt), "response_format": "b64_json"}
    if count > 1:
        request["n"] = count
    streams = chosen_manifest(options).service("text-to-image").capabilities.support_streaming
    draw = streams and not options.json
    answer = await _call(options, "text-to-image", request, model, auto_pull, draw=draw)
    with _shaped("text-to-image"):
        pictures = [base64.b64decode(entry["b64_json"], validate=True) for entry in answer["data"]]
    names = _numbered(output, len(pictures))
    for name, picture in zip(names, pictures, strict=True):
        write_bytes(name, picture)
    _report(options, names, {"files": names})


async def _draw(plugin: PluginClient, request: dict[str, Any]) -> dict[str, Any]:
    """Make a streamed call, show its steps, and return the answer."""
    from engine_plugin.host import events

    answer: dict[str, Any] = {}
    with steps_display("drawing") as show:
        async with plugin.stream("text-to-image", request | {"stream": True}) as chunks:
            async for event in events(chunks):
                if "step" in event:
                    show(int(event["step"]), int(event.get("total", 0)))
                elif "data" in event:
                    answer = event
    return answer


def _numbered(output: str, count: int) -> list[str]:
    if count == 1:
        return [output]
    path = Path(output)
    return [str(path.with_stem(f"{path.stem}-{number}")) for number in range(1, count + 1)]


@click.command(cls=Command)
@click.argument("text")
@click.option("-o", "--output", required=True, metavar="FILE.wav", help="Where to write; - is standard output.")
@click.option("--voice", help="Name of the voice; the model defines the names.")
@click.option("--speed", type=float, metavar="X", help="Speed; 2 is twice as fast as normal.")
@click.option("--language", metavar="CODE", help="Language of the text, such as en.")
@model_options
async def speak(options: Options, text: str, output: str, model: str | None, auto_pull: bool, **fields: Any) -> None:
    """Write TEXT as speech to a WAV file. "-" reads the text from standard input."""
    check_target(output, "wav")
    request = _given(fields) | {"text": await _text(text)}
    answer = await _call(options, "text-to-speech", request, model, auto_pull)
    with _shaped("text-to-speech"):
        sound = base64.b64decode(answer.pop("audio"), validate=True)
    write_bytes(output, sound)
    what = f" ({answer['duration']:.1f} s of speech)" if "duration" in answer else ""
    _report(options, [output], {"file": output} | answer, what)


@click.command(cls=Command)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@_OUTPUT
@click.option(
    "--format", "form", type=click.Choice(["text", "srt", "vtt", "json"]), help="Output format. [default: text]"
)
@click.option("--language", metavar="CODE", help="Spoken language, such as en. [default: detected by the model]")
@click.option("--translate", "task", flag_value="translate", help="Translate into English.")
@click.option("--live", is_flag=True, help="Stream the audio and print sentences as they are recognized.")
@click.option(
    "--rate",
    "sample_rate",
    type=click.IntRange(1000, 384_000),
    metavar="HZ",
    help="With --live: FILE holds raw 16-bit mono samples at this rate.",
)
@model_options
async def transcribe(
    options: Options,
    file: str,
    output: str,
    form: str | None,
    live: bool,
    model: str | None,
    auto_pull: bool,
    **fields: Any,
) -> None:
    """Transcribe FILE (WAV, MP3, FLAC, OGG, WebM and others). "-" reads standard input."""
    form = "json" if options.json else form or "text"
    request = _given(fields)
    if live:
        if "task" in request or output != STANDARD:
            raise click.UsageError("--live cannot be combined with --translate or -o")
        await live_transcription(options, file, form, request, model, auto_pull=auto_pull)
        return
    if "sample_rate" in request:
        raise click.UsageError("--rate needs --live. Without --live, use a file with a header, such as WAV")
    check_target(output)
    sound = await read_bytes(file, _MOST_AUDIO, "Shorten it, or stream it: --live")
    request |= {"audio": base64.b64encode(sound).decode(), "response_format": form}
    answer = await _call(options, "speech-to-text", request, model, auto_pull)
    with _shaped("speech-to-text"):
        shown = as_json(answer) if form == "json" else str(answer["text"]).strip()
    _write(output, shown, "the transcript")


async def _text(argument: str) -> str:
    return await read_text(STANDARD) if argument == STANDARD else argument


@contextmanager
def _shaped(service: str) -> Iterator[None]:
    """Raise BadGatewayError if the answer has an invalid shape."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, binascii.Error) as error:
        raise BadGatewayError(f"the plugin's answer is not a valid {service} response") from error


def _write(output: str, text: str, what: str) -> None:
    """Write lines of text to a file or to standard output."""
    data = f"{text}\n".encode(errors="replace")
    if output == STANDARD:
        click.echo(as_shown(data.decode()) if sys.stdout.isatty() else data, nl=False)
        return
    write_bytes(output, data)
    say(f"wrote {what} to {output}")


def _report(options: Options, names: Sequence[str], value: dict[str, Any], what: str = "") -> None:
    """Print what was written, unless the file itself went to standard output."""
    if STANDARD not in names:
        report(options, value, f"wrote {', '.join(names)}{what}")
