"""vLLM and servers based on it, such as Ray Serve's LLM deployments."""

from __future__ import annotations

from typing import ClassVar

from engine_plugin.engines.openai.adapters.base import Probe, Reported, ServerAdapter, ServerInfo
from engine_plugin.models.info import Loaded, ModelCapabilities, ModelInfo

__all__ = ["VllmAdapter"]


class VllmAdapter(ServerAdapter):
    """Its list of models has the context lengths; all models are loaded."""

    name: ClassVar[str] = "vllm"
    title: ClassVar[str] = "vLLM"
    start: ClassVar[str] = "vllm serve MODEL"
    holds_connections: ClassVar[bool] = True
    unlimited_tokens: ClassVar[tuple[int | None, ...]] = (None,)  # the default is 16 tokens

    def matches(self, probe: Probe) -> bool:
        if probe.base.version == "/v3":  # the embedded server uses the same key
            return False
        return probe.is_owner("vllm") or any("max_model_len" in entry for entry in probe.models)

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        version = (await probe.fetch("/version")).text("version")
        return ServerInfo([_found(entry) for entry in probe.models], version, await probe.services())


def _found(entry: Reported) -> ModelInfo:
    context = entry.number("max_model_len")
    return entry.model(capabilities=ModelCapabilities((), context), loaded=Loaded(context_length=context))
