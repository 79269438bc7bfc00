"""What all endpoints do with a request: read its JSON, pick fields of a type, answer with JSON."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine_plugin.jsontext import BRIEF, JsonError, read_json, write_json
from openvino_server.errors import ApiError, bad_request

if TYPE_CHECKING:
    from openvino_server.registry import Registry

__all__ = ["BODY_LIMIT", "REGISTRY", "flag", "json_answer", "read_object", "text_field", "whole"]

BODY_LIMIT = 512 * 1024 * 1024
"""Bytes: an hour of uncompressed 16 kHz audio is 115 MB."""
REGISTRY: web.AppKey[Registry] = web.AppKey("registry")


async def read_object(request: web.Request) -> dict[str, Any]:
    """The body's JSON object. Raises ApiError."""
    data = await request.read()
    try:
        body = (
            read_json(data, BODY_LIMIT)
            if len(data) <= BRIEF
            else await asyncio.to_thread(read_json, data, BODY_LIMIT)
        )
    except JsonError as error:
        raise ApiError(400, f"the body {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def json_answer(shape: dict[str, Any], status: int = 200) -> web.Response:
    """JSON without escapes."""
    return web.Response(body=write_json(shape), status=status, content_type="application/json", charset="utf-8")


def text_field(body: dict[str, Any], name: str, default: str | None = None) -> str:
    """A string; required when there is no default. Raises ApiError."""
    value = body.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise bad_request(name, "must be a string")
    return value


def flag(body: dict[str, Any], name: str, default: bool = False) -> bool:
    """true or false. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad_request(name, f"must be true or false, not {value!r}")
    return value


def whole(body: dict[str, Any], name: str, least: int) -> int | None:
    """A whole number, or None when it is not given. Raises ApiError."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise bad_request(name, f"must be a whole number, at least {least}, not {value!r}")
    return value
