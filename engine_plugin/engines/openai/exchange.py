"""One exchange with the server: its client, its errors, and its answer, streamed or whole."""

from __future__ import annotations

from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.openai.errors import (
    StillLoadingError,
    is_about_loading,
    is_about_model,
    is_about_path,
    other_error,
)
from engine_plugin.engines.openai.requests import as_stream
from engine_plugin.errors import BadGatewayError, InvalidRequestError, UnavailableError, UnsupportedError
from engine_plugin.jsontext import answer_object, write_json
from engine_plugin.models.info import KIND_OF_SERVICE
from engine_plugin.models.names import near_names
from engine_plugin.openai_api.assemble import assembled
from engine_plugin.openai_api.completions import CompletionLogprobs, wants_logprobs
from engine_plugin.transport.answers import ANSWER_LIMIT, ERROR_LIMIT, Complaint, stream_events
from engine_plugin.transport.http1 import HttpResponse
from engine_plugin.transport.posting import PostingClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping
    from typing import Self

    from engine_plugin.engines.openai.connection import ServerConnection
    from engine_plugin.engines.openai.discovery import AttachedServer
    from engine_plugin.errors import EnginePluginError, ModelNotFoundError

__all__ = ["Exchange", "PeekedResponse", "model_missing", "no_service"]

_PARSED = 256 * 1024  # longer answers are not parsed, which would block the event loop
_ERRORS = (b'{"error"', b'{ "error"')


class PeekedResponse(HttpResponse):
    """A response whose first bytes were read. `is_whole`: not a stream, whatever was requested.

    The first bytes decide this rather than the content type.
    """

    def __init__(self, response: HttpResponse, first: bytes, *, is_whole: bool) -> None:
        self.status = response.status
        self.is_whole = is_whole
        self._response = response
        self._first = first

    @classmethod
    async def peek(cls, response: HttpResponse, *, streams: bool) -> Self:
        """Read the first bytes of a requested stream; servers without streams answer with JSON."""
        if not streams:
            return cls(response, b"", is_whole=True)
        first = b""
        while not first.strip() and (more := await response.read_some()):
            first = (first + more).lstrip()
        return cls(response, first, is_whole=first[:1] in (b"{", b"["))

    @property
    def complete(self) -> bool:
        return not self._first and self._response.complete

    async def read_some(self) -> bytes:
        first, self._first = self._first, b""
        return first or await self._response.read_some()


class Exchange(PostingClient):
    """One request to one server. Paths are relative to the API (`/chat/completions`).

    `service` is "" for a request that does not belong to a service.
    """

    def __init__(self, connection: ServerConnection, attachment: AttachedServer, service: str, model: str) -> None:
        self.attachment = attachment
        self._connection = connection
        self._service = service
        self._model = model

    @asynccontextmanager
    async def _posted(self, path: str, body: bytes, content_type: str) -> AsyncIterator[HttpResponse]:
        async with AsyncExitStack() as stack:
            request = self.attachment.http.request("POST", self.attachment.base.path + path, body, content_type)
            try:
                response = await stack.enter_async_context(request)
            except UnavailableError as error:  # the next call finds the server again
                self._connection.forget(self.attachment)
                raise self.attachment.unreachable(error) from error
            if not 200 <= response.status < 300:
                raise self.error_of(Complaint.of_body(response.status, await response.read(ERROR_LIMIT)))
            yield response

    @asynccontextmanager
    async def post_form(
        self, path: str, fields: Mapping[str, str], file: bytes, file_name: str
    ) -> AsyncIterator[HttpResponse]:
        """Send a recording and request segments.

        A server that rejects this gets the form again and is asked for the text only: it has computed nothing.
        """
        refusing = self.attachment.text_only_models
        async with AsyncExitStack() as stack:
            answer = None
            if self._model not in refusing:
                details = {**fields, **self.attachment.server.form_fields}
                with suppress(InvalidRequestError):  # an error for another reason repeats
                    answer = await stack.enter_async_context(super().post_form(path, details, file, file_name))
            if answer is None:
                plain = {name: fields[name] for name in fields if not name.startswith("timestamp_granularities")}
                plain["response_format"] = "json"
                answer = await stack.enter_async_context(super().post_form(path, plain, file, file_name))
                refusing.add(self._model)
            yield answer

    def error_of(self, complaint: Complaint) -> EnginePluginError:
        """The error for an error answer, or for an error in a stream."""
        if complaint.status in (401, 403):
            return self._connection.finder.key_error(self.attachment.probe, complaint.message)
        if is_about_loading(complaint):
            return StillLoadingError.of(self.attachment.title, complaint)
        if is_about_model(complaint, self._model):
            return model_missing(self.attachment, self._model)
        if self._service and is_about_path(complaint):
            if complaint.status == 501:  # the message may name a missing command line option
                return UnsupportedError(f"service_name: {self.attachment.title} says: {complaint.message}")
            self.attachment.missing_services.add(self._service)
            return no_service(self.attachment, self._service)
        return other_error(complaint)

    def events(self, response: HttpResponse) -> AsyncGenerator[bytes, None]:
        """The events of a stream, up to `[DONE]`."""
        return stream_events(response, self.error_of, self.attachment.server.ignored_event, longest=ANSWER_LIMIT)

    async def whole(self, response: PeekedResponse, request: Mapping[str, Any]) -> bytes:
        """The whole answer, assembled from a stream if necessary."""
        if response.is_whole:
            answer = await self._read_whole(response)
            if wants_logprobs(self._service, request):
                return write_json(CompletionLogprobs(request["logprobs"]).reshape(answer_object(answer)))
            return answer
        reported, size = [], 0
        async with aclosing(self.events(response)) as blocks:
            async for block in blocks:
                reported.append(block)
                size += len(block)
                if size > ANSWER_LIMIT:
                    raise BadGatewayError(f"the server's answer is longer than {ANSWER_LIMIT} bytes")
        return assembled(self._service, reported, request)

    def streamed(self, response: PeekedResponse, request: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """The events of the answer, made from a whole answer if necessary."""
        events = self._whole_as_stream(response, request) if response.is_whole else self.events(response)
        if wants_logprobs(self._service, request):
            return CompletionLogprobs(request["logprobs"]).stream(events)
        return events

    async def _whole_as_stream(self, response: PeekedResponse, request: Mapping[str, Any]) -> AsyncIterator[bytes]:
        answer = await self._read_whole(response)
        options = request.get("stream_options")
        yield as_stream(answer, usage=isinstance(options, dict) and bool(options.get("include_usage")))

    async def _read_whole(self, response: PeekedResponse) -> bytes:
        """Read a whole answer. Raises for an error with status 200, as LM Studio sends it, and for a non-object."""
        answer = await response.read(ANSWER_LIMIT)
        short = len(answer) <= _PARSED
        wrong = bool(answer_object(answer).get("error")) if short else answer.startswith(_ERRORS)
        if wrong:
            raise self.error_of(Complaint.of_body(200, answer))
        if not (answer.lstrip()[:1] == b"{" and answer.rstrip()[-1:] == b"}"):
            raise BadGatewayError(f"the server's answer is not a JSON object: {answer[:200]!r}")
        return answer


def model_missing(attachment: AttachedServer, name: str) -> ModelNotFoundError:
    """The error for a model that is missing in the last list of the server."""
    names = [found.name for found in attachment.info.models]
    pull = name if attachment.server.pulls and "/" in name else ""
    return catalogue.model_missing(name, near=near_names(name, names), here=names, pull=pull)


def no_service(attachment: AttachedServer, service: str) -> UnsupportedError:
    """The error for a service that the server does not have."""
    services = ", ".join(filter(attachment.has, sorted(KIND_OF_SERVICE))) or "none"
    return catalogue.SERVICE_UNSUPPORTED.error(engine=attachment.title, service=service, able=services)
