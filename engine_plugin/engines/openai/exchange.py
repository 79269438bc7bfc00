"""One request's turn at the server: its client, what goes wrong there, and its answer, streamed or at once."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.openai.client import ApiClient
from engine_plugin.engines.openai.errors import (
    StillLoadingError,
    complaint_of_body,
    is_about_loading,
    is_about_model,
    is_about_path,
    other_error,
)
from engine_plugin.engines.openai.requests import as_stream
from engine_plugin.errors import BadGatewayError, UnsupportedError
from engine_plugin.jsontext import answer_object, write_json
from engine_plugin.models.info import KIND_OF_SERVICE
from engine_plugin.models.names import near_names
from engine_plugin.openai_api.assemble import assembled
from engine_plugin.openai_api.completions import CompletionLogprobs, wants_logprobs
from engine_plugin.transport.answers import ANSWER_LIMIT, stream_events

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from engine_plugin.engines.openai.connection import HeldServer
    from engine_plugin.engines.openai.discovery import Attachment, Finder
    from engine_plugin.engines.openai.peeked import Begun
    from engine_plugin.errors import EnginePluginError, ModelNotFoundError, UnavailableError
    from engine_plugin.transport.answers import Complaint
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["Turn", "model_missing", "no_service"]

_PARSED = 256 * 1024  # longer ones are not read by us: that would hold up all others
_ERRORS = (b'{"error"', b'{ "error"')


class Turn:
    """Made by the engine for one request to one server. `service` is "" for what is no service's request."""

    def __init__(self, held: HeldServer, finder: Finder, attachment: Attachment, service: str, model: str) -> None:
        self.attachment = attachment
        self._held = held
        self._finder = finder
        self._service = service
        self._model = model

    def client(self) -> ApiClient:
        """Who sends it."""
        return ApiClient(self.attachment.http, self.attachment.base.path, self)

    def down(self, reason: UnavailableError) -> EnginePluginError:
        """The server cannot be reached: the next call looks for it anew."""
        self._held.forget(self.attachment)
        return self.attachment.down(reason)

    def of(self, complaint: Complaint) -> EnginePluginError:
        """The server's answer is no good one, or its stream had an error."""
        if complaint.status in (401, 403):
            return self._finder.key_error(self.attachment, complaint.message)
        if is_about_loading(complaint):
            return StillLoadingError.of(self.attachment.title, complaint)
        if is_about_model(complaint, self._model):
            return model_missing(self.attachment, self._model)
        if self._service and is_about_path(complaint):
            if complaint.status == 501:  # for want of a switch, perhaps, which its words name
                return UnsupportedError(f"service_name: {self.attachment.title} says: {complaint.message}")
            self.attachment.lacks.add(self._service)
            return no_service(self.attachment, self._service)
        return other_error(complaint)

    def events(self, response: HttpResponse) -> AsyncGenerator[bytes, None]:
        """The events of its stream, up to `[DONE]`."""
        return stream_events(response, self.of, self.attachment.server.noise, longest=ANSWER_LIMIT)

    async def whole(self, begun: Begun, request: Mapping[str, Any]) -> bytes:
        """The answer that the server gives at once, or in the pieces of a stream."""
        if begun.is_whole:
            answer = await self._at_once(begun)
            if wants_logprobs(self._service, request):
                return write_json(CompletionLogprobs(request["logprobs"]).reshape(answer_object(answer)))
            return answer
        told, size = [], 0
        async with aclosing(self.events(begun)) as blocks:
            async for block in blocks:
                told.append(block)
                size += len(block)
                if size > ANSWER_LIMIT:
                    raise BadGatewayError(f"the server's answer is longer than {ANSWER_LIMIT} bytes")
        return assembled(self._service, told, request)

    def streamed(self, begun: Begun, request: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """The events that the server streams, or those of what it says at once."""
        events = self._told_at_once(begun, request) if begun.is_whole else self.events(begun)
        if wants_logprobs(self._service, request):
            return CompletionLogprobs(request["logprobs"]).stream(events)
        return events

    async def _told_at_once(self, begun: Begun, request: Mapping[str, Any]) -> AsyncIterator[bytes]:
        answer = await self._at_once(begun)
        options = request.get("stream_options")
        yield as_stream(answer, usage=isinstance(options, dict) and bool(options.get("include_usage")))

    async def _at_once(self, begun: Begun) -> bytes:
        """The answer. Raises for an error that came with a good answer's status, as LM Studio sends it, and for no
        object."""
        answer = await begun.read(ANSWER_LIMIT)
        short = len(answer) <= _PARSED
        wrong = bool(answer_object(answer).get("error")) if short else answer.startswith(_ERRORS)
        if wrong:
            raise self.of(complaint_of_body(200, answer))
        if not (answer.lstrip()[:1] == b"{" and answer.rstrip()[-1:] == b"}"):
            raise BadGatewayError(f"the server's answer is not a JSON object: {answer[:200]!r}")
        return answer


def model_missing(attachment: Attachment, name: str) -> ModelNotFoundError:
    """The error for a model that the server has not, as far as its last list says."""
    names = [found.name for found in attachment.seen.models]
    pull = name if attachment.server.pulls and "/" in name else ""
    return catalogue.model_missing(name, near=near_names(name, names), here=names, pull=pull)


def no_service(attachment: Attachment, service: str) -> UnsupportedError:
    """The error for a service that the server has not."""
    able = ", ".join(attachment.able(sorted(KIND_OF_SERVICE))) or "nothing that is known"
    return catalogue.SERVICE_UNSUPPORTED.error(engine=attachment.title, service=service, able=able)
