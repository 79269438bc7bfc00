"""One service call on an Ollama server: sends the requests that it takes and converts their answers.

Called by the engine with the facts of the model. A request to the server yields one choice for one prompt. Several
choices are requested one after the other: the server would queue parallel requests unless configured otherwise.
"""

from __future__ import annotations

from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama import answers, native, requests, transcription
from engine_plugin.engines.ollama.events import ChoiceWriter, usage_event
from engine_plugin.engines.ollama.lines import NOT_DONE, collect
from engine_plugin.errors import BadGatewayError, UnsupportedError
from engine_plugin.transport.answers import ANSWER_LIMIT, drained
from engine_plugin.transport.ndjson import whole_lines
from engine_plugin.transport.sse import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.lines import CollectedAnswer
    from engine_plugin.engines.ollama.models import ModelFacts
    from engine_plugin.engines.ollama.options import OllamaOptions
    from engine_plugin.speech.decoder import Decoder
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["call", "stream"]


async def call(
    client: OllamaClient,
    service: str,
    request: dict[str, Any],
    facts: ModelFacts,
    options: OllamaOptions,
    decoder: Decoder,
) -> bytes:
    """Answer a unary call of chat, generate, embed or speech-to-text with one JSON object.

    The object is Ollama's own if `facts.native`, else OpenAI's. Raises what the server's errors map to.
    """
    if service == "speech-to-text":
        return await transcription.transcribe(client, request, facts, decoder)
    exchange = _Exchange(client, service, facts, options)
    if service not in requests.STREAMED:
        async with exchange.send(request) as response:
            data = await response.read(ANSWER_LIMIT)
        convert = answers.native_embeddings if facts.native else answers.openai_embeddings
        return convert(data, request)
    collected: list[CollectedAnswer] = []
    for single in requests.single_requests(service, request, native=facts.native):
        async with exchange.send(single) as response:
            collected.append(await collect(service, response, facts.name))
    if facts.native:
        return native.native_answer(service, collected[0])
    return answers.openai_answer(service, collected, request)


@asynccontextmanager
async def stream(
    client: OllamaClient, service: str, request: dict[str, Any], facts: ModelFacts, options: OllamaOptions
) -> AsyncIterator[AsyncIterator[bytes]]:
    """Answer a streamed call of chat or generate: yields an iterator of blocks of whole events.

    Leaving the block closes the connection, which stops the server's work. Raises UnsupportedError for other
    services.
    """
    if service not in requests.STREAMED:
        raise UnsupportedError(f"{service}: Ollama does not stream this service; call InvokeService")
    exchange = _Exchange(client, service, facts, options)
    first, *others = requests.single_requests(service, request, native=facts.native)
    async with exchange.send(first) as response:
        if facts.native:
            events = native.native_events(response, facts.name)
        else:
            events = exchange.openai_events(response, others, request)
        async with aclosing(events) as blocks:
            yield blocks


class _Exchange:
    """The parameters that all requests of one call have in common."""

    def __init__(self, client: OllamaClient, service: str, facts: ModelFacts, options: OllamaOptions) -> None:
        self._client = client
        self._service = service
        self._facts = facts
        self._options = options

    def send(self, request: dict[str, Any]) -> AbstractAsyncContextManager[HttpResponse]:
        path, body = requests.upstream_request(self._service, request, self._facts, self._options)
        return self._client.request("POST", path, body, model=self._facts.name)

    async def openai_events(
        self, first: HttpResponse, others: list[dict[str, Any]], request: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the events of each choice as they arrive, then the usage. Each choice has its own request.

        An error line raises its exception after the events before it; a stream that ends early, BadGatewayError.
        """
        head = answers.answer_head(self._service, request["model"], stream=True)
        tags = answers.has_think_tags(request)
        writers = [
            ChoiceWriter(self._service, head, index, tags=tags, model=self._facts.name)
            for index in range(len(others) + 1)
        ]
        for writer, single in zip(writers, [None, *others], strict=True):
            async with nullcontext(first) if single is None else self.send(single) as response:
                async for lines in whole_lines(response):
                    if events := writer.write(lines):
                        yield events
                    if writer.failure is not None:
                        raise writer.failure
                    if writer.last:
                        break
                else:
                    raise BadGatewayError(NOT_DONE)
                if single is not None:
                    await drained(response)
        wanted = request.get("stream_options")
        usage = b""
        if isinstance(wanted, dict) and wanted.get("include_usage"):
            usage = usage_event(head, [writer.last for writer in writers], request.get("n") or 1)
        yield usage + DONE
        await drained(first)
