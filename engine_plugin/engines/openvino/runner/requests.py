"""What all endpoints do with a request: read its JSON, pick fields of a type, answer with JSON."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine_plugin.engines.openvino.runner.errors import ApiError, bad_request

if TYPE_CHECKING:
    from engine_plugin.engines.openvino.runner.registry import Registry

__all__ = ["BODY_LIMIT", "REGISTRY", "flag", "json_answer", "read_json", "text_field", "whole"]

BODY_LIMIT = 512 * 1024 * 1024
"""Bytes: an hour of uncompressed 16 kHz audio is 115 MB."""
_BIG = 1 << 20
_HALF = re.compile(rb"\\u[dD][89a-fA-F]")
"""Half of a character beyond the first 65536, which without its other half is no text."""

REGISTRY: web.AppKey[Registry] = web.AppKey("registry")


async def read_json(request: web.Request) -> dict[str, Any]:
    """The body's object. Raises ApiError."""
    data = await request.read()
    try:
        return _parsed(data) if len(data) < _BIG else await asyncio.to_thread(_parsed, data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None


def _parsed(data: bytes) -> dict[str, Any]:
    """Raises ApiError, ValueError, RecursionError."""
    body = json.loads(data.decode())
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    if _HALF.search(data):
        for name, value in body.items():
            try:
                json.dumps([name, value], ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise bad_request(name, "has half of a surrogate pair, which is no character") from None
    return body


def json_answer(shape: dict[str, Any], status: int = 200) -> web.Response:
    """JSON without escapes."""
    text = json.dumps(shape, ensure_ascii=False, separators=(",", ":"))
    return web.Response(
        body=text.encode("utf-8", "replace"), status=status, content_type="application/json", charset="utf-8"
    )


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
