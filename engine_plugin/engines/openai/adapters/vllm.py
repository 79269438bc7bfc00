"""vLLM and servers based on it, such as Ray Serve's LLM deployments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.adapters.base import (
    Probe,
    ServerAdapter,
    ServerInfo,
    ServerModel,
    number_of,
    text_of,
)
from engine_plugin.engines.openai.adapters.routes import services_of_routes
from engine_plugin.models.info import Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["VllmAdapter"]


class VllmAdapter(ServerAdapter):
    """Its list of models has the context lengths; all models are loaded."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    start: ClassVar[str] = "vllm serve MODEL"
    unlimited_tokens: ClassVar[tuple[int | None, ...]] = (None,)  # the default is 16 tokens

    def matches(self, probe: Probe) -> bool:
        if probe.base.version == "/v3":  # the embedded server uses the same key
            return False
        return any(text_of(entry, "owned_by") == "vllm" or "max_model_len" in entry for entry in probe.models)

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        reported = await probe.fetch_json("/version")
        version = text_of(reported, "version") if isinstance(reported, dict) else ""
        return ServerInfo(
            tuple(_found(entry) for entry in probe.models),
            version,
            await services_of_routes(probe.fetch_json, probe.base),
        )


def _found(entry: Mapping[str, Any]) -> ServerModel:
    context = number_of(entry, "max_model_len")
    return ServerModel.of(entry, engine=Capabilities((), context), loaded=Loaded(context_length=context))
