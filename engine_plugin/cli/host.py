"""`engine-plugin host`: acts as the host of the plugins in a directory."""

from __future__ import annotations

import json
import sys
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engine_plugin.cli.conversation import SERVICE, ChatParameters, Conversation
from engine_plugin.cli.options import Group
from engine_plugin.cli.output import print_json, print_table, say
from engine_plugin.cli.terminal import show_answer

if TYPE_CHECKING:
    from engine_plugin.cli.context import Options

__all__ = ["host"]

_DIRECTORY = click.Path(exists=True, file_okay=False, path_type=Path)
_START = click.option(
    "--start-timeout", default=10.0, show_default=True, help="Seconds to wait for the plugin to start."
)
_TIMEOUT = click.option("--timeout", type=float, help="Deadline of the call in seconds. [default: the plugin's]")


@click.group(cls=Group)
def host() -> None:
    """Discover, launch and call the plugins in a directory, as AOG does."""


@host.command("list")
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
async def list_(options: Options, directory: Path) -> None:
    """List the plugins in DIR. Problems go to standard error."""
    from engine_plugin.host import PluginRegistry

    registry = PluginRegistry.discover(directory)
    found = [(name, registry[name].provider.version, list(registry[name].services)) for name in registry]
    if options.json:
        plugins = [{"name": name, "version": version, "services": services} for name, version, services in found]
        print_json({"plugins": plugins, "problems": [asdict(problem) for problem in registry.problems]})
        return
    rows = [(name, version, ", ".join(services)) for name, version, services in found]
    print_table(("NAME", "VERSION", "SERVICES"), rows)
    for problem in registry.problems:
        say(str(problem))


@host.command()
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.argument("name")
@click.argument("rpc")
@click.argument("request", metavar="[JSON]", default="{}")
@click.option("--start", is_flag=True, help="Start the engine first.")
@_TIMEOUT
@_START
async def call(
    options: Options,
    directory: Path,
    name: str,
    rpc: str,
    request: str,
    start: bool,
    timeout: float | None,
    start_timeout: float,
) -> None:
    """Launch plugin NAME of DIR, call an rpc, and print each message of the answer as a line of JSON.

    JSON holds the fields of the request message, or the content of its request_json; "-" reads it from standard
    input. For InvokeServiceBidi it is a list of messages.
    """
    from engine_plugin.host import PluginRegistry
    from engine_plugin.host.failures import error_of, is_success

    fields = _parse(request)
    options.named = str(directory / name)
    async with await PluginRegistry.discover(directory).launch(name, start_timeout=start_timeout) as plugin:
        if start:
            await plugin.start_engine()
        failed: dict[str, Any] = {}
        async with aclosing(plugin.call_json(rpc, fields, timeout=timeout)) as answers:
            async for answer in answers:
                print_json(answer)
                if not is_success(answer.get("code", 0)):
                    failed = answer
    if failed:
        raise error_of(failed["code"], failed["message"], failed.get("metadata", {}))


@host.command()
@click.argument("directory", metavar="DIR", type=_DIRECTORY)
@click.argument("name")
@click.argument("prompt")
@click.option("--model", help="Model name. [default: the service's default model]")
@click.option("--system", help="System prompt.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Maximum number of tokens in the answer.")
@_TIMEOUT
@_START
async def chat(
    options: Options,
    directory: Path,
    name: str,
    prompt: str,
    timeout: float | None,
    start_timeout: float,
    **settings: Any,
) -> None:
    """Launch plugin NAME of DIR, start its engine and stream the answer to PROMPT."""
    from engine_plugin.host import PluginRegistry

    options.named = str(directory / name)
    registry = PluginRegistry.discover(directory)
    spec = registry.manifest(name).service(SERVICE)
    conversation = Conversation(spec, ChatParameters(**settings), timeout)
    async with await registry.launch(name, start_timeout=start_timeout) as plugin:
        await plugin.start_engine()
        await show_answer(plugin, conversation, prompt, as_json=options.json)


def _parse(text: str) -> Any:
    if text == "-":
        text = sys.stdin.read()
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"JSON: {error}") from error
    if not isinstance(fields, dict | list):
        raise click.UsageError("JSON: must be an object, or a list of objects for InvokeServiceBidi")
    return fields
