"""JSON in and out of the handlers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine_plugin.jsontext import BRIEF, JsonError, read_json, write_json
from openvino_server.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openvino_server.registry import Registry

__all__ = ["BODY_LIMIT", "REGISTRY", "json_answer", "read_object"]

BODY_LIMIT = 512 * 1024 * 1024
"""Bytes: an hour of uncompressed 16 kHz audio is 115 MB."""
REGISTRY: web.AppKey[Registry] = web.AppKey("registry")


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body's JSON object. Raises RequestError."""
    data = await request.read()
    try:
        body = (
            read_json(data, BODY_LIMIT)
            if len(data) <= BRIEF
            else await asyncio.to_thread(read_json, data, BODY_LIMIT)
        )
    except JsonError as error:
        raise RequestError(f"the body {error}") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    return body


def json_answer(shape: Mapping[str, Any], status: int = 200) -> web.Response:
    """JSON without escapes."""
    return web.Response(body=write_json(shape), status=status, content_type="application/json", charset="utf-8")
