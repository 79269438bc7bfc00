"""LM Studio, whose own API reports the type, the context length and the state of each model."""

from __future__ import annotations

from typing import ClassVar

from engine_plugin.engines.openai.adapters.base import Probe, Reported, ServerAdapter, ServerInfo
from engine_plugin.models.info import Loaded, ModelCapabilities, ModelDescription, ModelInfo

__all__ = ["LmStudioAdapter"]

_KINDS = {"llm": "chat", "vlm": "chat", "embeddings": "embed", "tts": "text-to-speech", "stt": "speech-to-text"}
_SERVICES = frozenset({"chat", "generate", "embed"})


class LmStudioAdapter(ServerAdapter):
    """Its OpenAI API reports little about models, its own API much."""

    name: ClassVar[str] = "lmstudio"
    title: ClassVar[str] = "LM Studio"
    start: ClassVar[str] = "lms server start"
    holds_connections: ClassVar[bool] = True
    loads_on_demand: ClassVar[bool] = True
    unlimited_tokens: ClassVar[tuple[int | None, ...]] = (-1,)

    def matches(self, probe: Probe) -> bool:
        return probe.base.port == 1234 or probe.is_owner("organization_owner")

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        reported = await probe.fetch("/api/v0/models")
        if not isinstance(reported.get("data"), list):
            return None
        known = {entry.text("id"): entry for entry in reported.objects_of("data")}
        models = [_found(entry, known.get(entry.text("id"), Reported())) for entry in probe.models]
        return ServerInfo(models, services=_SERVICES)


def _found(entry: Reported, reported: Reported) -> ModelInfo:
    kind, longest = reported.text("type"), reported.number("max_context_length")
    features = ["vision"] if kind == "vlm" else []
    if "tool_use" in reported.items_of("capabilities"):
        features.append("tools")
    family, quantization = reported.text("arch"), reported.text("quantization")
    families = (family,) if family else ()
    context = reported.number("loaded_context_length") or longest
    return entry.model(
        kind=_KINDS.get(kind, ""),
        details=ModelDescription(
            reported.text("compatibility_type"), family, families, quantization_level=quantization
        ),
        capabilities=ModelCapabilities(tuple(features), longest),
        loaded=Loaded(context_length=context) if reported.text("state") == "loaded" else None,
    )
