"""The routes of the contract server, and those with which tests control it (`/contract/…`)."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from aiohttp import web

from . import inference, managing
from .faults import Rule
from .library import model_of
from .names import ModelName
from .state import Refusal, State
from .wire import STATE, Break, json_answer, refuse_by

__all__ = ["application"]

_Handler: TypeAlias = Callable[[web.Request], Awaitable[web.StreamResponse]]
_BLOB_LIMIT = 8 * 1024**3
_LOCAL = (".localhost", ".local", ".internal")


def application(state: State) -> web.Application:
    """The application."""
    app = web.Application(client_max_size=_BLOB_LIMIT, middlewares=[_recorded])
    app[STATE] = state
    app.add_routes(
        [
            web.get("/", _root),
            web.get("/api/version", _version),
            web.get("/api/status", _status),
            web.get("/api/tags", managing.tags),
            web.get("/api/ps", managing.ps, allow_head=False),
            web.post("/api/show", managing.show),
            web.post("/api/pull", managing.pull),
            web.post("/api/create", managing.create),
            web.post("/api/copy", managing.copy),
            web.delete("/api/delete", managing.delete),
            web.head("/api/blobs/{digest}", managing.has_blob),
            web.post("/api/blobs/{digest}", managing.keep_blob),
            web.post("/api/chat", inference.chat),
            web.post("/api/generate", inference.generate),
            web.post("/api/embed", inference.embed),
            web.post("/api/embeddings", inference.embeddings),
            web.get("/v1/models", managing.openai_models, allow_head=False),
            web.get("/v1/models/{model:.+}", managing.openai_model, allow_head=False),
            web.post("/v1/audio/transcriptions", inference.transcribe),
            web.get("/contract/requests", _requests),
            web.delete("/contract/requests", _forget),
            web.post("/contract/rules", _rule),
            web.delete("/contract/rules", _no_rules),
            web.post("/contract/models", _add_model),
            web.post("/contract/version", _set_version),
            web.post("/contract/open", _open),
        ]
    )
    return app


@web.middleware
async def _recorded(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Record each request in the journal, and answer with a handler's Refusal."""
    if request.path.startswith("/contract/"):
        return await handler(request)
    journal = request.app[STATE].journal
    entry = request["entry"] = journal.begin(request)
    try:
        entry["body"] = await _body(request)
        await journal.note(entry)
        response = await _handled(request, handler)
        await journal.note(entry, status=response.status, state="done")
        return response
    except Break:
        if request.transport is not None:
            request.transport.abort()
        await journal.note(entry, state="broken")
        return web.Response()  # the connection is closed
    except (asyncio.CancelledError, ConnectionError):
        await journal.note(entry, state="left")
        raise


async def _handled(request: web.Request, handler: _Handler) -> web.StreamResponse:
    if not _allowed(request.host):
        return web.Response(status=403)
    try:
        return await handler(request)
    except Refusal as refusal:
        return json_answer(refusal.shape, refusal.status)
    except web.HTTPNotFound:
        return web.Response(text="404 page not found", status=404, content_type="text/plain")
    except web.HTTPMethodNotAllowed:
        return web.Response(text="405 method not allowed", status=405, content_type="text/plain")
    except web.HTTPBadGateway as page:
        return web.Response(text=page.text, status=502, content_type="text/html")


def _allowed(host: str) -> bool:
    """Whether Ollama on loopback accepts this Host header."""
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name in ("", "localhost") or name.endswith(_LOCAL):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


async def _body(request: web.Request) -> Any:
    """The JSON of a body for the journal; handlers of other bodies add their own."""
    if request.path.startswith("/api/blobs/") or request.content_type.startswith("multipart/"):
        return None
    raw = await request.read()
    try:
        return json.loads(raw) if raw else None
    except ValueError:
        return raw.decode("utf-8", "replace")


async def _root(request: web.Request) -> web.StreamResponse:
    await refuse_by(request.app[STATE].rules.take("/", ""), request)
    return web.Response(text="Ollama is running", content_type="text/plain", charset="utf-8")


async def _version(request: web.Request) -> web.StreamResponse:
    await refuse_by(request.app[STATE].rules.take("/api/version", ""), request)
    return json_answer({"version": request.app[STATE].version})


async def _status(request: web.Request) -> web.StreamResponse:
    return json_answer({"cloud": {"disabled": not request.app[STATE].cloud, "source": "env"}})


async def _requests(request: web.Request) -> web.StreamResponse:
    """?path=&method=&state= filter; with ?count=&seconds= it waits for so many entries."""
    query = dict(request.query)
    count, seconds = int(query.pop("count", 0)), float(query.pop("seconds", 0))
    return json_answer(await request.app[STATE].journal.wait(count, seconds, **query))


async def _forget(request: web.Request) -> web.StreamResponse:
    request.app[STATE].journal.entries.clear()
    return web.Response()


async def _rule(request: web.Request) -> web.StreamResponse:
    request.app[STATE].rules.add(Rule(**await request.json()))
    return web.Response()


async def _no_rules(request: web.Request) -> web.StreamResponse:
    request.app[STATE].rules.clear()
    return web.Response()


async def _add_model(request: web.Request) -> web.StreamResponse:
    """Add a model. The body has fields of Model; `name` is required."""
    shape = await request.json()
    name = ModelName.parse(shape["name"])
    if name is None:
        return json_answer({"error": "invalid model name"}, 400)
    request.app[STATE].library.add(model_of(shape | {"name": name.shortest}))
    return web.Response()


async def _set_version(request: web.Request) -> web.StreamResponse:
    request.app[STATE].version = (await request.json())["version"]
    return web.Response()


async def _open(request: web.Request) -> web.StreamResponse:
    """Release gated answers, now and later."""
    request.app[STATE].gate.set()
    return web.Response()
