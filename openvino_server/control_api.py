"""Health, metadata and configuration: /v1/config, /v2, /v3/models."""

from __future__ import annotations

import importlib.metadata
import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

from engine_plugin.models.info import FEATURE_OF_KIND, FEATURES
from openvino_server.config import ConfigError
from openvino_server.model import AVAILABLE
from openvino_server.requests import REGISTRY, json_answer

if TYPE_CHECKING:
    from openvino_server.model import Model

__all__ = ["config", "live", "metadata", "models", "ready", "reload"]

_SERVER_NAME = "openvino-genai"
_STARTED = int(time.time())


async def live(_request: web.Request) -> web.Response:
    """GET /v2/health/live"""
    return web.Response()


async def ready(request: web.Request) -> web.Response:
    """GET /v2/health/ready: 503 while a worker hangs or is being restarted."""
    return web.Response(status=200 if request.app[REGISTRY].healthy else 503)


async def metadata(_request: web.Request) -> web.Response:
    """GET /v2: with the installed version of openvino-genai, read without importing it."""
    try:
        version = importlib.metadata.version("openvino-genai")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    return json_answer({"name": _SERVER_NAME, "version": version, "extensions": []})


async def models(request: web.Request) -> web.Response:
    """GET /v3/models: the models that can answer now"""
    served = sorted(request.app[REGISTRY].models.items())
    data = [_entry(name, model) for name, model in served if model.state == AVAILABLE and not model.complaint]
    return json_answer({"object": "list", "data": data})


def _entry(name: str, model: Model) -> dict[str, Any]:
    """OpenAI's entry for a model, with vLLM's `max_model_len` and this server's `kind` and `capabilities`."""
    found = {FEATURE_OF_KIND.get(model.kind), *model.ready_info.get("capabilities", ())}
    context = model.ready_info.get("context_length")
    return {
        "id": name,
        "object": "model",
        "created": _STARTED,
        "owned_by": "local",
        **({"max_model_len": context} if context else {}),
        "kind": model.kind,
        "capabilities": [feature for feature in FEATURES if feature in found],
    }


async def config(request: web.Request) -> web.Response:
    """GET /v1/config: each model's state."""
    return json_answer(request.app[REGISTRY].states())


async def reload(request: web.Request) -> web.Response:
    """POST /v1/config/reload: apply config.json. 201 if that changed anything; errors are strings, as OVMS's are."""
    registry = request.app[REGISTRY]
    try:
        changed, failed = await registry.reload()
    except ConfigError as error:
        return json_answer({"error": f"Reloading config failed: {error}"}, 400)
    if failed:
        return json_answer({"error": f"Reloading models versions failed: {'; '.join(failed)}"}, 500)
    return json_answer(registry.states(), 201 if changed else 200)
