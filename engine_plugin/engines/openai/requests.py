"""From a service's request to the server's, and back where servers differ: little is touched."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from engine_plugin.errors import BadGatewayError, InvalidRequestError

__all__ = ["PATHS", "STREAMED", "as_stream", "is_json", "json_body", "request_body", "rerank_answer"]

PATHS = {
    "chat": "/chat/completions",
    "generate": "/completions",
    "embed": "/embeddings",
    "rerank": "/rerank",
    "text-to-image": "/images/generations",
    "speech-to-text": "/audio/transcriptions",
    "text-to-speech": "/audio/speech",
}
"""Where each service is, below the interface's root."""

STREAMED = frozenset({"chat", "generate"})

_SIZE = re.compile(r"([0-9]{1,6})[xX*]([0-9]{1,6})")
_DONE = b"data: [DONE]\n\n"


def request_body(service: str, request: dict[str, Any]) -> dict[str, Any]:
    """The body to send; whether it streams is for the kind of server to say."""
    body = {name: value for name, value in request.items() if value is not None}
    body.pop("stream", None)
    if service == "rerank":
        body["documents"] = [_text(document) for document in request["documents"]]
        body.pop("top_n", None)  # the cut comes after the sort, in `rerank_answer`
        body.pop("return_documents", None)
    elif service == "text-to-image":
        if size := _SIZE.fullmatch(str(body.get("size", ""))):
            body["size"] = f"{size[1]}x{size[2]}"
        if not request["model"].startswith("gpt-image"):  # those give nothing but base64, and refuse the field
            body.setdefault("response_format", "b64_json")
    return body


def json_body(body: dict[str, Any], *, stream: bool, whole: bool = False) -> bytes:
    """The bytes to send. `whole`: what is streamed will be put together, and is to have its usage."""
    if stream:
        body["stream"] = True
        if whole:
            body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_options", None)
    try:
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError:  # what can be read cannot always be written: the stack is deeper here
        raise InvalidRequestError("request_data: is nested too deeply") from None


def _text(document: Any) -> str:
    return str(document["text"] if isinstance(document, dict) else document)


def rerank_answer(answer: bytes, request: dict[str, Any], *, raw: bool) -> bytes:
    """Scores from 0 to 1, best first, cut to top_n; `document` is added when return_documents asks for it.

    `raw`: the server gives a classifier's logits, of which the logistic function is the probability.
    """
    shape = _shape(answer)
    try:
        results = [(float(item["relevance_score"]), int(item["index"])) for item in shape["results"]]
        documents = [_text(request["documents"][index]) for _score, index in results]
        if any(index < 0 for _score, index in results):
            raise ValueError
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadGatewayError(f"the server's rerank answer is not understood: {answer[:200]!r}") from error
    raw = raw or any(not 0 <= score <= 1 for score, _index in results)
    ranked = sorted(zip(results, documents, strict=True), key=lambda pair: (-pair[0][0], pair[0][1]))
    shape["results"] = [
        {
            "index": index,
            "relevance_score": _logistic(score) if raw else score,
            **({"document": {"text": document}} if request.get("return_documents") else {}),
        }
        for (score, index), document in ranked[: request.get("top_n") or len(ranked)]
    ]
    return json.dumps(shape, ensure_ascii=False).encode("utf-8", "replace")


def _shape(answer: bytes) -> dict[str, Any]:
    try:
        shape = json.loads(answer)
    except (ValueError, RecursionError):
        shape = None
    if not isinstance(shape, dict):
        raise BadGatewayError(f"the server's answer is no JSON object: {answer[:200]!r}")
    return shape


def _logistic(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)
    return power / (1 + power)


def is_json(begin: bytes) -> bool:
    """Whether an answer that begins so is JSON, whatever its content type: no event of a stream begins like that."""
    return begin[:1] in (b"{", b"[")


def as_stream(answer: bytes, *, usage: bool) -> bytes:
    """The events of a chat or a completion that was asked for at once; with `usage` those of its tokens, too."""
    shape = _shape(answer)
    is_chat = shape.get("object") != "text_completion"
    choices = shape.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise BadGatewayError(f"the server's answer has no choices: {answer[:200]!r}")
    head: dict[str, Any] = {
        name: shape[name] for name in ("id", "created", "model", "system_fingerprint") if name in shape
    }
    head["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    events: list[dict[str, Any]] = []
    for place, choice in enumerate(choices):
        index, reason = choice.get("index", place), choice.get("finish_reason") or "stop"
        said = {"delta": _delta(choice)} if is_chat else {"text": choice.get("text", "")}
        events.append({"index": index, **said, "logprobs": choice.get("logprobs"), "finish_reason": None})
        end: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        events.append({"index": index, **end, "finish_reason": reason})
    blocks = [_event({**head, "choices": [event]}) for event in events]
    if usage and shape.get("usage"):
        blocks.append(_event({**head, "choices": [], "usage": shape["usage"]}))
    return b"".join([*blocks, _DONE])


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    delta = {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else {}
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls) if isinstance(call, dict)]
    return {"role": "assistant", **delta}


def _event(shape: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(shape, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"
