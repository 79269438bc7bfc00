"""Detects the services of a server by the routes that it publishes (openapi.json, as FastAPI writes it)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.engines.openai.requests import PATHS

if TYPE_CHECKING:
    from engine_plugin.engines.openai.adapters.base import FetchJson
    from engine_plugin.engines.openai.address import BaseUrl

__all__ = ["services_of_routes"]


async def services_of_routes(fetch_json: FetchJson, base: BaseUrl) -> frozenset[str] | None:
    """The services by the routes in the server's openapi.json (FastAPI); None without routes of its API."""
    reported = await fetch_json("/openapi.json")
    routes = reported.get("paths") if isinstance(reported, dict) else None
    if not isinstance(routes, dict):
        return None
    found = {service for service, path in PATHS.items() if f"{base.version}{path}" in routes}
    if "speech-to-text" in found:
        found.add("speech-to-text-ws")
    return frozenset(found) or None
