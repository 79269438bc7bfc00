"""OpenAI's JSON from Ollama's whole answers: chat completions, text completions, embeddings, usage and timings."""

from __future__ import annotations

import base64
import json
import re
import secrets
import struct
import time
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama.lines import delta_of, finish_reason, openai_call, openai_logprobs, to_json
from engine_plugin.engines.ollama.thinking import split_thinking
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.jsontext import json_object
from engine_plugin.openai_api.completions import CompletionLogprobs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "answer_head",
    "has_think_tags",
    "native_embeddings",
    "openai_answer",
    "openai_embeddings",
    "timings",
    "usage",
]

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


def answer_head(service: str, model: str, *, stream: bool) -> dict[str, Any]:
    """The first fields of an answer, or of each event of a stream: id, object, created and model."""
    prefix, kind = _OBJECTS[service]
    if stream and service == "chat":
        kind = "chat.completion.chunk"
    return {"id": f"{prefix}-{secrets.token_hex(16)}", "object": kind, "created": int(time.time()), "model": model}


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
                raise _malformed(answer)
            vectors.append(vector[1])
            position, more = vector.end(), vector[2] == b","
        other = answer[: found.start()] + b'"embeddings":[]' + answer[position:]
    rest = json_object(other)
    if rest is None or rest.get("embeddings") != []:
        raise _malformed(answer)
    return vectors, rest


def _malformed(answer: bytes) -> BadGatewayError:
    return BadGatewayError(f"the engine's embeddings are not understood: {answer[:200]!r}")


def _listed(vector: bytes) -> bytes:
    return b"[" + vector + b"]"


def _base64(vector: bytes) -> bytes:
    """Little-endian 32-bit floats in base64, as a JSON text."""
    try:
        numbers = json.loads(_listed(vector))
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
    except (ValueError, OverflowError, struct.error):
        raise _malformed(vector) from None
    return b'"' + base64.b64encode(packed) + b'"'
