"""One call of a service: the requests to the server that it takes, and the answer made of theirs.

Called by the engine with the model's facts. The server answers one prompt with one choice; several are asked for one
after the other, as it would compute them anyway unless it was told otherwise.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama import answers, native, requests, transcription
from engine_plugin.engines.ollama.events import ChoiceWriter, choice_events, usage_event
from engine_plugin.engines.ollama.gather import gathered
from engine_plugin.engines.ollama.validators import native_validator
from engine_plugin.errors import UnsupportedError
from engine_plugin.transport.answers import drained
from engine_plugin.transport.sse import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from engine_plugin.engines.ollama.connection import OllamaClient
    from engine_plugin.engines.ollama.gather import Whole
    from engine_plugin.engines.ollama.models import ModelFacts
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.manifest import ServiceSpec
    from engine_plugin.services import RequestValidator
    from engine_plugin.speech.decoder import Decoder
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["call", "stream", "validator"]

_ANSWER_LIMIT = 512 * 1024 * 1024


def validator(service: ServiceSpec) -> RequestValidator | None:
    """What a request in Ollama's own JSON must hold, for a service whose host speaks it; None when there is no such
    JSON."""
    return native_validator(service.service_name)


async def call(
    client: OllamaClient,
    service: str,
    request: dict[str, Any],
    facts: ModelFacts,
    options: OllamaOptions,
    decoder: Decoder,
) -> bytes:
    """Answer chat, generate or embed in the flavour that `facts` say, or speech-to-text, with one JSON object."""
    if service == "speech-to-text":
        return await transcription.transcribe(client, request, facts, decoder)
    exchange = _Exchange(client, service, facts, options)
    if service not in requests.STREAMED:
        async with exchange.sent(request) as response:
            data = await response.read(_ANSWER_LIMIT)
        make = answers.native_embeddings if facts.native else answers.embeddings_answer
        return make(data, request)
    wholes: list[Whole] = []
    for single in requests.single_requests(service, request, native=facts.native):
        async with exchange.sent(single) as response:
            wholes.append(await gathered(service, response, facts.name))
    if facts.native:
        return native.native_answer(service, wholes[0])
    return answers.openai_answer(service, wholes, request)


@asynccontextmanager
async def stream(
    client: OllamaClient, service: str, request: dict[str, Any], facts: ModelFacts, options: OllamaOptions
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Answer chat or generate in blocks of whole events. Leaving the block stops the server's work."""
    if service not in requests.STREAMED:
        raise UnsupportedError(f"{service}: Ollama does not stream this service; call InvokeService")
    exchange = _Exchange(client, service, facts, options)
    first, *others = requests.single_requests(service, request, native=facts.native)
    async with exchange.sent(first) as response:
        if facts.native:
            events = native.native_events(response, facts.name)
        else:
            events = exchange.openai_events(response, others, request)
        async with aclosing(events) as blocks:
            yield blocks


class _Exchange:
    """What all requests of one call have in common."""

    def __init__(self, client: OllamaClient, service: str, facts: ModelFacts, options: OllamaOptions) -> None:
        self._client = client
        self._service = service
        self._facts = facts
        self._options = options

    @asynccontextmanager
    async def sent(self, request: dict[str, Any]) -> AsyncIterator[HttpResponse]:
        path, body = requests.upstream(self._service, request, self._facts, self._options)
        async with self._client.request("POST", path, body, model=self._facts.name) as response:
            yield response

    async def openai_events(
        self, first: HttpResponse, others: list[dict[str, Any]], request: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        """The first choice's events, then those of the others, each asked for when the one before it is done."""
        head = answers.answer_head(self._service, request["model"], stream=True)
        tags = answers.parses_tags(request)
        writers = [
            ChoiceWriter(self._service, head, index, tags=tags, model=self._facts.name)
            for index in range(len(others) + 1)
        ]
        async for block in choice_events(writers[0], first):
            yield block
        for writer, single in zip(writers[1:], others, strict=True):
            async with self.sent(single) as response:
                async for block in choice_events(writer, response):
                    yield block
                await drained(response)
        wanted = request.get("stream_options")
        usage = b""
        if isinstance(wanted, dict) and wanted.get("include_usage"):
            usage = usage_event(head, [writer.last for writer in writers], request.get("n") or 1)
        yield usage + DONE
        await drained(first)
