"""Handlers of /v3/chat/completions and /v3/completions: generated text in the format of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from engine_plugin.openai_api.completions import CompletionLogprobs
from openvino_server import chat as conversation
from openvino_server import fields
from openvino_server.errors import bad_request
from openvino_server.requests import REGISTRY, json_answer, read_object
from openvino_server.stream import DONE, EventStream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web

    from openvino_server.model import Model

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
        prompt, pictures = await _rendered(model, body, params.get("chat_template_kwargs"))
        given = {name: body[name] for name in ("tools", "tool_choice") if body.get(name) is not None}
        return {"op": "chat", "prompt": prompt, "pictures": pictures, "params": params, **given}

    return await _answer(request, body, call, _ChatShape)


async def _rendered(model: Model, body: dict[str, Any], extra: Any) -> tuple[str, list[str]]:
    """The prompt that the model's template makes of the messages, and their pictures. Raises RequestError."""
    if extra is not None and not isinstance(extra, dict):
        raise bad_request("chat_template_kwargs", "must be an object")
    messages, pictures = conversation.messages(body.get("messages"), model.sees)
    tools = conversation.tools(body.get("tools"), body.get("tool_choice"))
    return await model.render(messages, tools.offered, extra or {}), pictures


async def complete(request: web.Request) -> web.StreamResponse:
    """POST /v3/completions"""
    body = await read_object(request)
    if not isinstance(body.get("prompt"), (str, list)) or body["prompt"] == []:
        raise bad_request("prompt", "must be a string, a list of strings, or tokens")
    asked: dict[str, Any] = {"op": "complete", "prompt": body["prompt"], "params": _params(body)}
    if fields.flag(body, "echo"):
        asked["echo"] = True

    async def call(_model: Model) -> dict[str, Any]:
        return asked

    return await _answer(request, body, call, _TextShape)


def _params(body: dict[str, Any]) -> dict[str, Any]:
    fields.whole(body, "n", 1)
    params = {name: value for name, value in body.items() if name not in _NOT_PARAMETERS and value is not None}
    most = params.pop("max_completion_tokens", None)
    if most is not None:
        params["max_tokens"] = most
    return params


async def _answer(
    request: web.Request,
    body: dict[str, Any],
    make_call: Callable[[Model], Awaitable[dict[str, Any]]],
    make_shape: type[_Shape],
) -> web.StreamResponse:
    model = request.app[REGISTRY].find(body.get("model"), "chat")
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise bad_request("stream_options", "must be an object")
    with_usage = fields.flag(stream_options, "include_usage")
    shape = make_shape(body["model"], with_usage)
    streamed = fields.flag(body, "stream")
    async with model.use() as worker:
        call = await make_call(model)
        if streamed:
            return await _TokenStream(request, shape).run(worker, call)
        whole_answer = _Collected()
        result = await worker.ask(call, whole_answer.take)
    return json_answer(shape.whole(whole_answer.choices, result.get("usage")))


class _Shape(ABC):
    """The JSON around the text of an answer. The constant parts are encoded once, because each token needs them."""

    kind = ""
    chunk_kind = ""
    prefix = ""

    def __init__(self, model: str, with_usage: bool) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._with_usage = with_usage
        top = f'"id":"{self._id}","object":"{self.chunk_kind}","created":{self._created},"model":{_string(model)}'
        self.open = f'data: {{{top},"choices":[{{"index":'
        self.shut = '}],"usage":null}\n\n' if with_usage else "}]}\n\n"
        self._usage_head = f'data: {{{top},"choices":[],"usage":'

    @abstractmethod
    def head(self, index: int) -> str:
        """The text event of choice `index`, up to the JSON string."""

    @abstractmethod
    def tail(self, logprobs: str) -> str:
        """The rest of the text event; `logprobs` is JSON."""

    @abstractmethod
    def first(self, index: int) -> str:
        """The event that opens a choice; "" if the format has no such event."""

    @abstractmethod
    def special(self, index: int, delta: dict[str, Any]) -> str:
        """The event of a delta that is not text; "" if the format has no such event."""

    @abstractmethod
    def finish(self, index: int, reason: str) -> str:
        """The event that closes a choice."""

    @abstractmethod
    def logprobs(self, entries: list[dict[str, Any]] | None, index: int) -> Any:
        """The value of `logprobs` in the answer, from one entry for each token."""

    @abstractmethod
    def choice(self, index: int, collected: _Choice) -> dict[str, Any]:
        """One choice of an answer that is not streamed."""

    def usage(self, usage: Any) -> str:
        """The usage event; "" unless the request has include_usage."""
        return f"{self._usage_head}{_dumps(usage)}}}\n\n" if self._with_usage else ""

    def whole(self, choices: dict[int, _Choice], usage: Any) -> dict[str, Any]:
        """The answer that is not streamed."""
        return {
            "id": self._id,
            "object": self.kind,
            "created": self._created,
            "model": self._model,
            "choices": [self.choice(index, choices[index]) for index in sorted(choices)],
            "usage": usage,
        }


class _ChatShape(_Shape):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def head(self, index: int) -> str:
        return f'{self.open}{index},"delta":{{"content":'

    def tail(self, logprobs: str) -> str:
        return f'}},"logprobs":{logprobs},"finish_reason":null{self.shut}'

    def first(self, index: int) -> str:
        delta = '{"role":"assistant","content":""}'
        return f'{self.open}{index},"delta":{delta},"logprobs":null,"finish_reason":null{self.shut}'

    def special(self, index: int, delta: dict[str, Any]) -> str:
        return f'{self.open}{index},"delta":{_dumps(delta)},"logprobs":null,"finish_reason":null{self.shut}'

    def finish(self, index: int, reason: str) -> str:
        return f'{self.open}{index},"delta":{{}},"logprobs":null,"finish_reason":{_string(reason)}{self.shut}'

    def logprobs(self, entries: list[dict[str, Any]] | None, index: int) -> Any:  # noqa: ARG002
        return {"content": entries} if entries is not None else None

    def choice(self, index: int, collected: _Choice) -> dict[str, Any]:
        text = "".join(collected.texts)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if collected.reasoning:
            message["reasoning_content"] = "".join(collected.reasoning)
        if collected.tools:
            message["content"] = text or None
            message["tool_calls"] = [collected.tools[number] for number in sorted(collected.tools)]
        return {
            "index": index,
            "message": message,
            "logprobs": self.logprobs(collected.logprobs, index),
            "finish_reason": collected.finish,
        }


class _TextShape(_Shape):
    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, with_usage: bool) -> None:
        super().__init__(model, with_usage)
        self._completion = CompletionLogprobs()

    def head(self, index: int) -> str:
        return f'{self.open}{index},"text":'

    def tail(self, logprobs: str) -> str:
        return f',"logprobs":{logprobs},"finish_reason":null{self.shut}'

    def first(self, index: int) -> str:  # noqa: ARG002  # completions have no such event
        return ""

    def special(self, index: int, delta: dict[str, Any]) -> str:  # noqa: ARG002  # neither tools nor reasoning here
        return ""

    def finish(self, index: int, reason: str) -> str:
        return f'{self.open}{index},"text":"","logprobs":null,"finish_reason":{_string(reason)}{self.shut}'

    def logprobs(self, entries: list[dict[str, Any]] | None, index: int) -> Any:
        return None if entries is None else self._completion.of(entries, index)

    def choice(self, index: int, collected: _Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": "".join(collected.texts),
            "logprobs": self.logprobs(collected.logprobs, index),
            "finish_reason": collected.finish,
        }


class _TokenStream(EventStream):
    """The answer as server-sent events."""

    def __init__(self, request: web.Request, shape: _Shape) -> None:
        super().__init__(request)
        self._shape = shape
        self._heads: dict[int, str] = {}
        self._tail = shape.tail("null")

    def render(self, events: list[Any]) -> bytes:
        shape, heads, tail = self._shape, self._heads, self._tail
        out: list[str] = []
        for index, delta, _, logprobs, finish in events:
            head = heads.get(index)
            if head is None:
                head = heads[index] = shape.head(index)
                out.append(shape.first(index))
            if isinstance(delta, str):
                if logprobs is not None:
                    out += (head, _string(delta), shape.tail(_dumps(shape.logprobs(logprobs, index))))
                elif delta:
                    out += (head, _string(delta), tail)
            elif delta:
                out.append(shape.special(index, delta))
            if finish is not None:
                out.append(shape.finish(index, finish))
        return "".join(out).encode("utf-8", "replace")

    def closing(self, result: dict[str, Any]) -> bytes:
        return self._shape.usage(result.get("usage")).encode() + DONE


class _Choice:
    """One choice of an answer that is not streamed, collected from its events."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.reasoning: list[str] = []
        self.tools: dict[int, dict[str, Any]] = {}
        self.logprobs: list[dict[str, Any]] | None = None
        self.finish: str | None = None

    def add(self, delta: str | dict[str, Any], logprobs: list[dict[str, Any]] | None, finish: str | None) -> None:
        """Add one event."""
        if isinstance(delta, str):
            self.texts.append(delta)
        elif delta:
            self._add_special(delta)
        if logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *logprobs]
        self.finish = finish or self.finish

    def _add_special(self, delta: dict[str, Any]) -> None:
        self.texts.append(delta.get("content") or "")
        self.reasoning.append(delta.get("reasoning_content") or "")
        for piece in delta.get("tool_calls") or ():
            known = self.tools.setdefault(
                piece.get("index", 0), {"id": "", "type": "function", "function": {"name": "", "arguments": ""}}
            )
            known["id"] = piece.get("id") or known["id"]
            function = piece.get("function") or {}
            known["function"]["name"] += function.get("name") or ""
            known["function"]["arguments"] += function.get("arguments") or ""


class _Collected:
    """The choices of an answer that is not streamed."""

    def __init__(self) -> None:
        self.choices: dict[int, _Choice] = {}

    def take(self, payload: list[Any]) -> None:
        """Add the events of one `part` frame."""
        for index, delta, _, logprobs, finish in payload:
            choice = self.choices.get(index)
            if choice is None:
                choice = self.choices[index] = _Choice()
            choice.add(delta, logprobs, finish)
