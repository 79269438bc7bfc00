"""Every other server: what its routes say, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.servers.base import Found, Glance, Seen, Server, number_of
from engine_plugin.engines.openai.servers.routes import services_of_routes
from engine_plugin.models.info import Capabilities

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Other"]

_CONTEXTS = ("max_model_len", "context_length", "context_window", "max_context_length")
"""What servers and gateways call the tokens of a model's context."""


class Other(Server):
    """Taken when no other kind is recognised."""

    name: ClassVar[str] = "other"

    async def look(self, glance: Glance) -> Seen | None:
        able = await services_of_routes(glance.ask, glance.base) if glance.base.scheme == "http" else None
        return Seen(tuple(_found(entry) for entry in glance.models), able=able)


def _found(entry: Mapping[str, Any]) -> Found:
    context = next((number for name in _CONTEXTS if (number := number_of(entry, name))), 0)
    return Found.of(entry, engine=Capabilities((), context) if context else None)
