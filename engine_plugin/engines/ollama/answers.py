"""Ollama's answers, collected from the lines of its streams, and OpenAI's answers made of them.

chat has its texts in `message`, generate in `response`; the other fields are the same.
"""

from __future__ import annotations

import base64
import json
import os
import re
import reprlib
import struct
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.errors import checked_line
from engine_plugin.engines.ollama.thinking import split_thinking
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.jsontext import json_object
from engine_plugin.openai_api.completions import CompletionLogprobs
from engine_plugin.transport.answers import ANSWER_LIMIT, drained, one_line
from engine_plugin.transport.ndjson import line_objects, whole_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.transport.http1 import HttpResponse

__all__ = [
    "NOT_DONE",
    "Delta",
    "answer_head",
    "collect",
    "delta_of",
    "finish_reason",
    "has_think_tags",
    "native_embeddings",
    "openai_answer",
    "openai_call",
    "openai_embeddings",
    "openai_logprobs",
    "timings",
    "to_json",
    "usage",
    "whole_answer",
]

NOT_DONE = "the Ollama server's stream ended before it was done"

_TEXT_FIELDS = {"chat": "content", "generate": "response"}
_OBJECTS = {"chat": ("chatcmpl", "chat.completion"), "generate": ("cmpl", "text_completion")}
_VECTORS = re.compile(rb'"embeddings"\s*:\s*\[(?=\s*\[)')
_NUMBER = rb"-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+"
_NUMBERS = re.compile(rb"\s*(?:" + _NUMBER + rb"\s*(?:,\s*" + _NUMBER + rb"\s*)*+)?")
_VECTOR = re.compile(rb"\s*\[([^\[\]]*)\]\s*([,\]])")
_METRICS = (
    "total_duration",
    "load_duration",
    "prompt_eval_count",
    "prompt_eval_duration",
    "eval_count",
    "eval_duration",
)
_METRIC_LIMIT = 1 << 63
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)


# Lines


@dataclass(slots=True)
class Delta:
    """What one line adds to an answer. `done` marks the last line."""

    content: str
    thinking: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    done: bool = False


async def collect(service: str, response: HttpResponse, model: str) -> dict[str, Any]:
    """Read a stream into one answer. Called for unary calls: only a stream stops when its caller leaves.

    Raises the exception of an error line; BadGatewayError for a stream that ends early or exceeds 512 MiB.
    """
    deltas: list[Delta] = []
    size = 0
    async with aclosing(whole_lines(response)) as blocks:
        async for lines in blocks:
            size += len(lines)
            if size > ANSWER_LIMIT:
                raise BadGatewayError(f"the engine's answer is longer than {ANSWER_LIMIT} bytes")
            for line in line_objects(lines):
                delta = delta_of(service, checked_line(line, model))
                if delta.content or delta.thinking or delta.calls or delta.logprobs:
                    deltas.append(delta)
                if delta.done:
                    await drained(response)
                    return whole_answer(service, line, deltas)
    raise BadGatewayError(NOT_DONE)


def whole_answer(service: str, last: Mapping[str, Any], deltas: Sequence[Delta]) -> dict[str, Any]:
    """The answer that the server would give without streaming: the last line with what all lines add."""
    answer = dict(last)
    source = answer
    if service == "chat":
        source = answer["message"] = {"role": "assistant"} | (answer.get("message") or {})
    source[_TEXT_FIELDS[service]] = "".join(delta.content for delta in deltas)
    if thinking := "".join(delta.thinking for delta in deltas):
        source["thinking"] = thinking
    if calls := [call for delta in deltas for call in delta.calls]:
        source["tool_calls"] = calls
    if logprobs := [token for delta in deltas for token in delta.logprobs]:
        answer["logprobs"] = logprobs
    return answer


def delta_of(service: str, line: Mapping[str, Any]) -> Delta:
    """Parse one line. Raises BadGatewayError for a line that does not have Ollama's form."""
    source = line.get("message") if service == "chat" else line
    if source is None:
        source = {}
    if not isinstance(source, dict):
        raise _malformed(line)
    content = source.get(_TEXT_FIELDS[service]) or ""
    thinking = source.get("thinking") or ""
    calls, logprobs = source.get("tool_calls") or [], line.get("logprobs") or []
    if not (isinstance(content, str) and isinstance(thinking, str)):
        raise _malformed(line)
    for objects in (calls, logprobs):
        if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
            raise _malformed(line)
    return Delta(content, thinking, calls, logprobs, line.get("done") is True)


def _malformed(shape: Mapping[str, Any], what: str = "line") -> BadGatewayError:
    return BadGatewayError(f"the engine's {what} is not understood: {one_line(reprlib.repr(shape))}")


def to_json(shape: Any, encoder: json.JSONEncoder = _ENCODER) -> bytes:
    """Encode values of a server's answer. Raises BadGatewayError for values that JSON cannot hold, such as NaN."""
    try:
        text = encoder.encode(shape)
    except (ValueError, RecursionError) as error:
        raise BadGatewayError(f"the engine's answer cannot be encoded as JSON: {error}") from None
    return text.encode("utf-8", "replace")


def finish_reason(last: Mapping[str, Any], *, called: bool) -> str:
    """OpenAI's finish_reason from an answer's last line; `called` says that the answer has tool calls."""
    if last.get("done_reason") == "length":
        return "length"
    return "tool_calls" if called else "stop"


def openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call in OpenAI's form: its arguments as JSON text, with a generated id where the server gives none.

    Raises BadGatewayError for a malformed call.
    """
    function = call.get("function")
    name = function.get("name") or "" if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str):
        raise _malformed(call, "tool call")
    arguments, given = function.get("arguments"), call.get("id")
    if not isinstance(arguments, str):
        arguments = to_json({} if arguments is None else arguments).decode()
    return {
        "id": given if isinstance(given, str) and given else f"call_{os.urandom(12).hex()}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def openai_logprobs(logprobs: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """OpenAI's `logprobs`, in which every token has all fields; None without tokens."""
    if not logprobs:
        return None
    return {"content": [{"bytes": None, "top_logprobs": []} | token for token in logprobs]}


# OpenAI's answers


def answer_head(service: str, model: str, *, stream: bool) -> dict[str, Any]:
    """The first fields of an answer, or of each event of a stream: id, object, created and model."""
    prefix, kind = _OBJECTS[service]
    if stream and service == "chat":
        kind = "chat.completion.chunk"
    return {"id": f"{prefix}-{os.urandom(16).hex()}", "object": kind, "created": int(time.time()), "model": model}


def has_think_tags(request: dict[str, Any]) -> bool:
    """Whether `<think>` in the answer is a tag: not if the caller requests JSON or the model's raw text."""
    return not (request.get("raw") or request.get("format") or request.get("response_format"))


def openai_answer(service: str, wholes: Sequence[Mapping[str, Any]], request: dict[str, Any]) -> bytes:
    """OpenAI's answer with one choice for each whole answer of the server; `request` is the caller's."""
    answer = answer_head(service, request["model"], stream=False)
    answer["choices"] = [_choice(service, index, whole, request) for index, whole in enumerate(wholes)]
    answer["usage"] = usage(wholes, request.get("n") or 1)
    totals = {field: sum(_metric(whole, field) for whole in wholes) for field in _METRICS}
    if speed := timings(totals):
        answer["timings"] = speed
    return to_json(answer)


def _choice(service: str, index: int, whole: Mapping[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    delta = delta_of(service, whole)
    thinking, content = delta.thinking, delta.content
    if not thinking and has_think_tags(request):
        thinking, content = split_thinking(content)
    choice: dict[str, Any] = {"index": index}
    if service == "chat":
        source = choice["message"] = {"role": "assistant", "content": content}
        if delta.calls:
            source["tool_calls"] = [openai_call(call) for call in delta.calls]
    else:
        source = choice
        choice["text"] = content
    if thinking:
        source["reasoning_content"] = thinking
    choice["logprobs"] = openai_logprobs(delta.logprobs)
    if service == "generate":
        CompletionLogprobs(request.get("logprobs")).reshape({"choices": [choice]})
    choice["finish_reason"] = finish_reason(whole, called=bool(delta.calls))
    return choice


# Metrics


def usage(lasts: Sequence[Mapping[str, Any]], choices_each: int = 1) -> dict[str, int]:
    """OpenAI's token counts, from the last line of each choice; a prompt counts once for its `choices_each` choices.

    Raises BadGatewayError for counts that are not numbers.
    """
    prompt = sum(_metric(last, "prompt_eval_count") for last in lasts[::choices_each])
    completion = sum(_metric(last, "eval_count") for last in lasts)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def timings(last: Mapping[str, Any]) -> dict[str, float]:
    """Counts, milliseconds and tokens per second from a last line, with llama.cpp's names; {} without metrics.

    A count without a duration has the speed 0. Raises BadGatewayError for values that are not numbers.
    """
    if not any(last.get(field) for field in _METRICS):
        return {}
    prompt, predicted = _metric(last, "prompt_eval_count"), _metric(last, "eval_count")
    prompt_ns, predicted_ns = _metric(last, "prompt_eval_duration"), _metric(last, "eval_duration")
    return {
        "prompt_n": prompt,
        "prompt_ms": _milliseconds(prompt_ns),
        "prompt_per_second": _per_second(prompt, prompt_ns),
        "predicted_n": predicted,
        "predicted_ms": _milliseconds(predicted_ns),
        "predicted_per_second": _per_second(predicted, predicted_ns),
        "load_ms": _milliseconds(_metric(last, "load_duration")),
        "total_ms": _milliseconds(_metric(last, "total_duration")),
    }


def _metric(last: Mapping[str, Any], field: str) -> int:
    """A count or a duration in nanoseconds. A negative one, as after a clock was set back, is 0."""
    value = last.get(field) or 0
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _METRIC_LIMIT:
        raise BadGatewayError(f"the engine's {field} is not a valid number")
    return max(0, int(value))


def _milliseconds(nanoseconds: int) -> float:
    return round(nanoseconds / 1e6, 3)


def _per_second(tokens: int, nanoseconds: int) -> float:
    return round(tokens * 1e9 / nanoseconds, 3) if nanoseconds > 0 else 0.0


# Embeddings


def openai_embeddings(answer: bytes, request: dict[str, Any]) -> bytes:
    """OpenAI's list of embeddings. The numbers, most of the answer, stay the text that the server wrote.

    Raises InvalidRequestError if the vectors do not have the requested `dimensions`, BadGatewayError for a malformed
    answer.
    """
    vectors, rest = _vectors(answer)
    _check_count(vectors, request)
    wanted = request.get("dimensions")
    if wanted is not None and vectors and (given := vectors[0].count(b",") + 1) != wanted:
        raise InvalidRequestError.at(
            "dimensions",
            f"expected {wanted}, but this model gives {given} and this Ollama does not shorten them; leave it out",
        )
    shown = _base64 if request.get("encoding_format") == "base64" else _listed
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, shown(vector))
        for index, vector in enumerate(vectors)
    )
    tokens = usage([rest])["prompt_tokens"]
    tail = {"model": request["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return b'{"object":"list","data":[' + data + b"]," + to_json(tail)[1:]


def native_embeddings(answer: bytes, request: dict[str, Any]) -> bytes:
    """The server's answer unchanged. Raises BadGatewayError for a malformed one."""
    vectors, _rest = _vectors(answer)
    if vectors and request["input"]:
        _check_count(vectors, request)
    return answer


def _check_count(vectors: list[bytes], request: dict[str, Any]) -> None:
    texts = request["input"]
    if len(vectors) != (count := len(texts) if isinstance(texts, list) else 1):
        raise BadGatewayError(f"the engine gave {len(vectors)} embeddings for {count} texts")


def _vectors(answer: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The text of each vector's numbers, and the other fields of the answer. Raises BadGatewayError."""
    vectors: list[bytes] = []
    found = _VECTORS.search(answer)
    other, position = answer, 0
    if found is not None:
        position, more = found.end(), True
        while more:
            vector = _VECTOR.match(answer, position)
            if vector is None or not _NUMBERS.fullmatch(vector[1]):
                raise _bad_embeddings(answer)
            vectors.append(vector[1])
            position, more = vector.end(), vector[2] == b","
        other = answer[: found.start()] + b'"embeddings":[]' + answer[position:]
    rest = json_object(other)
    if rest is None or rest.get("embeddings") != []:
        raise _bad_embeddings(answer)
    return vectors, rest


def _bad_embeddings(answer: bytes) -> BadGatewayError:
    return BadGatewayError(f"the engine's embeddings are not understood: {answer[:200]!r}")


def _listed(vector: bytes) -> bytes:
    return b"[" + vector + b"]"


def _base64(vector: bytes) -> bytes:
    """Little-endian 32-bit floats in base64, as a JSON text."""
    try:
        numbers = json.loads(_listed(vector))
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
    except (ValueError, OverflowError, struct.error):
        raise _bad_embeddings(vector) from None
    return b'"' + base64.b64encode(packed) + b'"'
