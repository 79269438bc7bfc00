"""The HTTP client of the server, and the exceptions for the server's errors.

The OpenVINO Model Server and the embedded server have the same routes and answers.
"""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.errors import BadGatewayError, EnginePluginError, InvalidRequestError, UnavailableError
from engine_plugin.transport.answers import ERROR_LIMIT, Complaint, explained
from engine_plugin.transport.posting import PostingClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.process.run import ProcessRun
    from engine_plugin.transport.http1 import Http1Client, HttpResponse, Response

__all__ = ["ServerClient", "complaint_error"]

_RELOAD_LIMIT = 16 * 1024 * 1024
_NAMES_A_FIELD = re.compile(r"([a-z_]+(?:\[\d+\]|\.[A-Za-z_]+)*): ")


class ServerClient(PostingClient):
    """A client of one run of the server. Created by the driver; used by it and by `Speech`.

    When the server dies, requests raise BadGatewayError with the last lines of its log.
    """

    def __init__(self, http: Http1Client, run: ProcessRun | None) -> None:
        self._http = http
        self._run = run
        self._exchanges: set[Response] = set()
        self._ended = ""

    def end(self, reason: str) -> None:
        """Cancel running requests and refuse new ones: UnavailableError with this reason."""
        self._ended = reason
        for exchange in self._exchanges:
            exchange.give_up()

    def get(self, path: str) -> AbstractAsyncContextManager[HttpResponse]:
        """GET `path`. Raises the exception of `complaint_error` for any status but 200."""
        return self._answered(self._http.request("GET", path))

    def _posted(self, path: str, body: bytes, content_type: str) -> AbstractAsyncContextManager[HttpResponse]:
        return self._answered(self._http.request("POST", path, body, content_type))

    async def reload(self) -> str:
        """Have the server apply config.json, and wait until all changes are complete. Returns its error, or ""."""
        async with self._sent(self._http.request("POST", "/v1/config/reload", b"")) as response:
            body = await response.read(_RELOAD_LIMIT)
            good = response.status in (200, 201)
            return "" if good else Complaint.of_body(response.status, body).message

    @asynccontextmanager
    async def _answered(self, exchange: Response) -> AsyncIterator[HttpResponse]:
        async with self._sent(exchange) as response:
            if response.status != 200:
                body = await response.read(ERROR_LIMIT)
                raise complaint_error(Complaint.of_body(response.status, body))
            yield response

    @asynccontextmanager
    async def _sent(self, exchange: Response) -> AsyncIterator[HttpResponse]:
        if self._ended:
            raise UnavailableError(self._ended)
        self._exchanges.add(exchange)
        try:
            async with exchange as response:
                yield response
        except (BadGatewayError, UnavailableError) as error:
            if self._ended:
                raise UnavailableError(self._ended) from error
            if not exchange.broken or self._run is None:
                raise
            raise await explained(error, self._run) from error
        finally:
            self._exchanges.discard(exchange)


def complaint_error(complaint: Complaint) -> EnginePluginError:
    """The exception for an error of the server, before or inside a stream."""
    message = complaint.message
    if complaint.shape.get("type") == "exceed_context_size_error":
        return catalogue.CONTEXT_EXCEEDED.error(said=message)
    if complaint.status == 400 and "message" in complaint.shape and (found := _NAMES_A_FIELD.match(message)):
        return InvalidRequestError(message, field=found[1])  # from the embedded server, which names the field
    if complaint.status == 404:
        return UnavailableError(f"the server does not serve the model now: {message}. Try again")
    return complaint.error()
