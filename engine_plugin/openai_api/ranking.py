"""rerank: converts the scores of different servers to 0..1, best first."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.jsontext import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["document_texts", "ranked_answer"]


def document_texts(request: Mapping[str, Any]) -> list[str]:
    """The documents as texts, as servers require; a request may also have objects with a text."""
    return [str(document["text"] if isinstance(document, dict) else document) for document in request["documents"]]


def ranked_answer(answer: bytes, request: Mapping[str, Any], *, raw: bool) -> bytes:
    """The results with scores from 0 to 1, best first, limited to top_n; with `document` if return_documents is true.

    With `raw` the server returns a classifier's logits. Their logistic function, for which cross-encoders are
    trained, makes a threshold mean the same on every engine.
    """
    texts = document_texts(request)
    try:
        shape = json.loads(answer)
        results = [(float(item["relevance_score"]), int(item["index"])) for item in shape["results"]]
        if not all(0 <= index < len(texts) for _score, index in results):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadGatewayError(f"the engine's rerank answer is not understood: {answer[:200]!r}") from error
    raw = raw or any(not 0 <= score <= 1 for score, _index in results)
    results.sort(key=lambda result: (-result[0], result[1]))
    shape["results"] = [
        {
            "index": index,
            "relevance_score": _logistic(score) if raw else score,
            **({"document": {"text": texts[index]}} if request.get("return_documents") else {}),
        }
        for score, index in results[: request.get("top_n") or len(results)]
    ]
    return write_json(shape)


def _logistic(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)
    return power / (1 + power)
