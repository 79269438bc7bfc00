"""The way to one server: one exchange each, and what goes wrong in the words of who must mend it."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from engine_plugin.engines.openai.errors import complaint_of_body
from engine_plugin.errors import UnavailableError
from engine_plugin.transport.answers import ERROR_LIMIT
from engine_plugin.transport.posting import PostingClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.transport.answers import Complaint
    from engine_plugin.transport.http1 import Http1Client, HttpResponse

__all__ = ["ApiClient", "Errors"]


class Errors(Protocol):
    """Who makes exceptions of what goes wrong: the engine, for one request."""

    def down(self, reason: UnavailableError) -> EnginePluginError:
        """For a server that cannot be reached."""

    def of(self, complaint: Complaint) -> EnginePluginError:
        """For what the server complained of."""


class ApiClient(PostingClient):
    """Asks one server for one request's sake; paths are those below its interface (`/chat/completions`)."""

    def __init__(self, http: Http1Client, path: str, errors: Errors) -> None:
        self._http = http
        self._path = path
        self._errors = errors

    @asynccontextmanager
    async def _posted(self, path: str, body: bytes, content_type: str) -> AsyncIterator[HttpResponse]:
        async with AsyncExitStack() as stack:
            try:
                exchange = self._http.request("POST", self._path + path, body, content_type)
                response = await stack.enter_async_context(exchange)
            except UnavailableError as error:
                raise self._errors.down(error) from error
            if not 200 <= response.status < 300:
                raise self._errors.of(complaint_of_body(response.status, await response.read(ERROR_LIMIT)))
            yield response
