"""Handlers of /v3/embeddings (OpenAI's format) and /v3/rerank (Cohere's)."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from array import array
from typing import TYPE_CHECKING, Any

from aiohttp import web

from openvino_server import fields
from openvino_server.errors import bad_request
from openvino_server.requests import REGISTRY, json_answer, read_object

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

__all__ = ["embed", "rerank"]

_FLOAT = 4
_AT_A_TIME = 16384
"""Numbers encoded as JSON before the loop runs other tasks: about 10 ms."""


async def embed(request: web.Request) -> web.Response:
    """POST /v3/embeddings"""
    body = await read_object(request)
    texts = _inputs(body.get("input"))
    encoding = fields.text(body, "encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise bad_request("encoding_format", f"must be float or base64, not {encoding!r}")
    dimensions = fields.whole(body, "dimensions", 1)
    model = request.app[REGISTRY].find(body.get("model"), "embed")
    async with model.use() as worker:
        result = await worker.ask({"op": "embed", "input": texts})
    vectors: list[bytes] = result["vectors"]
    if dimensions is not None and vectors and len(vectors[0]) != dimensions * _FLOAT:
        raise bad_request("dimensions", f"must be {len(vectors[0]) // _FLOAT}, the length of this model's vectors")
    data = [piece async for piece in _pieces(vectors, encoding == "base64")]
    tokens = result.get("prompt_tokens", 0)
    rest = {"model": body["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    text = f'{{"object":"list","data":[{",".join(data)}],{json.dumps(rest, ensure_ascii=False)[1:]}'
    return web.Response(body=text.encode("utf-8", "replace"), content_type="application/json", charset="utf-8")


def _inputs(given: Any) -> list[str | int | list[int]]:
    """The inputs as a list: texts, tokens or lists of tokens. Raises RequestError."""
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list) or not given:
        raise bad_request("input", "must be a string, a list of strings, or tokens, and not empty")
    if _are_tokens(given):
        return given
    for index, item in enumerate(given):
        if not isinstance(item, str) and not (isinstance(item, list) and item and _are_tokens(item)):
            raise bad_request(f"input[{index}]", "must be a string or a list of tokens, not empty")
    return given


def _are_tokens(items: Iterable[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


async def _pieces(vectors: list[bytes], as_base64: bool) -> AsyncIterator[str]:
    """The JSON of each vector."""
    written = 0
    for index, vector in enumerate(vectors):
        if as_base64:
            numbers = f'"{base64.b64encode(vector).decode()}"'
        else:
            numbers = json.dumps(array("f", vector).tolist(), separators=(",", ":"))
        yield f'{{"object":"embedding","index":{index},"embedding":{numbers}}}'
        written += len(vector) // _FLOAT
        if written >= _AT_A_TIME:
            written = 0
            await asyncio.sleep(0)


async def rerank(request: web.Request) -> web.Response:
    """POST /v3/rerank"""
    body = await read_object(request)
    query = fields.text(body, "query")
    documents = _documents(body.get("documents"))
    most = fields.whole(body, "top_n", 1)
    with_documents = fields.flag(body, "return_documents")
    model = request.app[REGISTRY].find(body.get("model"), "rerank")
    if not documents:
        return _ranked(body["model"], [], 0)
    async with model.use() as worker:
        result = await worker.ask({"op": "rerank", "query": query, "documents": documents})
    scores: list[float] = result["scores"]
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: most or len(scores)]
    hits: list[dict[str, Any]] = [{"index": index, "relevance_score": scores[index]} for index in best]
    if with_documents:
        for hit in hits:
            hit["document"] = {"text": documents[hit["index"]]}
    return _ranked(body["model"], hits, result.get("prompt_tokens", 0))


def _documents(given: Any) -> list[str]:
    if not isinstance(given, list):
        raise bad_request("documents", "must be a list")
    texts = []
    for index, item in enumerate(given):
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(text, str):
            raise bad_request(f"documents[{index}]", "must be a string, or an object with a text")
        texts.append(text)
    return texts


def _ranked(model: str, hits: list[dict[str, Any]], tokens: int) -> web.Response:
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_answer({"id": f"rerank-{uuid.uuid4().hex}", "model": model, "results": hits, "usage": usage})
