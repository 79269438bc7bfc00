"""The way to an Ollama server: one exchange each, and what a refusal or a broken connection means."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine_plugin.engines.ollama.errors import complaint_error, complaint_of_body
from engine_plugin.errors import BadGatewayError, EnginePluginError, UnavailableError
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.transport.answers import ERROR_LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from engine_plugin.transport.http1 import Http1Client, HttpResponse, Response

__all__ = ["NotBegunError", "OllamaClient"]

_PATIENCE = 30.0
"""Seconds for an answer that takes no computing."""
_SHOWN = 200


_STOPPED = "the engine was stopped while it worked on this request"


class NotBegunError(UnavailableError):
    """The server was ended before it answered the first word; its successor, if there is one, may be asked."""


class OllamaClient:
    """Talks to one server. Made by whoever owns the server, and handed to whoever answers a request."""

    def __init__(
        self,
        http: Http1Client,
        url: str = "",
        explain: Callable[[EnginePluginError], Awaitable[EnginePluginError]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`http` connects to the server at `url`, with these `headers`, which both are for clients of other kinds;
        below the path of `url` is the server. `explain` is asked why a connection failed or broke."""
        self.url = url.rstrip("/")
        self.headers = dict(headers or {})
        self._http = http
        self._prefix = urlsplit(self.url).path
        self._explain = explain
        self._live: set[Response] = set()
        self._closed = False
        self._quiet = asyncio.Event()
        self._quiet.set()

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        content_type: str = "application/json",
        *,
        model: str = "",
    ) -> AsyncIterator[HttpResponse]:
        """One exchange: yields the answer once its head has arrived and is 200, else raises the mapped error.

        `model` is what the request names, for messages. Leaving the block early tells the server to stop. Raises
        UnavailableError when there is no server, or `close` came meanwhile.
        """
        exchange = self._http.request(method, self._prefix + path, body, content_type)
        self._live.add(exchange)
        self._quiet.clear()
        begun = False
        try:
            self._require_open(begun)
            async with exchange as response:
                begun = True
                if response.status != 200:
                    said = complaint_of_body(response.status, await response.read(ERROR_LIMIT))
                    raise complaint_error(said, model)
                yield response
        except (BadGatewayError, UnavailableError) as error:
            self._require_open(begun)
            if not exchange.broken or self._explain is None:
                raise
            raise await self._explain(error) from error
        finally:
            self._live.discard(exchange)
            if not self._live:
                self._quiet.set()

    async def ask(
        self, method: str, path: str, shape: Mapping[str, Any] | None = None, *, model: str = "", within: float = 0
    ) -> dict[str, Any]:
        """One exchange of JSON objects, {} for an empty answer, within so many seconds (0: 30).

        Raises UnavailableError when it takes longer, BadGatewayError for an answer that is not a JSON object.
        """
        body = None if shape is None else json.dumps(shape).encode()
        limit = within or _PATIENCE
        try:
            async with asyncio.timeout(limit), self.request(method, path, body, model=model) as response:
                answer = await response.read(LARGEST_JSON)
        except TimeoutError:
            raise UnavailableError(f"the Ollama server did not answer {path} in {limit:g} s") from None
        if not answer.strip():
            return {}
        try:
            found = await in_thread(read_json, answer, LARGEST_JSON)
        except JsonError as error:
            raise BadGatewayError(f"the server's answer to {path} {error}") from None
        if not isinstance(found, dict):
            raise BadGatewayError(f"the server's answer to {path} is not a JSON object: {answer[:_SHOWN]!r}")
        return found

    async def quiet(self) -> None:
        """Wait until nothing is under way."""
        await self._quiet.wait()

    def close(self) -> None:
        """Break off what is under way, which is told so as UnavailableError, and drop the connections."""
        self._closed = True
        for exchange in list(self._live):
            exchange.give_up()
        self._http.close()

    def _require_open(self, begun: bool) -> None:
        if self._closed:
            raise UnavailableError(_STOPPED) if begun else NotBegunError(_STOPPED)
