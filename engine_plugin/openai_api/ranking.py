"""rerank on servers that all give scores, each its own kind: every engine of ours answers with 0..1, best first."""

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
    """The documents as texts, which is what servers take: a request may also give objects with a text."""
    return [str(document["text"] if isinstance(document, dict) else document) for document in request["documents"]]


def ranked_answer(answer: bytes, request: Mapping[str, Any], *, raw: bool) -> bytes:
    """Scores from 0 to 1, best first, cut to top_n; `document` is added when return_documents asks for it.

    `raw`: the server gives a classifier's logits. So that a threshold means the same on each engine, these become the
    logistic function of the logit, as cross-encoders are trained for.
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
