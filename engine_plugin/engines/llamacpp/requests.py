"""Converts requests and answers where llama.cpp differs from the service's format."""

from __future__ import annotations

import base64
import json
from typing import Any

from engine_plugin.engines.llamacpp.grammars import check_grammars
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.openai_api.bodies import choices_wanted
from engine_plugin.openai_api.conversation import CANNOT_HEAR, CANNOT_SEE, make_plain
from engine_plugin.openai_api.ranking import document_texts
from engine_plugin.services.base import integer

__all__ = ["embeddings_answer", "upstream_request"]

_IGNORED = ("suffix", "echo")
_MAX_TOP_LOGPROBS = 20
_MAX_TOKEN = 2**31 - 1

_UNSUPPORTED_PARTS = {
    "image_url": CANNOT_SEE,
    "input_audio": CANNOT_HEAR,
    "": "this model accepts only parts of type text",
}
"""Models are loaded without the projector for images and audio."""


def upstream_request(service: str, request: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    """Convert a request. Chat and generate always stream, because llama.cpp detects a disconnected caller only in
    streams. Raises InvalidRequestError."""
    body = dict(request)
    if service in ("chat", "generate"):
        body["stream"] = True
        if not stream:
            body["stream_options"] = {"include_usage": True}
        check_grammars(body)
        _adapt_generation(body)
        if service == "chat":
            make_plain(body, _UNSUPPORTED_PARTS)
            if body.get("logprobs") is True and integer(body, "top_logprobs", 0, _MAX_TOP_LOGPROBS) == 0:
                body["top_logprobs"] = 1  # else the chosen token has none either
            _adapt_tool_choice(body)
        else:
            _check_tokens("prompt", body.get("prompt"))
            _adapt_completion(body)
    elif service == "embed":
        _check_tokens("input", body["input"])
    elif service == "rerank":
        body["documents"] = document_texts(request)
        body.pop("top_n", None)  # `ranked_answer` sorts before it cuts
    return body


def _adapt_generation(body: dict[str, Any]) -> None:
    """Reject fields that llama.cpp would ignore; remove an empty stop string, which would match at once."""
    for field in _IGNORED:
        if body.get(field):
            raise InvalidRequestError.at(field, "llama.cpp does not support it; leave it out")
    for field in ("max_tokens", "max_completion_tokens"):
        if body.get(field) == 0:
            raise InvalidRequestError.at(field, "must be at least 1, or -1 for no limit, not 0")
    stop = body.pop("stop", None)
    stops = [text for text in ([stop] if isinstance(stop, str) else stop or ()) if text]
    if stops:
        body["stop"] = stops


def _check_tokens(field: str, items: Any) -> None:
    """Raise InvalidRequestError for an invalid token id, of which llama.cpp would use the last 32 bits."""
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, list):
            _check_tokens(f"{field}[{index}]", item)
        elif isinstance(item, int) and not 0 <= item <= _MAX_TOKEN:
            raise InvalidRequestError.at(f"{field}[{index}]", f"{item} is not a token of this model")


def _adapt_completion(body: dict[str, Any]) -> None:
    """Reject fields of a completion that llama.cpp would ignore; request log probabilities for `logprobs: 0` too."""
    if (body.get("best_of") or 1) > choices_wanted(body):
        raise InvalidRequestError.at("best_of", "llama.cpp does not support it; leave it out")
    if body.get("logprobs") == 0 and body["logprobs"] is not False:
        body["logprobs"] = 1


def _adapt_tool_choice(body: dict[str, Any]) -> None:
    """Convert tool_choice: llama.cpp accepts only strings, and renders the tools even for "none"."""
    if "tools" in body:
        body["tools"] = [{"type": "function", **tool} for tool in body["tools"]]
    choice = body.get("tool_choice")
    if choice == "required" and not body.get("tools"):
        raise InvalidRequestError.at("tool_choice", "is required, but there are no tools")
    if choice == "none":
        body.pop("tools", None)
        body.pop("tool_choice")
    elif isinstance(choice, dict):
        name = _tool_name(choice)
        chosen = [tool for tool in body.get("tools") or [] if _tool_name(tool) == name]
        if name is None or not chosen:
            raise InvalidRequestError.at("tool_choice", f"names the function {name!r}, which is not among tools")
        body["tools"], body["tool_choice"] = chosen, "required"


def _tool_name(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def embeddings_answer(answer: bytes, request: dict[str, Any]) -> bytes:
    """The engine's answer unchanged. Raises InvalidRequestError if the vectors have other `dimensions`."""
    wanted = request.get("dimensions")
    if wanted is not None:
        given = _dimensions(answer)
        if given != wanted:
            raise InvalidRequestError.at(
                "dimensions", f"this model has {given}, and llama.cpp cannot reduce them to {wanted}"
            )
    return answer


def _dimensions(answer: bytes) -> int:
    try:
        vector = json.loads(answer)["data"][0]["embedding"]
        return len(base64.b64decode(vector)) // 4 if isinstance(vector, str) else len(vector)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadGatewayError(f"the engine's embeddings are invalid: {answer[:200]!r}") from error
