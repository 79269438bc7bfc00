"""The way to an Ollama server: one exchange each, and what a refusal means."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin.engines.http.answers import ERROR_LIMIT
from engine_plugin.engines.ollama.errors import complaint_error, complaint_of_body

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.engines.http.http1 import Http1Client, HttpResponse

__all__ = ["OllamaClient"]


class OllamaClient:
    """Talks to one server, below `prefix`. Made by the engine; whoever answers a request is handed one."""

    def __init__(self, http: Http1Client, prefix: str = "") -> None:
        self._http = http
        self._prefix = prefix

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

        `model` is what the request names, for the message. Leaving the block early tells the server to stop.
        """
        async with self._http.request(method, self._prefix + path, body, content_type) as response:
            if response.status != 200:
                said = complaint_of_body(response.status, await response.read(ERROR_LIMIT))
                raise complaint_error(said, model)
            yield response
