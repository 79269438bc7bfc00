"""vLLM, and what is built upon it, such as Ray Serve's LLM deployments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.servers.base import Found, Glance, Seen, Server, number_of, text_of
from engine_plugin.engines.openai.servers.routes import services_of_routes
from engine_plugin.models.info import Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["VLlm"]


class VLlm(Server):
    """Its list of models tells their context; all of them are in memory."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    start: ClassVar[str] = "vllm serve MODEL"
    no_limit: ClassVar[tuple[int | None, ...]] = (None,)  # a completion without the field has 16 tokens

    def may_be(self, glance: Glance) -> bool:
        if glance.base.version == "/v3":  # our own server tells contexts by the same key
            return False
        return any(text_of(entry, "owned_by") == "vllm" or "max_model_len" in entry for entry in glance.models)

    async def look(self, glance: Glance) -> Seen | None:
        told = await glance.ask("/version")
        version = text_of(told, "version") if isinstance(told, dict) else ""
        return Seen(
            tuple(_found(entry) for entry in glance.models),
            version,
            await services_of_routes(glance.ask, glance.base),
        )


def _found(entry: Mapping[str, Any]) -> Found:
    context = number_of(entry, "max_model_len")
    return Found.of(entry, engine=Capabilities((), context), loaded=Loaded(context_length=context))
