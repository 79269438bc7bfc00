"""rerank: documents by their relevance to a query, in the shape that Cohere and Jina made common."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import RequestValidator, optional, require

__all__ = ["Rerank"]


class Rerank(RequestValidator):
    """`query` and `documents` in, `results` with `relevance_score` in 0..1, best first, out."""

    name: ClassVar[str] = "rerank"

    def check(self, request: dict[str, Any]) -> None:
        require(request, "query", str)
        documents = require(request, "documents", list)
        for index, document in enumerate(documents):
            text = document.get("text") if isinstance(document, dict) else document
            if not isinstance(text, str):
                raise InvalidRequestError.at(f"documents[{index}]", "must be a string, or an object with a text")
        top = optional(request, "top_n", int)
        if top is not None and top < 1:
            raise InvalidRequestError.at("top_n", f"must be at least 1, not {top}")
        optional(request, "return_documents", bool)

    def trivial_answer(self, request: dict[str, Any]) -> dict[str, Any] | None:
        return None if request["documents"] else {"model": request["model"], "results": []}
