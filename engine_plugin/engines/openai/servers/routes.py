"""Which services a server has, by the routes that it publishes (openapi.json, as FastAPI writes it)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.engines.openai.requests import PATHS

if TYPE_CHECKING:
    from engine_plugin.engines.openai.address import BaseUrl
    from engine_plugin.engines.openai.servers.base import Ask

__all__ = ["services_of_routes"]


async def services_of_routes(ask: Ask, base: BaseUrl) -> frozenset[str] | None:
    """The services; None when the server publishes no routes, or not those of its interface."""
    told = await ask("/openapi.json")
    routes = told.get("paths") if isinstance(told, dict) else None
    if not isinstance(routes, dict):
        return None
    found = {service for service, path in PATHS.items() if f"{base.version}{path}" in routes}
    if "speech-to-text" in found:
        found.add("speech-to-text-ws")
    return frozenset(found) or None
