"""The HTTP server: routes, access by the key, error answers, and the listening socket."""

from __future__ import annotations

import hmac
import os
import socket
import sys
import traceback
from typing import TYPE_CHECKING

from aiohttp import http_exceptions, web

from engine_plugin.errors import InvalidRequestError
from openvino_server import audio_api, chat_api, control_api, images_api, vectors_api
from openvino_server.errors import RequestError
from openvino_server.requests import BODY_LIMIT, REGISTRY

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

    from openvino_server.registry import Registry

__all__ = ["make_app", "serve_http"]

_OPEN = "/v2/health/"
_BACKLOG = 512
_KEEPALIVE = 75.0


def make_app(registry: Registry, key: str) -> web.Application:
    """The application. Without `key`, only the health routes answer."""
    app = web.Application(middlewares=[_edge(key)], client_max_size=BODY_LIMIT)
    app[REGISTRY] = registry
    app.add_routes(
        [
            web.get("/v2/health/live", control_api.live),
            web.get("/v2/health/ready", control_api.ready),
            web.get("/v2", control_api.metadata),
            web.get("/v3/models", control_api.models),
            web.get("/v1/config", control_api.config),
            web.post("/v1/config/reload", control_api.reload),
            web.post("/v3/chat/completions", chat_api.chat),
            web.post("/v3/completions", chat_api.complete),
            web.post("/v3/embeddings", vectors_api.embed),
            web.post("/v3/rerank", vectors_api.rerank),
            web.post("/v3/images/generations", images_api.generate),
            web.post("/v3/audio/transcriptions", audio_api.transcription),
            web.post("/v3/audio/translations", audio_api.translation),
            web.post("/v3/audio/speech", audio_api.speech),
        ]
    )
    return app


def _edge(key: str) -> Middleware:
    expected = f"Bearer {key}".encode()

    @web.middleware
    async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
            if not hmac.compare_digest(given, expected) and not request.path.startswith(_OPEN):
                raise RequestError("Authorization: the server's key is required", 401)
            return await handler(request)
        except (RequestError, InvalidRequestError) as error:
            return _refusal(RequestError.of(error))
        except web.HTTPException as error:
            return _refusal(RequestError(error.reason, error.status))
        except (web.RequestPayloadError, http_exceptions.BadHttpMessage) as error:
            return _refusal(RequestError(f"the body cannot be read: {error}"))
        except ConnectionError:
            raise  # the client has disconnected; aiohttp handles it
        except Exception as error:  # noqa: BLE001  # the edge that catches all
            traceback.print_exc()
            return _refusal(RequestError(f"{type(error).__name__}: {error}", 500))

    return edge


def _refusal(error: RequestError) -> web.Response:
    return web.Response(body=error.body(), status=error.status, content_type="application/json", charset="utf-8")


async def serve_http(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, str]:
    """Listen on a path ending in .sock (for this user only), or on an address. Returns aiohttp's runner and the URL.

    Raises OSError.
    """
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, keepalive_timeout=_KEEPALIVE)
    await runner.setup()
    try:
        if host.endswith(".sock"):
            await _listen_on_path(runner, host)
            return runner, f"unix:{host}"
        listener = socket.create_server((host, port), backlog=_BACKLOG)
        listener.setblocking(False)
        await web.SockSite(runner, listener, backlog=_BACKLOG).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner, f"http://{host}:{listener.getsockname()[1]}"


async def _listen_on_path(runner: web.AppRunner, path: str) -> None:
    """Listen on a socket that only this user can open, from its creation on. asyncio replaces an older one."""
    if sys.platform == "win32":
        raise OSError(f"{path}: unix sockets are not supported on this system; give an address")
    before = os.umask(0o177)
    try:
        await web.UnixSite(runner, path, backlog=_BACKLOG).start()
    finally:
        os.umask(before)
