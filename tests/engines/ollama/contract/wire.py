"""Requests and answers on the wire: Go's JSON, gin's headers, NDJSON lines in chunks."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from .faults import REFUSALS
from .state import Refusal, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["STATE", "Break", "encoded", "json_answer", "json_body", "refuse_by", "stream_lines"]

STATE = web.AppKey("state", State)
_JSON = "application/json; charset=utf-8"
_CRUMB = 7


class Break(Exception):  # noqa: N818  # an instruction of a stream
    """Close the connection now."""


def encoded(shape: Any) -> bytes:
    """JSON in Go's format: no spaces, with Go's escapes."""
    text = json.dumps(shape, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode()


def json_answer(shape: Any, status: int = 200) -> web.Response:
    """The answer of gin's c.JSON."""
    return web.Response(body=encoded(shape), status=status, headers={"Content-Type": _JSON})


async def json_body(request: web.Request) -> dict[str, Any]:
    """The JSON object of a request. Raises Refusal with Ollama's error."""
    raw = await request.read()
    if not raw.strip():
        raise Refusal(400, "missing request body")
    try:
        shape = json.loads(raw)
    except ValueError:
        text = raw.decode("utf-8", "replace").strip()
        sign = next((sign for sign in text if sign not in "{[ \n"), text[0])
        wanted = "object key string" if text.startswith("{") else "value"
        raise Refusal(400, f"invalid character '{sign}' looking for beginning of {wanted}") from None
    if not isinstance(shape, dict):
        raise Refusal(400, "json: cannot unmarshal array into Go value of type api.ChatRequest")
    return shape


async def refuse_by(fault: str, request: web.Request) -> None:
    """Apply the faults that precede an answer. Raises Refusal and Break."""
    if fault in REFUSALS:
        raise Refusal(*REFUSALS[fault])
    if fault == "hang-up":
        raise Break
    if fault == "silent":
        await asyncio.Event().wait()
    if fault == "html":
        raise web.HTTPBadGateway(text="<html><h1>502 Bad Gateway</h1></html>", content_type="text/html")


async def stream_lines(request: web.Request, lines: AsyncIterator[Any], fault: str = "") -> web.StreamResponse:
    """Send objects as lines, each in its own chunk; bytes are sent unchanged. An error before the first has a status.

    Raises Break to close the connection.
    """
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    response.enable_chunked_encoding()
    held = b""
    async for line in lines:
        if not response.prepared and isinstance(line, dict) and "error" in line and "status" not in line:
            return web.Response(body=encoded(line), status=500, headers={"Content-Type": "application/json"})
        data = line if isinstance(line, bytes) else encoded(line) + b"\n"
        if not response.prepared:
            await response.prepare(request)
        if fault == "burst":
            held += data
        elif fault == "crumbs":
            for start in range(0, len(data), _CRUMB):
                await response.write(data[start : start + _CRUMB])
                await asyncio.sleep(0)
        else:
            await response.write(data)
    if not response.prepared:
        await response.prepare(request)
    if held:
        await response.write(held)
    await response.write_eof()
    return response
