"""A server that speaks Ollama's API, two ways: straight to it, and through the plugin.

The server is a stand-in, and the plugin is attached to it as to any Ollama. Each of the plugin's flavors of JSON has
one of its own: Ollama's, where lines are framed as they are, and OpenAI's, into which every line is translated.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.dialects import OLLAMA_EVENTS, OLLAMA_LINES, OPENAI
from benchmarks.helpers import helper
from benchmarks.measures import synthetic_round
from benchmarks.ollama_upstream import MODEL
from benchmarks.results import DIRECT
from benchmarks.targets import COMMAND, Plugged, Rig, write_plugin
from engine_plugin.engines.ollama.client import OllamaClient
from engine_plugin.host import launch
from engine_plugin.transport.http1 import Http1Client
from engine_plugin.transport.ndjson import whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from benchmarks.dialects import Dialect
    from benchmarks.measures import Sizes
    from benchmarks.results import Results
    from engine_plugin.host import PluginClient

__all__ = ["Flavor", "flavors", "ollama_round"]

_PATHS = {"chat": "/api/chat", "embed": "/api/embed"}
_ANSWER_LIMIT = 64 * 1024 * 1024
_START_TIMEOUT = 30.0


class DirectLines:
    """Straight to the server, in blocks of whole lines."""

    name = DIRECT
    dialect = OLLAMA_LINES

    def __init__(self, client: OllamaClient) -> None:
        self._client = client

    def chat(self, tokens: int, *, pace: dict[str, float] | None = None, stream: bool = True) -> bytes:
        return self.dialect.chat(MODEL, tokens, pace=pace, stream=stream)

    async def call(self, service: str, body: bytes) -> bytes:
        async with self._client.request("POST", _PATHS[service], body) as response:
            return await response.read(_ANSWER_LIMIT)

    @asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._client.request("POST", _PATHS["chat"], body) as response:
            yield whole_lines(response)


@dataclass(frozen=True, slots=True)
class Flavor:
    """Both ways, the plugin speaking one flavor. `group` is the title of its table."""

    group: str
    rig: Rig


@asynccontextmanager
async def flavors(folder: Path) -> AsyncIterator[Sequence[Flavor]]:
    """Both flavors, ready. Ends all processes when left."""
    async with AsyncExitStack() as cleanup:
        program = await cleanup.enter_async_context(helper("benchmarks.ollama_upstream"))
        address = str(await program.answer())
        host, _, port = address.rpartition(":")
        http = Http1Client((host, int(port)))
        cleanup.callback(http.close)
        direct = DirectLines(OllamaClient(http))
        native = await _plugged(cleanup, folder / "native", address, "ollama", OLLAMA_EVENTS)
        openai = await _plugged(cleanup, folder / "openai", address, "openai", OPENAI)
        yield (
            Flavor("Ollama's stand-in, Ollama's own JSON", Rig(direct, *native)),
            Flavor("Ollama's stand-in, OpenAI's JSON", Rig(direct, *openai)),
        )


async def _plugged(
    cleanup: AsyncExitStack, folder: Path, address: str, flavor: str, dialect: Dialect
) -> tuple[Plugged, PluginClient]:
    """A plugin that is attached to the server."""
    options = {"name": "ollama", "server": "attach", "address": address}
    write_plugin(folder, options, base="ollama", refs={"chat": f"{flavor}:chat"})
    client = await launch(COMMAND, name="plugin", cwd=folder, start_timeout=_START_TIMEOUT)
    await cleanup.enter_async_context(client)
    return Plugged(client, dialect, MODEL), client


async def ollama_round(results: Results, both: Sequence[Flavor], sizes: Sizes) -> None:
    """One round: both flavors, the other one first in every other round."""
    for flavor in both if results.rounds % 2 else both[::-1]:
        await synthetic_round(results, flavor.rig, sizes, flavor.group)
