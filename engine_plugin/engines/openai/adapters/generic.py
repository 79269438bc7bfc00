"""Any other server, described by its routes if it publishes them."""

from __future__ import annotations

from typing import ClassVar

from engine_plugin.engines.openai.adapters.base import Probe, Reported, ServerAdapter, ServerInfo
from engine_plugin.models.info import ModelCapabilities, ModelInfo

__all__ = ["GenericAdapter"]

_CONTEXTS = ("max_model_len", "context_length", "context_window", "max_context_length")
"""The names of the context length in servers and gateways."""


class GenericAdapter(ServerAdapter):
    """The fallback for unidentified servers."""

    name: ClassVar[str] = "other"

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        services = await probe.services() if probe.base.scheme == "http" else None
        return ServerInfo([_found(entry) for entry in probe.models], services=services)


def _found(entry: Reported) -> ModelInfo:
    context = next((number for name in _CONTEXTS if (number := entry.number(name))), 0)
    return entry.model(capabilities=ModelCapabilities((), context))
