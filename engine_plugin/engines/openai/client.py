"""Clients of an attached server, which raise its errors as exceptions of the engine."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Protocol

from engine_plugin.engines.openai.errors import complaint_of_body
from engine_plugin.errors import InvalidRequestError, UnavailableError
from engine_plugin.transport.answers import ERROR_LIMIT
from engine_plugin.transport.posting import PostingClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.errors import EnginePluginError
    from engine_plugin.speech.services import Answer
    from engine_plugin.transport.answers import Complaint
    from engine_plugin.transport.http1 import Http1Client, HttpResponse

__all__ = ["ApiClient", "AudioClient", "ErrorMapper"]


class ErrorMapper(Protocol):
    """Maps failures of one request to exceptions. Implemented by Exchange."""

    def unreachable(self, reason: UnavailableError) -> EnginePluginError:
        """The error for a server that cannot be reached."""

    def error_of(self, complaint: Complaint) -> EnginePluginError:
        """The error for an error answer of the server."""


class ApiClient(PostingClient):
    """Sends one request to a server. Paths are relative to the API (`/chat/completions`)."""

    def __init__(self, http: Http1Client, path: str, errors: ErrorMapper) -> None:
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
                raise self._errors.unreachable(error) from error
            if not 200 <= response.status < 300:
                raise self._errors.error_of(complaint_of_body(response.status, await response.read(ERROR_LIMIT)))
            yield response


class AudioClient:
    """A client for SpeechServices, which requests segments, or only the text if the server rejects segments.

    `details` are the form fields that request segments; `plain` collects the models that reject them.
    """

    def __init__(self, client: ApiClient, details: Mapping[str, str], plain: set[str]) -> None:
        self._client = client
        self._details = details
        self._plain = plain

    def post_json(self, path: str, body: bytes) -> AbstractAsyncContextManager[Answer]:
        """Send JSON."""
        return self._client.post_json(path, body)

    @asynccontextmanager
    async def post_form(
        self, path: str, fields: Mapping[str, str], file: bytes, file_name: str
    ) -> AsyncIterator[Answer]:
        """Send a recording. A rejected form is sent again without `details`: the server has computed nothing."""
        model = fields.get("model", "")
        async with AsyncExitStack() as stack:
            answer = None
            if model not in self._plain:
                whole = {**fields, **self._details}
                try:
                    answer = await stack.enter_async_context(self._client.post_form(path, whole, file, file_name))
                except InvalidRequestError:  # retry without the details; an error for another reason repeats
                    pass
            if answer is None:
                plain = {name: fields[name] for name in fields if not name.startswith("timestamp_granularities")}
                plain["response_format"] = "json"
                answer = await stack.enter_async_context(self._client.post_form(path, plain, file, file_name))
                self._plain.add(model)
            yield answer
