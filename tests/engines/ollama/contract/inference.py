"""chat, generate, embed, embeddings and transcriptions."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from . import words
from .faults import REFUSALS, SIGN_IN
from .names import ModelName
from .state import Refusal, State, duration, now
from .wire import STATE, Break, json_answer, json_body, refuse_by, stream_lines

if TYPE_CHECKING:
    from .library import Model

__all__ = ["chat", "embed", "embeddings", "generate", "locate", "transcribe"]

_INTEGERS = ("num_keep", "seed", "num_predict", "top_k", "repeat_last_n", "num_ctx", "num_batch", "num_gpu")
_FLOATS = ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty")
_NANOSECONDS_A_TOKEN = 10_000_000
_SLOW = 0.05
_BLIND = json.dumps(
    {
        "error": {
            "code": 500,
            "message": "image input is not supported - hint: if this is unexpected, you may need to provide the "
            "mmproj",
            "type": "server_error",
        }
    },
    separators=(",", ":"),
)
"""An error of its llama.cpp runner, which Ollama passes on as a text."""

_BEFORE = 2
"""How many tokens precede a fault."""


@dataclass
class _Work:
    """One answer to send."""

    model: str
    """The model's name in the request."""
    name: str
    """The model's name in the list."""
    fault: str
    text: list[str]
    thoughts: list[str]
    calls: list[dict[str, Any]]
    prompt_count: int
    reason: str = "stop"
    loaded: bool = False
    logprobs: int | None = None


def locate(state: State, name: Any, missing: Callable[[str], Refusal]) -> Model:
    """The model of a request. Raises Refusal."""
    parsed = ModelName.parse(name) if isinstance(name, str) else None
    if parsed is None:
        raise missing(str(name or ""))
    if parsed.cloud:
        if not state.cloud:
            raise Refusal(403, "ollama cloud is disabled: remote model is unavailable")
        raise Refusal(401, {"error": "unauthorized", "signin_url": SIGN_IN})
    model = state.library.find(parsed)
    if model is None:
        raise missing(str(name))
    return model


async def chat(request: web.Request) -> web.StreamResponse:
    """POST /api/chat."""
    state, shape = request.app[STATE], await json_body(request)
    messages = _messages(shape)
    if not 0 <= shape.get("top_logprobs", 0) <= 20:
        raise Refusal(400, "top_logprobs must be between 0 and 20")
    if not shape.get("model"):
        raise Refusal(400, "model is required")
    model = locate(state, shape["model"], lambda name: Refusal(404, f"model '{name}' not found"))
    if not messages and _unloads(shape):
        state.memory.unload(model.name)
        return json_answer(_chat_object(shape["model"], "", done_reason="unload"))
    tools = shape.get("tools") or []
    thinks = _thinks(model, shape)
    _require(model, shape["model"], "chat", ["tools"] * bool(tools))
    fault = state.rules.take("/api/chat", model.name)
    await refuse_by(fault, request)
    loaded = _load(state, model, shape)
    if not messages:
        return json_answer(_chat_object(shape["model"], "", done_reason="load"))
    images = sum(len(message.get("images") or []) for message in messages)
    if images and not {"vision", "audio"} & set(model.capabilities):
        raise Refusal(500, _BLIND)
    last = messages[-1]
    told = next((each for each in reversed(messages) if each.get("role") in ("user", "tool")), last)
    work = _work(shape, model, fault, str(told.get("content", "")), images=images, thinks=thinks)
    work.loaded = loaded
    work.prompt_count = sum(len(str(message.get("content", "")).split()) + 1 for message in messages)
    if tools and last.get("role") != "tool":
        work.calls, work.text = [words.tool_call(tools[0], str(last.get("content", "")))], []

    def part(content: str, **more: Any) -> dict[str, Any]:
        return _chat_object(work.model, content, **more)

    return await _answered(request, state, work, part, stream=shape.get("stream") is not False)


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /api/generate."""
    state, shape = request.app[STATE], await json_body(request)
    _check_images(shape.get("images"), "GenerateRequest.images")
    if not 0 <= shape.get("top_logprobs", 0) <= 20:
        raise Refusal(400, "top_logprobs must be between 0 and 20")
    model = locate(state, shape.get("model"), lambda name: Refusal(404, f"model '{name}' not found"))
    name, prompt = shape["model"], shape.get("prompt") or ""
    if not prompt and _unloads(shape):
        state.memory.unload(model.name)
        return json_answer(_generate_object(name, "", done_reason="unload"))
    if shape.get("raw") and (shape.get("template") or shape.get("system") or shape.get("context")):
        raise Refusal(400, "raw mode does not support template, system, or context")
    thinks = _thinks(model, shape)
    _require(model, name, "generate", ["insert"] * bool(shape.get("suffix")))
    fault = state.rules.take("/api/generate", model.name)
    await refuse_by(fault, request)
    loaded = _load(state, model, shape)
    if not prompt:
        return json_answer(_generate_object(name, "", done_reason="load"))
    if shape.get("suffix"):
        prompt = f"say {prompt.split()[-1]} joins {shape['suffix'].split()[0]}"
    work = _work(shape, model, fault, prompt, images=len(shape.get("images") or []), thinks=thinks)
    work.loaded, work.prompt_count = loaded, len(prompt.split()) + 1

    def part(content: str, **more: Any) -> dict[str, Any]:
        if more.get("done_reason") and not shape.get("raw"):
            more["context"] = list(range(1, work.prompt_count + len(work.text) + 1))
        return _generate_object(work.model, content, **more)

    return await _answered(request, state, work, part, stream=shape.get("stream") is not False)


async def embed(request: web.Request) -> web.StreamResponse:
    """POST /api/embed."""
    state, shape = request.app[STATE], await json_body(request)
    given = shape.get("input")
    if given is not None and not isinstance(given, str | list):
        raise Refusal(400, "invalid input type")
    texts = [given] if isinstance(given, str) and given else list(given or [])
    if not all(isinstance(text, str) for text in texts):
        raise Refusal(400, "invalid input type")

    def missing(name: str) -> Refusal:
        if ModelName.parse(name) is None:
            return Refusal(404, f"model '{name}' not found")
        return Refusal(404, f'model "{name}" not found, try pulling it first')

    model = locate(state, shape.get("model"), missing)
    fault = state.rules.take("/api/embed", model.name)
    await refuse_by(fault, request)
    loaded = _load(state, model, shape)
    if not texts:
        return json_answer({"model": shape["model"], "embeddings": []})
    counts = [len(text.split()) for text in texts]
    if shape.get("truncate") is False and max(counts) > model.context:
        raise Refusal(400, "the input length exceeds the context length")
    length = min(shape.get("dimensions") or model.embedding, model.embedding)
    answer: dict[str, Any] = {"model": shape["model"], "embeddings": [words.vector(text, length) for text in texts]}
    if fault != "zero":
        counted = sum(min(count, model.context) for count in counts)
        answer |= {"total_duration": 14_143_917, "load_duration": 9_000_000 if loaded else 1_019_500}
        answer |= {"prompt_eval_count": counted}
    return json_answer(answer)


async def embeddings(request: web.Request) -> web.StreamResponse:
    """POST /api/embeddings, the older API."""
    state, shape = request.app[STATE], await json_body(request)
    model = locate(
        state, shape.get("model"), lambda name: Refusal(404, f'model "{name}" not found, try pulling it first')
    )
    await refuse_by(state.rules.take("/api/embeddings", model.name), request)
    _load(state, model, shape)
    prompt = shape.get("prompt") or ""
    return json_answer({"embedding": words.vector(prompt, model.embedding) if prompt else []})


async def transcribe(request: web.Request) -> web.StreamResponse:
    """POST /v1/audio/transcriptions: answers with the size of the audio."""
    state = request.app[STATE]
    if not request.content_type.startswith("multipart/"):
        raise _openai(400, "failed to parse multipart form: request Content-Type isn't multipart/form-data")
    form = await request.post()
    fields = {key: value for key, value in form.items() if isinstance(value, str)}
    file = form.get("file")
    sound = file.file.read() if isinstance(file, web.FileField) else b""
    request["entry"]["body"] = fields | {"file": len(sound)}
    if not fields.get("model"):
        raise _openai(400, "model is required")
    if not isinstance(file, web.FileField):
        raise _openai(400, "file is required: http: no such file")
    if not sound:
        raise _openai(400, "audio file is empty")
    model = locate(state, fields["model"], lambda name: _openai(404, f"model '{name}' not found"))
    await refuse_by(state.rules.take("/v1/audio/transcriptions", model.name), request)
    if "audio" not in model.capabilities:
        raise _openai(500, _BLIND)
    _load(state, model, {})
    language = f" in {fields['language']}" if fields.get("language") else ""
    text = f"I heard {len(sound)} bytes{language}"
    if fields.get("response_format") == "text":
        return web.Response(body=text.encode(), headers={"Content-Type": "text/plain"})
    body = json.dumps({"text": text}, separators=(",", ":")).encode() + b"\n"
    return web.Response(body=body, headers={"Content-Type": "application/json"})


def _openai(status: int, message: str) -> Refusal:
    kind = {400: "invalid_request_error", 404: "not_found_error"}.get(status, "api_error")
    return Refusal(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})


def _messages(shape: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages. Raises Refusal where Go's decoder fails."""
    messages = shape.get("messages") or []
    for message in messages:
        if not isinstance(message.get("content", ""), str | None):
            kind = "array" if isinstance(message["content"], list) else "object"
            raise Refusal(
                400, f"json: cannot unmarshal {kind} into Go struct field ChatRequest.messages.content of type string"
            )
        for call in message.get("tool_calls") or []:
            if not isinstance(call.get("function", {}).get("arguments", {}), dict):
                raise Refusal(400, "Value looks like object, but can't find closing '}' symbol")
        _check_images(message.get("images"), "ChatRequest.messages.images")
    return list(messages)


def _check_images(images: Any, place: str) -> None:
    for image in images or []:
        if not isinstance(image, str):
            raise Refusal(400, f"json: cannot unmarshal object into Go struct field {place} of type api.ImageData")
        try:
            base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            bad = next((at for at, sign in enumerate(image) if not (sign.isalnum() or sign in "+/=")), len(image))
            raise Refusal(400, f"illegal base64 data at input byte {bad}") from None


def _unloads(shape: dict[str, Any]) -> bool:
    return shape.get("keep_alive") is not None and duration(shape["keep_alive"]) == 0


def _thinks(model: Model, shape: dict[str, Any]) -> bool:
    think = shape.get("think")
    if isinstance(think, str) and think not in ("low", "medium", "high", "max"):
        raise Refusal(400, f'invalid think value: "{think}" (must be "high", "medium", "low", "max", true, or false)')
    if "thinking" in model.capabilities:
        return think is None or bool(think)
    if think:
        raise Refusal(400, f'"{shape["model"]}" does not support thinking')
    return False


def _require(model: Model, name: str, verb: str, wanted: list[str]) -> None:
    if "completion" not in model.capabilities:
        raise Refusal(400, f'"{name}" does not support {verb}')
    lacking = [each for each in wanted if each not in model.capabilities]
    if lacking:
        parsed = ModelName.parse(model.name)
        raise Refusal(400, f"{parsed.full if parsed else name} does not support {lacking[0]}")


def _load(state: State, model: Model, shape: dict[str, Any]) -> bool:
    options = shape.get("options") or {}
    for key, value in options.items():
        if key in _INTEGERS and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise Refusal(400, f'option "{key}" must be of type integer')
        if key in _FLOATS and (isinstance(value, bool) or not isinstance(value, int | float | None)):
            raise Refusal(400, f'option "{key}" must be of type float32')
        if key == "stop" and not (isinstance(value, list) and all(isinstance(each, str) for each in value)):
            raise Refusal(400, f'option "{key}" must be of type array')
    return state.memory.load(model, shape.get("keep_alive"), options.get("num_ctx"))


def _work(shape: dict[str, Any], model: Model, fault: str, prompt: str, *, images: int, thinks: bool) -> _Work:
    options = shape.get("options") or {}
    text = words.answer(prompt, images=images, seed=options.get("seed"), shape=shape.get("format"))
    for stop in options.get("stop") or []:
        text = text.partition(stop)[0]
    work = _Work(
        shape["model"], model.name, fault, words.pieces(text), list(words.THOUGHTS) if thinks else [], [], 0,
        logprobs=shape.get("top_logprobs", 0) if shape.get("logprobs") else None,
    )  # fmt: skip
    limit = options.get("num_predict")
    if limit is not None and 0 <= limit < len(work.thoughts) + len(work.text):
        work.reason = "length"
        work.thoughts, work.text = work.thoughts[:limit], work.text[: max(0, limit - len(work.thoughts))]
    return work


def _chat_object(
    model: str, content: str, *, thinking: str = "", calls: list[dict[str, Any]] | None = None, **more: Any
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thinking:
        message["thinking"] = thinking
    if calls:
        message["tool_calls"] = calls
    done = "done_reason" in more
    return {"model": model, "created_at": now(), "message": message, "done": done, **more}


def _generate_object(
    model: str, content: str, *, thinking: str = "", calls: list[dict[str, Any]] | None = None, **more: Any
) -> dict[str, Any]:
    shape: dict[str, Any] = {"model": model, "created_at": now(), "response": content}
    if thinking:
        shape["thinking"] = thinking
    return {**shape, "done": "done_reason" in more, **more, **({"tool_calls": calls} if calls else {})}


_Part = Callable[..., dict[str, Any]]


async def _answered(
    request: web.Request, state: State, work: _Work, part: _Part, *, stream: bool
) -> web.StreamResponse:
    if state.busy >= state.queue_limit:
        raise Refusal(503, "server busy, please try again.  maximum pending requests exceeded")
    state.busy += 1
    try:
        lines = _lines(state, work, part)
        if stream:
            return await stream_lines(request, lines, work.fault)
        return json_answer(await _whole(lines))
    finally:
        state.busy -= 1


async def _whole(lines: AsyncIterator[Any]) -> dict[str, Any]:
    """The answer of an unstreamed request."""
    texts: dict[str, list[str]] = {"content": [], "thinking": [], "response": []}
    calls: list[Any] = []
    logprobs: list[Any] = []
    last: dict[str, Any] = {}
    async for line in lines:
        if not isinstance(line, dict):
            continue
        if "error" in line:
            raise Refusal(500, line["error"])
        last = line
        holder = line.get("message", line)
        for key, parts in texts.items():
            parts.append(str(holder.get(key, "")))
        calls += holder.get("tool_calls") or []
        logprobs += line.get("logprobs") or []
    holder = last.get("message", last)
    holder |= {key: "".join(parts) for key, parts in texts.items() if key in holder or "".join(parts)}
    if calls:
        holder["tool_calls"] = calls
    if logprobs:
        last["logprobs"] = logprobs
    return last


async def _lines(state: State, work: _Work, part: _Part) -> AsyncIterator[Any]:
    """Yield the lines of an answer, with its fault."""
    fault = work.fault
    end = _end(work)
    if fault == "empty":
        yield part("", **end)
        return
    if fault == "all-at-once":
        yield part("".join(work.text), thinking="".join(work.thoughts), calls=work.calls, **end)
        return
    tokens = [("thinking", token) for token in work.thoughts] + [("", token) for token in _told(work)]
    kept = tokens.pop() if fault == "last-words" and tokens else None
    for kind, token in tokens[:_BEFORE]:
        yield await _token(work, part, kind, token)
    for line in await _mishap(state, fault):
        yield line
    if fault in ("error", "no-done"):
        return
    for kind, token in tokens[_BEFORE:]:
        if state.memory.crashed(work.name):
            yield REFUSALS["crashed"][1]
            return
        yield await _token(work, part, kind, token)
    while fault == "endless":
        yield part(" more")
        await asyncio.sleep(0.002)
    calls = _calls(work)
    last = calls.pop() if fault == "tool-last" and calls else None
    for call in calls:
        yield part("", calls=call)
    yield part(kept[1] if kept else "", calls=last, **end)


def _calls(work: _Work) -> list[list[dict[str, Any]]]:
    """The tool calls, by the objects that have them."""
    if not work.calls:
        return []
    first = dict(work.calls[0])
    if work.fault == "tool-no-id":
        first.pop("id")
    return [[first], [first | {"id": "call_00000002"}]] if work.fault == "tool-twice" else [[first]]


async def _mishap(state: State, fault: str) -> list[Any]:
    """The fault in the middle of a stream. Raises Break."""
    match fault:
        case "error":
            return [{"error": "an error was encountered while running the model: unexpected EOF"}]
        case "cut":
            raise Break
        case "stall":
            await asyncio.Event().wait()
        case "gated":
            await state.gate.wait()
        case "garbage":
            return [b'{"model":"broken\n']
    return []


def _told(work: _Work) -> list[str]:
    """The words of the answer, with thinking in tags for faults that have it there."""
    match work.fault:
        case "tags":
            return ["<", "thi", "nk>", "Hm", ", yes", ".</th", "ink>", "\n\n", *work.text]
        case "tags-twice":
            return ["<think>one", "</think>", *work.text[:1], "<think>", "two</think", ">", *work.text[1:]]
        case "tags-closed":
            return ["Hm,", " yes.", "</think>", *work.text]
        case "tags-open":
            return ["<think>", "Hm,", " yes", *work.text]
    return work.text


async def _token(work: _Work, part: _Part, kind: str, token: str) -> dict[str, Any]:
    if work.fault == "slow":
        await asyncio.sleep(_SLOW)
    shape = part("", thinking=token) if kind else part(token)
    if work.logprobs is not None:
        one = {"token": token, "logprob": -0.25, "bytes": list(token.encode())}
        others = [{"token": f"{token}{index}", "logprob": -0.25 - index} for index in range(work.logprobs)]
        shape["logprobs"] = [one | ({"top_logprobs": others} if others else {})]
    return shape


def _end(work: _Work) -> dict[str, Any]:
    """The fields of the last object."""
    if work.fault == "zero":
        return {"done_reason": work.reason}
    count = len(work.thoughts) + len(work.text) + len(work.calls)
    computed, read = count * _NANOSECONDS_A_TOKEN, work.prompt_count * 1_000_000
    load = 40_000_000 * work.loaded + 900_000
    end = {
        "done_reason": work.reason,
        "total_duration": load + read + computed,
        "load_duration": load,
        "prompt_eval_count": work.prompt_count,
        "prompt_eval_duration": read,
        "eval_count": count,
        "eval_duration": computed,
    }
    return {key: value for key, value in end.items() if value}
