"""From Ollama's whole answers to OpenAI's JSON: chat completions, text completions, embeddings."""

from __future__ import annotations

import base64
import json
import re
import secrets
import struct
import time
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.ollama import metrics
from engine_plugin.engines.ollama.lines import finish_reason, json_of, openai_call, openai_logprobs
from engine_plugin.engines.ollama.thinking import divided
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.openai_api.completions import CompletionLogprobs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engine_plugin.engines.ollama.gather import Whole

__all__ = ["answer_head", "embeddings_answer", "native_embeddings", "openai_answer", "parses_tags"]

_OBJECTS = {"chat": ("chatcmpl", "chat.completion"), "generate": ("cmpl", "text_completion")}
_VECTORS = re.compile(rb'"embeddings"\s*:\s*\[(?=\s*\[)')
_NUMBER = rb"-?(?:0|[1-9]\d*+)(?:\.\d++)?+(?:[eE][+-]?\d++)?+"
_NUMBERS = re.compile(rb"\s*(?:" + _NUMBER + rb"\s*(?:,\s*" + _NUMBER + rb"\s*)*+)?")
_VECTOR = re.compile(rb"\s*\[([^\[\]]*)\]\s*([,\]])")


def answer_head(service: str, model: str, *, stream: bool) -> dict[str, Any]:
    """The fields with which an answer, or each event of a stream, begins."""
    prefix, kind = _OBJECTS[service]
    if stream and service == "chat":
        kind = "chat.completion.chunk"
    return {"id": f"{prefix}-{secrets.token_hex(16)}", "object": kind, "created": int(time.time()), "model": model}


def parses_tags(request: dict[str, Any]) -> bool:
    """Whether `<think>` in the answer is a tag: not where the caller wants the model's own words, or JSON."""
    return not (request.get("raw") or request.get("format") or request.get("response_format"))


def openai_answer(service: str, wholes: Sequence[Whole], request: dict[str, Any]) -> bytes:
    """One choice for each; `request` is the caller's."""
    answer = answer_head(service, request["model"], stream=False)
    answer["choices"] = [_choice(service, index, whole, request) for index, whole in enumerate(wholes)]
    lasts = [whole.last for whole in wholes]
    answer["usage"] = metrics.usage(lasts, request.get("n") or 1)
    if timings := metrics.timings(metrics.added(lasts)):
        answer["timings"] = timings
    return json_of(answer)


def _choice(service: str, index: int, whole: Whole, request: dict[str, Any]) -> dict[str, Any]:
    thought, said = "".join(whole.thought), "".join(whole.said)
    if not thought and parses_tags(request):
        thought, said = divided(said)
    choice: dict[str, Any] = {"index": index}
    if service == "chat":
        source = choice["message"] = {"role": "assistant", "content": said}
        if whole.calls:
            source["tool_calls"] = [_whole_call(call) for call in whole.calls]
    else:
        source = choice
        choice["text"] = said
    if thought:
        source["reasoning_content"] = thought
    choice["logprobs"] = openai_logprobs(whole.logprobs)
    if service == "generate":
        CompletionLogprobs(request.get("logprobs")).reshape({"choices": [choice]})
    choice["finish_reason"] = finish_reason(whole.last, called=bool(whole.calls))
    return choice


def _whole_call(call: dict[str, Any]) -> dict[str, Any]:
    told = openai_call(call, 0)
    del told["index"]  # of streams only
    return told


# Embeddings


def embeddings_answer(answer: bytes, request: dict[str, Any]) -> bytes:
    """OpenAI's list of embeddings. The numbers, which are most of it, stay the text that the server wrote.

    Raises InvalidRequestError when the model has not as many `dimensions` as were asked for.
    """
    vectors, rest = _vectors(answer)
    if len(vectors) != (count := _count_of(request["input"])):
        raise BadGatewayError(f"the engine gave {len(vectors)} embeddings for {count} texts")
    wanted = request.get("dimensions")
    if wanted is not None and vectors and (given := vectors[0].count(b",") + 1) != wanted:
        raise InvalidRequestError.at(
            "dimensions", f"this model gives {given} and this Ollama does not make them {wanted}"
        )
    shown = _base64 if request.get("encoding_format") == "base64" else _listed
    data = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, shown(vector))
        for index, vector in enumerate(vectors)
    )
    tokens = metrics.usage([rest])["prompt_tokens"]
    tail = {"model": request["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    end = json_of(tail)
    return b'{"object":"list","data":[' + data + b"]," + end[1:]


def native_embeddings(answer: bytes, request: dict[str, Any]) -> bytes:
    """The server's answer as it is, once it is seen to be one. Raises BadGatewayError."""
    vectors, _rest = _vectors(answer)
    if vectors and request["input"] and len(vectors) != (wanted := _count_of(request["input"])):
        raise BadGatewayError(f"the engine gave {len(vectors)} embeddings for {wanted} texts")
    return answer


def _count_of(texts: Any) -> int:
    return len(texts) if isinstance(texts, list) else 1


def _vectors(answer: bytes) -> tuple[list[bytes], dict[str, Any]]:
    """The numbers of each vector as they are written, and the rest of the answer."""
    vectors: list[bytes] = []
    found = _VECTORS.search(answer)
    other, position = answer, 0
    if found is not None:
        position, more = found.end(), True
        while more:
            vector = _VECTOR.match(answer, position)
            if vector is None:
                raise _strange(answer)
            if not _NUMBERS.fullmatch(vector[1]):
                raise _strange(answer)
            vectors.append(vector[1])
            position, more = vector.end(), vector[2] == b","
        other = answer[: found.start()] + b'"embeddings":[]' + answer[position:]
    try:
        rest = json.loads(other)
    except (ValueError, RecursionError):
        rest = None
    if not isinstance(rest, dict) or rest.get("embeddings") != []:
        raise _strange(answer)
    return vectors, rest


def _strange(answer: bytes) -> BadGatewayError:
    return BadGatewayError(f"the engine's embeddings are not understood: {answer[:200]!r}")


def _listed(vector: bytes) -> bytes:
    return b"[" + vector + b"]"


def _base64(vector: bytes) -> bytes:
    """Little-endian 32 bit floats."""
    try:
        numbers = json.loads(_listed(vector))
        packed = struct.pack(f"<{len(numbers)}f", *numbers)
    except (ValueError, OverflowError, struct.error):
        raise _strange(vector) from None
    return b'"' + base64.b64encode(packed) + b'"'
