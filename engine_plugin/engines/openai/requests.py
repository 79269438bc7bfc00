"""Converts requests to the server's format, and answers back where servers differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.jsontext import answer_object, write_request
from engine_plugin.openai_api.conversation import CANNOT_HEAR, CANNOT_SEE, make_plain
from engine_plugin.openai_api.ranking import document_texts
from engine_plugin.services.pictures import picture_size
from engine_plugin.transport.sse import DONE, event_of

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["PATHS", "STREAMED", "as_stream", "json_body", "request_body"]

PATHS = {
    "chat": "/chat/completions",
    "generate": "/completions",
    "embed": "/embeddings",
    "rerank": "/rerank",
    "text-to-image": "/images/generations",
    "speech-to-text": "/audio/transcriptions",
    "text-to-speech": "/audio/speech",
}
"""The endpoint of each service, relative to the API."""

STREAMED = frozenset({"chat", "generate"})


_PARTS = {"vision": ("image_url", CANNOT_SEE), "audio": ("input_audio", CANNOT_HEAR)}
"""The content part that needs a feature, and why a model without the feature refuses it."""


def request_body(service: str, request: dict[str, Any], features: Collection[str] = ()) -> dict[str, Any]:
    """The body to send, without `stream`, which depends on the server. `features` are the model's, if known."""
    body = {name: value for name, value in request.items() if value is not None}
    body.pop("stream", None)
    if service == "chat":
        make_plain(body, dict(part for feature, part in _PARTS.items() if features and feature not in features))
    elif service == "rerank":
        body["documents"] = document_texts(request)
        body.pop("top_n", None)  # `ranked_answer` sorts before it cuts
        body.pop("return_documents", None)
    elif service == "text-to-image":
        if "size" in body:
            width, height = picture_size(body["size"])
            body["size"] = f"{width}x{height}"
        if not request["model"].startswith("gpt-image"):  # these reject the field and always return base64
            body.setdefault("response_format", "b64_json")
    return body


def json_body(body: dict[str, Any], *, stream: bool, whole: bool = False) -> bytes:
    """The bytes to send. `whole`: request usage in the stream, which is assembled to a whole answer."""
    if stream:
        body["stream"] = True
        if whole:
            body["stream_options"] = {"include_usage": True}
    else:
        body.pop("stream_options", None)
    return write_request(body)


def as_stream(answer: bytes, *, usage: bool) -> bytes:
    """Convert a whole chat or completion to events; `usage`: include the event with the token counts."""
    shape = answer_object(answer)
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
        content = {"delta": _delta(choice)} if is_chat else {"text": choice.get("text", "")}
        events.append({"index": index, **content, "logprobs": choice.get("logprobs"), "finish_reason": None})
        end: dict[str, Any] = {"delta": {}} if is_chat else {"text": ""}
        events.append({"index": index, **end, "finish_reason": reason})
    blocks = [event_of({**head, "choices": [event]}) for event in events]
    if usage and shape.get("usage"):
        blocks.append(event_of({**head, "choices": [], "usage": shape["usage"]}))
    return b"".join([*blocks, DONE])


def _delta(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice.get("message")
    delta = {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else {}
    calls = delta.get("tool_calls")
    if isinstance(calls, list):
        delta["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls) if isinstance(call, dict)]
    return {"role": "assistant", **delta}
