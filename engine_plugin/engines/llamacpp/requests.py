"""From a service's request and answer to llama.cpp's: only what llama.cpp does differently is touched."""

from __future__ import annotations

import base64
import json
from typing import Any

from engine_plugin.engines.llamacpp.grammars import check_grammars
from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.openai_api.bodies import choices_wanted, request_json
from engine_plugin.openai_api.conversation import CANNOT_HEAR, CANNOT_SEE, make_plain
from engine_plugin.openai_api.ranking import document_texts
from engine_plugin.services.base import integer

__all__ = ["embeddings_answer", "upstream", "upstream_body"]

_IGNORED = ("suffix", "echo")
_MOST_TOP = 20
_MOST_TOKEN = 2**31 - 1

_REFUSED = {"image_url": CANNOT_SEE, "input_audio": CANNOT_HEAR, "": "this model takes parts of type text only"}
"""Models are loaded without the projector that images and audio need."""


def upstream_body(service: str, request: dict[str, Any], *, stream: bool) -> bytes:
    """The JSON to send. Raises InvalidRequestError."""
    return request_json(upstream(service, request, stream=stream))


def upstream(service: str, request: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    """What to send. Chat and generate always stream: only a stream notices that its caller has gone. Raises
    InvalidRequestError."""
    body = dict(request)
    if service in ("chat", "generate"):
        body["stream"] = True
        if not stream:
            body["stream_options"] = {"include_usage": True}
        check_grammars(body)
        _generation(body)
        if service == "chat":
            make_plain(body, _REFUSED)
            if body.get("logprobs") is True and integer(body, "top_logprobs", 0, _MOST_TOP) == 0:
                body["top_logprobs"] = 1  # else there are none of the chosen token, either
            _tool_choice(body)
        else:
            _check_tokens("prompt", body.get("prompt"))
            _completion(body)
    elif service == "embed":
        _check_tokens("input", body["input"])
    elif service == "rerank":
        body["documents"] = document_texts(request)
        body.pop("top_n", None)  # the cut comes after the sort, in `ranked_answer`
    return body


def _generation(body: dict[str, Any]) -> None:
    """Refuse what llama.cpp would ignore, and leave out the empty stop string, which it finds at once."""
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
    """Raise InvalidRequestError for a number that no token has: llama.cpp would take its last 32 bits."""
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, list):
            _check_tokens(f"{field}[{index}]", item)
        elif isinstance(item, int) and not 0 <= item <= _MOST_TOKEN:
            raise InvalidRequestError.at(f"{field}[{index}]", f"{item} is not a token of this model")


def _completion(body: dict[str, Any]) -> None:
    """Refuse what llama.cpp would ignore of a completion, and ask for log probabilities for `logprobs: 0` as well."""
    if (body.get("best_of") or 1) > choices_wanted(body):
        raise InvalidRequestError.at("best_of", "llama.cpp does not choose among answers; leave it out")
    if body.get("logprobs") == 0 and body["logprobs"] is not False:
        body["logprobs"] = 1


def _tool_choice(body: dict[str, Any]) -> None:
    """llama.cpp takes tool_choice as a word only, and renders the tools into the prompt even for "none"."""
    if "tools" in body:
        body["tools"] = [{"type": "function", **tool} for tool in body["tools"]]
    choice = body.get("tool_choice")
    if choice == "required" and not body.get("tools"):
        raise InvalidRequestError.at("tool_choice", "required, but there are no tools")
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
    """The engine's answer as it is. `dimensions` is refused when the model has another number of them."""
    wanted = request.get("dimensions")
    if wanted is not None:
        given = _dimensions(answer)
        if given != wanted:
            raise InvalidRequestError.at(
                "dimensions", f"this model gives {given} and llama.cpp cannot shorten them to {wanted}"
            )
    return answer


def _dimensions(answer: bytes) -> int:
    try:
        vector = json.loads(answer)["data"][0]["embedding"]
        return len(base64.b64decode(vector)) // 4 if isinstance(vector, str) else len(vector)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadGatewayError(f"the engine's embeddings are not understood: {answer[:200]!r}") from error
