"""Handlers of /v3/chat/completions and /v3/completions: generated text in the format of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.openai_api.assemble import chat_completion, text_completion
from engine_plugin.openai_api.completions import CompletionLogprobs
from engine_plugin.services import VALIDATORS
from engine_plugin.services.base import integer, optional
from engine_plugin.transport.sse import DONE
from openvino_server import chat as conversation
from openvino_server.pipelines.sampling import MOST_CHOICES
from openvino_server.requests import REGISTRY, json_answer, read_object
from openvino_server.stream import EventStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from aiohttp import web

    from openvino_server.model import Model
    from openvino_server.pipelines.streams import Part

__all__ = ["chat", "complete"]

_NOT_PARAMETERS = {"model", "messages", "prompt", "tools", "tool_choice", "stream", "stream_options", "echo"}
"""Fields that are not passed to the worker as parameters of generation."""

_string = json.JSONEncoder(ensure_ascii=False).encode  # a single call of C code for a str


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /v3/chat/completions"""
    body = await read_object(request)
    params = _params(body)

    async def call(model: Model) -> dict[str, Any]:
        VALIDATORS["chat"].check(body)
        messages, pictures = conversation.messages(body["messages"], model.sees)
        tools = conversation.tools(body.get("tools"), body.get("tool_choice"))
        prompt = await model.render(messages, tools.offered, optional(params, "chat_template_kwargs", dict) or {})
        call = {"op": "chat", "prompt": prompt, "pictures": pictures, "params": params}
        return call | {"tools": tools.offered, "forced": tools.forced}

    return await _answer(request, body, call, _ChatAnswer)


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /v3/completions"""
    body = await read_object(request)
    VALIDATORS["generate"].check(body)
    echo = optional(body, "echo", bool)
    params = _params(body)

    async def call(_model: Model) -> dict[str, Any]:
        return {"op": "complete", "prompt": body["prompt"], "params": params, "echo": echo}

    return await _answer(request, body, call, _TextAnswer)


def _params(body: dict[str, Any]) -> dict[str, Any]:
    integer(body, "n", 1, MOST_CHOICES)
    params = {name: value for name, value in body.items() if name not in _NOT_PARAMETERS and value is not None}
    most = params.pop("max_completion_tokens", None)
    if most is not None:
        params["max_tokens"] = most
    return params


async def _answer(
    request: web.Request,
    body: dict[str, Any],
    make_call: Callable[[Model], Awaitable[dict[str, Any]]],
    make_answer: type[_Answer],
) -> web.StreamResponse:
    model = request.app[REGISTRY].find(body.get("model"), "chat")
    stream_options = optional(body, "stream_options", dict) or {}
    answer = make_answer(body["model"], optional(stream_options, "include_usage", bool) or False)
    streamed = optional(body, "stream", bool)
    async with model.use() as worker:
        call = await make_call(model)
        if streamed:
            return await EventStream(request, answer.events, answer.closing).run(worker, call)
        parts: list[Part] = []
        result = await worker.ask(call, parts.extend)
    return json_answer(answer.whole(parts, result.get("usage")))


class _Answer(ABC):
    """One answer, as events or whole. The constant JSON of events is made once, because each token needs it."""

    prefix: ClassVar[str]
    """The beginning of its id."""
    chunk: ClassVar[str]
    """The `object` of its events."""
    around: ClassVar[tuple[str, str]]
    """What is before and after a text, a JSON string, in a choice of an event."""
    first: ClassVar[str]
    """The member of a choice's first event; "" if there is no such event."""
    last: ClassVar[str]
    """The member of a choice's last event."""

    def __init__(self, model: str, with_usage: bool) -> None:
        self._top = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._with_usage = with_usage
        top = _dumps({"object": self.chunk, **self._top})[:-1]
        self._open = f'data: {top},"choices":[{{"index":'
        self._shut = '}],"usage":null}\n\n' if with_usage else "}]}\n\n"
        self._usage = f'data: {top},"choices":[],"usage":'
        self._heads: dict[int, str] = {}
        self._tail = self._end_of_text("null")

    @abstractmethod
    def logprobs(self, entries: list[dict[str, Any]], index: int) -> dict[str, Any]:
        """The value of `logprobs` in choice `index`, from an entry for each of its next tokens."""

    @abstractmethod
    def assembled(self, events: Iterable[dict[str, Any]]) -> dict[str, Any]:
        """The answer that events add up to; each choice has its text as `text` and in `delta`."""

    def events(self, parts: Sequence[Part]) -> bytes:
        """The server-sent events of these parts."""
        heads, tail = self._heads, self._tail
        out: list[str] = []
        for index, delta, _, logprobs, finish in parts:
            head = heads.get(index)
            if head is None:
                head = heads[index] = f"{self._open}{index},{self.around[0]}"
                if self.first:
                    out.append(self._event(index, self.first))
            if isinstance(delta, str):
                if logprobs is not None:
                    out += (head, _string(delta), self._end_of_text(_dumps(self.logprobs(logprobs, index))))
                elif delta:
                    out += (head, _string(delta), tail)
            elif delta:
                out.append(self._event(index, f'"delta":{_dumps(delta)}'))
            if finish is not None:
                out.append(self._event(index, self.last, _string(finish)))
        return "".join(out).encode("utf-8", "replace")

    def _end_of_text(self, logprobs: str) -> str:
        return f'{self.around[1]},"logprobs":{logprobs},"finish_reason":null{self._shut}'

    def _event(self, index: int, member: str, finish: str = "null") -> str:
        return f'{self._open}{index},{member},"logprobs":null,"finish_reason":{finish}{self._shut}'

    def closing(self, result: dict[str, Any]) -> bytes:
        """The last events: one with the usage if the request has include_usage, and [DONE]."""
        usage = f"{self._usage}{_dumps(result.get('usage'))}}}\n\n" if self._with_usage else ""
        return usage.encode() + DONE

    def whole(self, parts: Sequence[Part], usage: Any) -> dict[str, Any]:
        """The answer that is not streamed."""
        texts: dict[int, list[str]] = defaultdict(list)
        choices: list[dict[str, Any]] = []
        for index, delta, _, logprobs, finish in parts:
            choice: dict[str, Any] = {"index": index, "finish_reason": finish}
            if isinstance(delta, str):
                texts[index].append(delta)
            else:
                choice["delta"] = delta
            if logprobs is not None:
                choice["logprobs"] = self.logprobs(logprobs, index)
            choices.append(choice)
        for index, pieces in texts.items():
            text = "".join(pieces)
            choices.append({"index": index, "text": text, "delta": {"content": text}})
        return self._top | self.assembled([{"choices": choices}]) | {"usage": usage}


class _ChatAnswer(_Answer):
    prefix, chunk = "chatcmpl", "chat.completion.chunk"
    around = ('"delta":{"content":', "}")
    first, last = '"delta":{"role":"assistant","content":""}', '"delta":{}'

    def logprobs(self, entries: list[dict[str, Any]], index: int) -> dict[str, Any]:  # noqa: ARG002
        return {"content": entries}

    def assembled(self, events: Iterable[dict[str, Any]]) -> dict[str, Any]:
        answer = chat_completion(events)
        for choice in answer["choices"]:
            choice.setdefault("logprobs", None)
            if "tool_calls" in (message := choice["message"]):
                message["content"] = message["content"] or None
        return answer


class _TextAnswer(_Answer):
    prefix, chunk = "cmpl", "text_completion"
    around = ('"text":', "")
    first, last = "", '"text":""'

    def __init__(self, model: str, with_usage: bool) -> None:
        super().__init__(model, with_usage)
        self._completion = CompletionLogprobs()

    def logprobs(self, entries: list[dict[str, Any]], index: int) -> dict[str, Any]:
        return self._completion.of(entries, index)

    def assembled(self, events: Iterable[dict[str, Any]]) -> dict[str, Any]:
        return text_completion(events)
