"""`engine-plugin embed`, `rerank`, `image`, `transcribe`, `speak`: one call of a service, files in and out."""

from __future__ import annotations

import base64
import binascii
import json
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine_plugin.cli.autopull import auto_pull_option, model_to_call
from engine_plugin.cli.files import STANDARD, check_target, read_bytes, read_text, texts, write_bytes
from engine_plugin.cli.names import model_names
from engine_plugin.cli.options import global_options, runs
from engine_plugin.cli.output import as_json, as_shown, print_json, print_table, say
from engine_plugin.cli.plugins import chosen_manifest
from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    from engine_plugin.cli.context import Options
    from engine_plugin.host import PluginClient

__all__ = ["embed", "image", "rerank", "speak", "transcribe"]

# A request may have 64 MiB, and base64 makes three bytes four.
_MOST_AUDIO = 47 * 1024 * 1024

_MODEL = click.option("--model", shell_complete=model_names, help="The model. [default: the service's]")
_OUTPUT = click.option(
    "-o", "--output", default=STANDARD, metavar="FILE", help="Where to write. [default: standard output]"
)


def _request(**fields: Any) -> dict[str, Any]:
    """The fields that were given."""
    return {name: value for name, value in fields.items() if value not in (None, "", ())}


@asynccontextmanager
async def _calling(
    options: Options, service: str, request: dict[str, Any], auto_pull: bool
) -> AsyncIterator[PluginClient]:
    """The plugin with its engine running and, if it may be pulled, with the model of `request`, which names it."""
    from engine_plugin.cli.session import serving

    async with serving(options, service) as plugin:
        request |= _request(
            model=await model_to_call(plugin, options, service, request.get("model"), auto_pull=auto_pull)
        )
        yield plugin


@click.command()
@click.argument("inputs", nargs=-1, required=True, metavar="TEXT...")
@_OUTPUT
@_MODEL
@auto_pull_option
@global_options
@runs
async def embed(options: Options, inputs: tuple[str, ...], output: str, model: str | None, auto_pull: bool) -> None:
    """Turn texts into vectors: a line of JSON for each. "-" takes the lines of standard input as texts."""
    check_target(output)
    wanted = await texts(inputs)
    request = _request(model=model) | {"input": wanted}
    async with _calling(options, "embed", request, auto_pull) as plugin:
        answer = await plugin.invoke("embed", request)
    if options.json:
        _write(output, f"{as_json(answer)}\n".encode(), "the answer")
        return
    with _shaped("embed"):
        lines = [json.dumps(entry["embedding"]) + "\n" for entry in answer["data"]]
    _write(output, "".join(lines).encode(), f"{len(lines)} vectors")


@click.command()
@click.argument("query")
@click.argument("documents", nargs=-1, required=True, metavar="DOCUMENT...")
@click.option("--top", type=click.IntRange(min=1), metavar="N", help="Only the best N.")
@_MODEL
@auto_pull_option
@global_options
@runs
async def rerank(
    options: Options, query: str, documents: tuple[str, ...], top: int | None, model: str | None, auto_pull: bool
) -> None:
    """Order documents by how well they answer QUERY, best first. "-" takes the lines of standard input."""
    wanted = await texts(documents)
    request = _request(model=model, query=query, top_n=top) | {"documents": wanted}
    async with _calling(options, "rerank", request, auto_pull) as plugin:
        answer = await plugin.invoke("rerank", request)
    if options.json:
        print_json(answer)
        return
    with _shaped("rerank"):
        hits = [(hit["relevance_score"], hit["index"]) for hit in answer["results"]]
        print_table(
            ("SCORE", "INDEX", "DOCUMENT"), [(f"{score:.4f}", str(index), wanted[index]) for score, index in hits]
        )


@click.command()
@click.argument("prompt")
@click.option("-o", "--output", required=True, metavar="FILE.png", help="Where to write; - is standard output.")
@click.option("--size", metavar="WxH", help="Width and height in pixels. [default: the model's]")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Steps of the model; more take longer.")
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="The same seed gives the same picture.")
@click.option("--negative", metavar="TEXT", help="What the picture should not show.")
@click.option("--guidance", type=float, metavar="X", help="How closely to follow PROMPT.")
@click.option(
    "-n", "--count", type=click.IntRange(1, 10), default=1, help="So many pictures: FILE-1.png, FILE-2.png…"
)
@_MODEL
@auto_pull_option
@global_options
@runs
async def image(
    options: Options,
    prompt: str,
    output: str,
    size: str | None,
    steps: int | None,
    seed: int | None,
    negative: str | None,
    guidance: float | None,
    count: int,
    model: str | None,
    auto_pull: bool,
) -> None:
    """Draw what PROMPT describes. A prompt of "-" is read from standard input."""
    if count > 1 and output == STANDARD:
        raise click.UsageError("several pictures need a file name: -o FILE.png")
    check_target(output, "png")
    request = _request(
        model=model,
        size=size,
        num_inference_steps=steps,
        seed=seed,
        negative_prompt=negative,
        guidance_scale=guidance,
        n=count if count > 1 else None,
        response_format="b64_json",
    ) | {"prompt": await read_text(STANDARD) if prompt == STANDARD else prompt}
    streams = chosen_manifest(options).service("text-to-image").capabilities.support_streaming
    async with _calling(options, "text-to-image", request, auto_pull) as plugin:
        if streams and not options.json:
            answer = await _draw(plugin, request)
        else:
            answer = await plugin.invoke("text-to-image", request)
    with _shaped("text-to-image"):
        pictures = [base64.b64decode(entry["b64_json"], validate=True) for entry in answer["data"]]
    names = _numbered(output, len(pictures))
    for name, picture in zip(names, pictures, strict=True):
        write_bytes(name, picture)
    _report(options, names, "files", names, {})


async def _draw(plugin: PluginClient, request: dict[str, Any]) -> dict[str, Any]:
    """The answer of a streamed call, with its steps shown."""
    from engine_plugin.cli.progress import steps_display
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


@click.command()
@click.argument("text")
@click.option("-o", "--output", required=True, metavar="FILE.wav", help="Where to write; - is standard output.")
@click.option("--voice", help="The voice, by the model's name for it.")
@click.option("--speed", type=float, metavar="X", help="1 is normal, 2 twice as fast.")
@click.option("--language", metavar="CODE", help="The text's language, such as en.")
@_MODEL
@auto_pull_option
@global_options
@runs
async def speak(
    options: Options,
    text: str,
    output: str,
    voice: str | None,
    speed: float | None,
    language: str | None,
    model: str | None,
    auto_pull: bool,
) -> None:
    """Read TEXT aloud into a WAV file. A text of "-" is read from standard input."""
    check_target(output, "wav")
    if text == STANDARD:
        text = await read_text(STANDARD)
    request = _request(model=model, voice=voice, speed=speed, language=language) | {"text": text}
    async with _calling(options, "text-to-speech", request, auto_pull) as plugin:
        answer = await plugin.invoke("text-to-speech", request)
    with _shaped("text-to-speech"):
        sound = base64.b64decode(answer.pop("audio"), validate=True)
    write_bytes(output, sound)
    what = f"{answer['duration']:.1f} s of speech" if "duration" in answer else ""
    _report(options, [output], "file", output, answer, what)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@_OUTPUT
@click.option(
    "--format", "form", type=click.Choice(["text", "srt", "vtt", "json"]), help="What to print. [default: text]"
)
@click.option("--language", metavar="CODE", help="What is spoken, such as en. [default: the model finds out]")
@click.option("--translate", is_flag=True, help="Into English.")
@click.option(
    "--live", is_flag=True, help="Send the sound piece by piece and print sentences as they are understood."
)
@click.option(
    "--rate",
    type=click.IntRange(1000, 384_000),
    metavar="HZ",
    help="With --live: FILE is raw 16 bit mono sound of so many samples a second.",
)
@_MODEL
@auto_pull_option
@global_options
@runs
async def transcribe(
    options: Options,
    file: str,
    output: str,
    form: str | None,
    language: str | None,
    translate: bool,
    live: bool,
    rate: int | None,
    model: str | None,
    auto_pull: bool,
) -> None:
    """Write down what is said in FILE: WAV, MP3, FLAC, OGG or WebM. "-" is standard input."""
    from engine_plugin.cli.live import live_transcription

    form = "json" if options.json else form or "text"
    if live:
        if translate or output != STANDARD:
            raise click.UsageError("--live prints sentences in the language that is spoken: no --translate, no -o")
        heard = _request(model=model, language=language, sample_rate=rate)
        await live_transcription(options, file, form, heard, auto_pull=auto_pull)
        return
    if rate:
        raise click.UsageError("--rate is for --live; give a file that says its rate, such as WAV")
    check_target(output)
    sound = await read_bytes(file, _MOST_AUDIO, "Cut it, or stream it: --live")
    request = _request(model=model, language=language, task="translate" if translate else None)
    request |= {"audio": base64.b64encode(sound).decode(), "response_format": form}
    async with _calling(options, "speech-to-text", request, auto_pull) as plugin:
        answer = await plugin.invoke("speech-to-text", request)
    with _shaped("speech-to-text"):
        shown = as_json(answer) if form == "json" else str(answer["text"]).strip()
    _write(output, f"{shown}\n".encode(errors="replace"), "the transcript")


@contextmanager
def _shaped(service: str) -> Iterator[None]:
    """Takes what goes wrong in reading an answer for the plugin's fault. Raises BadGatewayError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, binascii.Error) as error:
        raise BadGatewayError(f"the plugin's answer to {service} has not the shape of one") from error


def _write(output: str, data: bytes, what: str) -> None:
    """Text to a file or to standard output, a terminal too."""
    if output == STANDARD:
        click.echo(as_shown(data.decode()) if sys.stdout.isatty() else data, nl=False)
        return
    write_bytes(output, data)
    say(f"wrote {what} to {output}")


def _report(
    options: Options, names: Sequence[str], key: str, value: object, rest: dict[str, Any], what: str = ""
) -> None:
    """Say what was written; nothing on standard output when the file itself went there."""
    if STANDARD in names:
        return
    if options.json:
        print_json({key: value} | rest)
        return
    click.echo(f"wrote {', '.join(names)}" + (f" ({what})" if what else ""))
