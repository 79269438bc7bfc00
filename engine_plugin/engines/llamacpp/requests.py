"""From a service's request and answer to llama.cpp's: only what llama.cpp does differently is touched."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

from engine_plugin.engines.http.assemble import choices_wanted
from engine_plugin.errors import BadGatewayError, InvalidRequestError

__all__ = ["embeddings_answer", "rerank_answer", "slots_needed", "upstream_body"]


def upstream_body(service: str, request: dict[str, Any], *, stream: bool) -> bytes:
    """The JSON to send. Chat and generate always stream: only a stream notices that its caller has gone."""
    body = dict(request)
    if service in ("chat", "generate"):
        body["stream"] = True
        if not stream:
            body["stream_options"] = {"include_usage": True}
        if service == "chat":
            _tool_choice(body)
    elif service == "rerank":
        body["documents"] = [_text(document) for document in request["documents"]]
        body.pop("top_n", None)  # the cut comes after the sort, in `rerank_answer`
    try:
        return json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except RecursionError:  # what can be read cannot always be written: the stack is deeper here
        raise InvalidRequestError("request_data: is nested too deeply") from None


def _tool_choice(body: dict[str, Any]) -> None:
    """llama.cpp takes tool_choice as a word only, and renders the tools into the prompt even for "none"."""
    choice = body.get("tool_choice")
    if choice == "none":
        body.pop("tools", None)
        body.pop("tool_choice")
    elif isinstance(choice, dict):
        name = _tool_name(choice)
        chosen = [tool for tool in body.get("tools") or [] if _tool_name(tool) == name]
        if name is None or not chosen:
            raise InvalidRequestError(f"tool_choice: names the function {name!r}, which is not among tools")
        body["tools"], body["tool_choice"] = chosen, "required"


def _tool_name(tool: Any) -> Any:
    function = tool.get("function") if isinstance(tool, dict) else None
    return function.get("name") if isinstance(function, dict) else None


def _text(document: Any) -> str:
    return str(document["text"] if isinstance(document, dict) else document)


def slots_needed(service: str, request: dict[str, Any]) -> int:
    """How many of the server's slots the request occupies at once."""
    if service not in ("chat", "generate"):
        return 1
    prompts = request.get("prompt") if service == "generate" else None
    texts = [prompt for prompt in prompts if not isinstance(prompt, int)] if isinstance(prompts, list) else ()
    return max(1, len(texts)) * choices_wanted(request)


def embeddings_answer(answer: bytes, request: dict[str, Any]) -> bytes:
    """The engine's answer as it is. `dimensions` is refused when the model has another number of them."""
    wanted = request.get("dimensions")
    if wanted is not None:
        given = _dimensions(answer)
        if given != wanted:
            raise InvalidRequestError(
                f"dimensions: this model gives {given} and llama.cpp cannot shorten them to {wanted}"
            )
    return answer


def _dimensions(answer: bytes) -> int:
    try:
        vector = json.loads(answer)["data"][0]["embedding"]
        return len(base64.b64decode(vector)) // 4 if isinstance(vector, str) else len(vector)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadGatewayError(f"the engine's embeddings are not understood: {answer[:200]!r}") from error


def rerank_answer(answer: bytes, request: dict[str, Any]) -> bytes:
    """Scores as probabilities, best first, cut to top_n; `document` is added when return_documents asks for it.

    llama.cpp gives the classifier's raw logit. Every engine of ours answers with 0..1, so that a threshold means
    the same on each: the logistic function of the logit, as cross-encoders are trained for.
    """
    try:
        shape = json.loads(answer)
        results = [(float(item["relevance_score"]), int(item["index"])) for item in shape["results"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadGatewayError(f"the engine's rerank answer is not understood: {answer[:200]!r}") from error
    results.sort(key=lambda result: (-result[0], result[1]))
    top = request.get("top_n") or len(results)
    shape["results"] = [_result(request, score, index) for score, index in results[:top]]
    return json.dumps(shape, ensure_ascii=False).encode()


def _result(request: dict[str, Any], score: float, index: int) -> dict[str, Any]:
    result: dict[str, Any] = {"index": index, "relevance_score": _logistic(score)}
    if request.get("return_documents"):
        result["document"] = {"text": _text(request["documents"][index])}
    return result


def _logistic(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)
    return power / (1 + power)
