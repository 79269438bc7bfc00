"""A client for one Ollama server, which maps error answers and broken connections to exceptions."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine_plugin.engines.ollama.errors import body_complaint, exception_for
from engine_plugin.errors import BadGatewayError, EnginePluginError, UnavailableError
from engine_plugin.jsontext import BRIEF, JsonError, read_json
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.transport.answers import ERROR_LIMIT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from engine_plugin.transport.http1 import Http1Client, HttpResponse, Response

__all__ = ["OllamaClient", "StoppedBeforeAnswerError"]

_TIMEOUT = 30.0
"""Seconds for an answer that needs no model."""
_SHOWN = 200
_STOPPED = "the engine was stopped while it worked on this request"


class StoppedBeforeAnswerError(UnavailableError):
    """The server was stopped before its answer began. The request can be sent to the server that replaces it."""


class OllamaClient:
    """A client for one server. Created by the owner of the server, `AttachedServer` or `OllamaProcess`."""

    def __init__(
        self,
        http: Http1Client,
        url: str = "",
        explain: Callable[[EnginePluginError], Awaitable[EnginePluginError]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`http` connects to the server at `url`; requests go below the path of `url`.

        `headers` are those that `http` sends, for uploads, which use another HTTP client. `explain` turns the error
        of a failed or broken connection into one that names the reason.
        """
        self.url = url.rstrip("/")
        self.headers = dict(headers or {})
        self._http = http
        self._prefix = urlsplit(self.url).path
        self._explain = explain
        self._live: set[Response] = set()
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()

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
        """Send one request and yield the response when its head has arrived with status 200.

        `model` is the model that the request names, for errors. Leaving the block early closes the connection, which
        stops the server's work. Raises the mapped error for other statuses; UnavailableError if the server cannot be
        reached, or if `close` is called meanwhile.
        """
        exchange = self._http.request(method, self._prefix + path, body, content_type)
        self._live.add(exchange)
        self._idle.clear()
        begun = False
        try:
            self._require_open(begun)
            async with exchange as response:
                begun = True
                if response.status != 200:
                    complaint = body_complaint(response.status, await response.read(ERROR_LIMIT))
                    raise exception_for(complaint, model)
                yield response
        except (BadGatewayError, UnavailableError) as error:
            self._require_open(begun)
            if not exchange.broken or self._explain is None:
                raise
            raise await self._explain(error) from error
        finally:
            self._live.discard(exchange)
            if not self._live:
                self._idle.set()

    async def ask(
        self, method: str, path: str, shape: Mapping[str, Any] | None = None, *, model: str = "", within: float = 0
    ) -> dict[str, Any]:
        """Send a JSON object and return the object of the answer, {} for an empty one.

        `within` is in seconds; 0 means 30. Raises UnavailableError for a late answer, BadGatewayError for one that is
        not a JSON object, and the errors of `request`.
        """
        body = None if shape is None else json.dumps(shape).encode()
        limit = within or _TIMEOUT
        try:
            async with asyncio.timeout(limit), self.request(method, path, body, model=model) as response:
                answer = await response.read(LARGEST_JSON)
        except TimeoutError:
            raise UnavailableError(f"the Ollama server did not answer {path} in {limit:g} s") from None
        if not answer.strip():
            return {}
        try:
            if len(answer) <= BRIEF:
                found = read_json(answer, LARGEST_JSON)
            else:
                found = await in_thread(read_json, answer, LARGEST_JSON)
        except JsonError as error:
            raise BadGatewayError(f"the Ollama server's answer to {path} {error}") from None
        if not isinstance(found, dict):
            raise BadGatewayError(f"the Ollama server's answer to {path} is not a JSON object: {answer[:_SHOWN]!r}")
        return found

    async def wait_idle(self) -> None:
        """Wait until no request is running."""
        await self._idle.wait()

    def close(self) -> None:
        """Abort the running requests, which raise UnavailableError, and close the connections."""
        self._closed = True
        for exchange in list(self._live):
            exchange.give_up()
        self._http.close()

    def _require_open(self, begun: bool) -> None:
        if self._closed:
            raise UnavailableError(_STOPPED) if begun else StoppedBeforeAnswerError(_STOPPED)
