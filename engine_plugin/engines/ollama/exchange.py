"""One service call on an Ollama server: sends the requests that it takes and converts their answers.

A request to the server yields one choice for one prompt. Several choices are requested one after the other: the
server would queue parallel requests unless configured otherwise.
"""

from __future__ import annotations

import base64
import binascii
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.ollama import answers, requests
from engine_plugin.engines.ollama.client import StoppedBeforeAnswerError
from engine_plugin.engines.ollama.events import ChoiceWriter, NativeWriter, usage_event
from engine_plugin.errors import BadGatewayError, UnsupportedError
from engine_plugin.speech.containers import container_of
from engine_plugin.system.data_urls import base64_start
from engine_plugin.transport.answers import ANSWER_LIMIT, drained
from engine_plugin.transport.ndjson import whole_lines
from engine_plugin.transport.posting import PostingClient
from engine_plugin.transport.sse import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.models import ModelFacts
    from engine_plugin.speech.services import SpeechServices
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["Exchange"]

_BASE64_OF_18_BYTES = 24


class Exchange(PostingClient):
    """One call of a service with a model. Created by the engine with the facts of the model.

    Answers of chat, generate and embed are Ollama's own JSON if `facts.native`, else OpenAI's. `SpeechServices` posts
    through it.
    """

    def __init__(
        self,
        client: OllamaClient,
        service: str,
        facts: ModelFacts,
        replacement: Callable[[], Awaitable[OllamaClient]],
    ) -> None:
        """`replacement` gives the client of the server that replaces a stopped one. Raises UnavailableError."""
        self._client = client
        self._service = service
        self._facts = facts
        self._replacement = replacement

    async def call(self, request: dict[str, Any]) -> bytes:
        """The answer as one JSON object. Raises what the server's errors map to."""
        native = self._facts.native
        if self._service not in requests.STREAMED:
            async with self._sent(request) as response:
                data = await response.read(ANSWER_LIMIT)
            return answers.native_embeddings(data, request) if native else answers.openai_embeddings(data, request)
        wholes: list[dict[str, Any]] = []
        for single in requests.single_requests(self._service, request, native=native):
            async with self._sent(single) as response:
                wholes.append(await answers.collect(self._service, response, self._facts.name))
        return answers.to_json(wholes[0]) if native else answers.openai_answer(self._service, wholes, request)

    @asynccontextmanager
    async def stream(self, request: dict[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """Yield an iterator of blocks of whole events, once the head of the answer has arrived.

        Leaving the block closes the connection, which stops the server's work. Raises UnsupportedError for embed.
        """
        if self._service not in requests.STREAMED:
            raise catalogue.STREAM_UNSUPPORTED.error(service=self._service, engine="Ollama")
        first, *others = requests.single_requests(self._service, request, native=self._facts.native)
        async with self._sent(first) as response, aclosing(self._events(response, others, request)) as blocks:
            yield blocks

    async def transcribe(self, speech: SpeechServices, request: dict[str, Any]) -> bytes:
        """Answer a speech-to-text request by OpenAI's path, which Ollama has since 0.20.

        WAV and MP3 are sent unchanged, other formats are converted to WAV first. Raises UnsupportedError for
        translation.
        """
        if (request.get("task") or "transcribe") != "transcribe":
            raise UnsupportedError("task: Ollama does not translate; leave task out")
        return await speech.transcribe(self, self._facts.name, request, original=_server_reads(request["audio"]))

    def _sent(self, request: dict[str, Any]) -> AbstractAsyncContextManager[HttpResponse]:
        return self.post_json(*requests.upstream_request(self._service, request, self._facts))

    @asynccontextmanager
    async def _posted(self, path: str, body: bytes, content_type: str) -> AsyncIterator[HttpResponse]:
        try:
            async with self._client.request("POST", path, body, content_type, model=self._facts.name) as response:
                yield response
        except StoppedBeforeAnswerError:  # the server was replaced while the request waited
            self._client = await self._replacement()
            async with self._posted(path, body, content_type) as response:
                yield response

    async def _events(
        self, first: HttpResponse, others: list[dict[str, Any]], request: dict[str, Any]
    ) -> AsyncGenerator[bytes, None]:
        """Yield the events of each choice as they arrive, then the usage. Each choice has its own request.

        An error line raises its exception after the events before it; a stream that ends early, BadGatewayError.
        """
        head = answers.answer_head(self._service, request["model"], stream=True)
        writers = [self._writer(head, index, request) for index in range(len(others) + 1)]
        for writer, single in zip(writers, [None, *others], strict=True):
            source = nullcontext(first) if single is None else self._sent(single)
            async with source as response, aclosing(whole_lines(response)) as blocks:
                async for lines in blocks:
                    if events := writer.write(lines):
                        yield events
                    if writer.failure is not None:
                        raise writer.failure
                    if writer.last:
                        break
                else:
                    raise BadGatewayError(answers.NOT_DONE)
                if single is not None:
                    await drained(response)
        if not self._facts.native:
            lasts = [writer.last for writer in writers]
            yield (usage_event(head, lasts, request.get("n") or 1) if _wants_usage(request) else b"") + DONE
        await drained(first)

    def _writer(self, head: dict[str, Any], index: int, request: dict[str, Any]) -> NativeWriter | ChoiceWriter:
        if self._facts.native:
            return NativeWriter(self._facts.name)
        tags = answers.has_think_tags(request)
        return ChoiceWriter(self._service, head, index, tags=tags, model=self._facts.name)


def _server_reads(audio: str) -> bool:
    """Whether a recording, in base64 or a data: URL, is WAV or MP3. Invalid base64 is reported when it is decoded."""
    try:
        start = base64_start(audio)
        head = base64.b64decode(audio[start : start + _BASE64_OF_18_BYTES])
    except (binascii.Error, ValueError):
        return False
    return container_of(head) in ("wav", "mp3")


def _wants_usage(request: dict[str, Any]) -> bool:
    options = request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))
