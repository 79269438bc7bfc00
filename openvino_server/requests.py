"""JSON in and out of the handlers."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine_plugin.jsontext import BRIEF, write_json
from engine_plugin.services.base import parse_request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from openvino_server.registry import Registry

__all__ = ["BODY_LIMIT", "REGISTRY", "json_answer", "read_object"]

BODY_LIMIT = 512 * 1024 * 1024
"""Bytes: an hour of uncompressed 16 kHz audio is 115 MB."""
REGISTRY: web.AppKey[Registry] = web.AppKey("registry")


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body's JSON object. Raises InvalidRequestError."""
    data = await request.read()
    parse = partial(parse_request, data, "body", BODY_LIMIT)
    return parse() if len(data) <= BRIEF else await asyncio.to_thread(parse)


def json_answer(shape: Mapping[str, Any], status: int = 200) -> web.Response:
    """JSON without escapes."""
    return web.Response(body=write_json(shape), status=status, content_type="application/json", charset="utf-8")
