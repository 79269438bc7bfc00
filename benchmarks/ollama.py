"""A server that speaks Ollama's API: straight to it, through our plugin, and through another one.

The server is a stand-in, and the plugin is attached to it as to any Ollama. Each of the plugin's flavors of JSON is
measured: Ollama's, where lines are framed as they are, and OpenAI's, into which every line is translated. Another
plugin for Ollama is measured beside the first, and then the second is left out.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.dialects import OLLAMA_EVENTS, OLLAMA_LINES, OPENAI
from benchmarks.helpers import helper
from benchmarks.measures import streams
from benchmarks.ollama_upstream import EMBEDDER, MODEL
from benchmarks.programs import ours
from benchmarks.results import DIRECT
from benchmarks.rounds import calls_round, streams_round
from benchmarks.targets import Plugged, Rig, write_plugin
from engine_plugin.transport.http1 import Http1Client
from engine_plugin.transport.ndjson import whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from benchmarks.dialects import Dialect
    from benchmarks.measures import Sizes
    from benchmarks.programs import Peer, Program
    from benchmarks.results import Results

__all__ = ["Flavor", "flavors", "ollama_round", "prepare"]

_PATHS = {"chat": "/api/chat", "embed": "/api/embed"}
_ANSWER_LIMIT = 128 * 1024 * 1024


class DirectLines:
    """Straight to the server, in blocks of whole lines."""

    name = DIRECT
    dialect = OLLAMA_LINES

    def __init__(self, http: Http1Client) -> None:
        self._http = http

    def chat(self, tokens: int, *, stream: bool = True, **more: float | str) -> bytes:
        return self.dialect.chat(MODEL, tokens, stream=stream, **more)

    async def nothing(self) -> None:
        async with self._http.request("GET", "/api/version") as response:
            await response.read(_ANSWER_LIMIT)

    async def call(self, service: str, body: bytes) -> bytes:
        async with self._http.request("POST", _PATHS[service], body) as response:
            return await response.read(_ANSWER_LIMIT)

    @asynccontextmanager
    async def stream(self, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        async with self._http.request("POST", _PATHS["chat"], body) as response:
            yield whole_lines(response)


@dataclass(frozen=True, slots=True)
class Flavor:
    """All ways, the plugins speaking one flavor. `group` is the title of its table."""

    group: str
    rig: Rig


@asynccontextmanager
async def flavors(folder: Path, peer: Peer | None) -> AsyncIterator[Sequence[Flavor]]:
    """All flavors, ready; only the first with a peer. Ends all processes when left."""
    async with AsyncExitStack() as cleanup:
        program = await cleanup.enter_async_context(
            helper("benchmarks.ollama_upstream", *([peer.engine] if peer else []))
        )
        address = str(await program.answer())
        host, _, port = address.rpartition(":")
        http = Http1Client((host, int(port)))
        cleanup.callback(http.close)
        native = _configured(folder / "native", address, "ollama")
        programs = [*ours(folder, native, both=peer is not None), *([peer.program] if peer else [])]
        plugins = await _plugged(cleanup, programs, OLLAMA_EVENTS)
        direct = DirectLines(http)
        found = [Flavor("Ollama's stand-in, Ollama's own JSON", Rig(direct, plugins, EMBEDDER))]
        if peer is None:
            openai = ours(folder, _configured(folder / "openai", address, "openai"))
            translated = Rig(direct, await _plugged(cleanup, openai, OPENAI))
            found.append(Flavor("Ollama's stand-in, OpenAI's JSON", translated))
        yield found


def _configured(folder: Path, address: str, flavor: str) -> Path:
    """A directory whose plugin.yaml attaches our plugin to the server."""
    options = {"name": "ollama", "server": "attach", "address": address}
    return write_plugin(
        folder, options, base="ollama", refs={"chat": f"{flavor}:chat", "embed": "ollama:embed"}
    ).parent


async def _plugged(cleanup: AsyncExitStack, programs: Sequence[Program], dialect: Dialect) -> tuple[Plugged, ...]:
    clients = [await cleanup.enter_async_context(await program.launch()) for program in programs]
    return tuple(
        Plugged(client, dialect, MODEL, program.name) for client, program in zip(clients, programs, strict=True)
    )


async def ollama_round(results: Results, all_flavors: Sequence[Flavor], sizes: Sizes) -> None:
    """One round: all flavors, another one first in every other round."""
    for flavor in all_flavors if results.rounds % 2 else all_flavors[::-1]:
        await calls_round(results, flavor.rig, sizes, flavor.group)
        await streams_round(results, flavor.rig, sizes, flavor.group)


async def prepare(flavor: Flavor, sizes: Sizes) -> None:
    """Have the server make the lines of the longest stream, which it keeps."""
    direct = flavor.rig.direct
    await streams(direct, direct.chat(sizes.synthetic_tokens), 1)
