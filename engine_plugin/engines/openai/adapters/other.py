"""Any other server, described by its routes if it publishes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.adapters.base import Probe, ServerAdapter, ServerInfo, ServerModel, number_of
from engine_plugin.engines.openai.adapters.routes import services_of_routes
from engine_plugin.models.info import Capabilities

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["GenericAdapter"]

_CONTEXTS = ("max_model_len", "context_length", "context_window", "max_context_length")
"""The names of the context length in servers and gateways."""


class GenericAdapter(ServerAdapter):
    """The fallback for unidentified servers."""

    name: ClassVar[str] = "other"

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        services = await services_of_routes(probe.fetch_json, probe.base) if probe.base.scheme == "http" else None
        return ServerInfo(tuple(_found(entry) for entry in probe.models), services=services)


def _found(entry: Mapping[str, Any]) -> ServerModel:
    context = next((number for name in _CONTEXTS if (number := number_of(entry, name))), 0)
    return ServerModel.of(entry, engine=Capabilities((), context) if context else None)
