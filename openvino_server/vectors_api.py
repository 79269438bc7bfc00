"""Handlers of /v3/embeddings (OpenAI's format) and /v3/rerank (Cohere's)."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from array import array
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine_plugin.errors import InvalidRequestError
from engine_plugin.openai_api.ranking import document_texts
from engine_plugin.services import VALIDATORS
from engine_plugin.services.base import choice, integer
from openvino_server.requests import REGISTRY, json_answer, read_object

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["embed", "inputs", "rerank"]

_FLOAT = 4
_MOST = 1 << 31


async def embed(request: web.Request) -> web.Response:
    """POST /v3/embeddings"""
    body = await read_object(request)
    texts = inputs(body.get("input"))
    encoding = choice(body, "encoding_format", ("float", "base64"))
    dimensions = integer(body, "dimensions", 1, _MOST)
    model = request.app[REGISTRY].find(body.get("model"), "embed")
    async with model.use() as worker:
        result = await worker.ask({"op": "embed", "input": texts})
    vectors: list[bytes] = result["vectors"]
    if dimensions is not None and vectors and len(vectors[0]) != dimensions * _FLOAT:
        raise InvalidRequestError.at(
            "dimensions", f"must be {len(vectors[0]) // _FLOAT}, the length of this model's vectors"
        )
    data: list[str] = []
    for index, vector in enumerate(vectors):
        if encoding == "base64":
            numbers = f'"{base64.b64encode(vector).decode()}"'
        else:
            numbers = json.dumps(array("f", vector).tolist(), separators=(",", ":"))
        data.append(f'{{"object":"embedding","index":{index},"embedding":{numbers}}}')
        await asyncio.sleep(0)  # other tasks run between two vectors
    tokens = result.get("prompt_tokens", 0)
    rest = {"model": body["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    text = f'{{"object":"list","data":[{",".join(data)}],{json.dumps(rest, ensure_ascii=False)[1:]}'
    return web.Response(body=text.encode("utf-8", "replace"), content_type="application/json", charset="utf-8")


def inputs(given: Any) -> list[str | int | list[int]]:
    """The inputs as a list: texts, tokens or lists of tokens. Raises InvalidRequestError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise InvalidRequestError.at("input", "must be a string, a list of strings, or tokens, and not empty")
    if not _are_tokens(given):
        for index, item in enumerate(given):
            if not isinstance(item, str) and not (isinstance(item, list) and item and _are_tokens(item)):
                raise InvalidRequestError.at(f"input[{index}]", "must be a string or a list of tokens, not empty")
    return given


def _are_tokens(items: Iterable[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


async def rerank(request: web.Request) -> web.Response:
    """POST /v3/rerank"""
    body = await read_object(request)
    VALIDATORS["rerank"].check(body)
    model = request.app[REGISTRY].find(body.get("model"), "rerank")
    documents = document_texts(body)
    hits: list[dict[str, Any]] = []
    tokens = 0
    if documents:
        async with model.use() as worker:
            result = await worker.ask({"op": "rerank", "query": body["query"], "documents": documents})
        scores, tokens = result["scores"], result.get("prompt_tokens", 0)
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.get("top_n")]
        hits = [{"index": index, "relevance_score": scores[index]} for index in best]
    if body.get("return_documents"):
        for hit in hits:
            hit["document"] = {"text": documents[hit["index"]]}
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_answer({"id": f"rerank-{uuid.uuid4().hex}", "model": body["model"], "results": hits, "usage": usage})
