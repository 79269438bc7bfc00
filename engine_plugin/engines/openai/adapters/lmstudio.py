"""LM Studio, whose own API reports the type, the context length and the state of each model."""

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
from engine_plugin.models.info import Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LmStudioAdapter"]

_KINDS = {"llm": "chat", "vlm": "chat", "embeddings": "embed", "tts": "text-to-speech", "stt": "speech-to-text"}
_SERVICES = frozenset({"chat", "generate", "embed"})


class LmStudioAdapter(ServerAdapter):
    """Its OpenAI API reports little about models, its own API much."""

    name: ClassVar[str] = "lmstudio"
    title: ClassVar[str] = "LM Studio"
    start: ClassVar[str] = "lms server start"
    loads_on_demand: ClassVar[bool] = True
    unlimited_tokens: ClassVar[tuple[int | None, ...]] = (-1,)

    def matches(self, probe: Probe) -> bool:
        return probe.base.port == 1234 or any(
            text_of(entry, "owned_by") == "organization_owner" for entry in probe.models
        )

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        reported = await probe.fetch_json("/api/v0/models")
        entries = reported.get("data") if isinstance(reported, dict) else None
        if not isinstance(entries, list):
            return None
        known = {text_of(entry, "id"): entry for entry in entries if isinstance(entry, dict)}
        return ServerInfo(
            tuple(_found(entry, known.get(text_of(entry, "id"), {})) for entry in probe.models), services=_SERVICES
        )


def _found(entry: Mapping[str, Any], reported: Mapping[str, Any]) -> ServerModel:
    kind, longest = text_of(reported, "type"), number_of(reported, "max_context_length")
    given = reported.get("capabilities")
    features = ["vision"] if kind == "vlm" else []
    if isinstance(given, list) and "tool_use" in given:
        features.append("tools")
    here = text_of(reported, "state") == "loaded"
    return ServerModel.of(
        entry,
        kind=_KINDS.get(kind, ""),
        format=text_of(reported, "compatibility_type"),
        family=text_of(reported, "arch"),
        quantization=text_of(reported, "quantization"),
        engine=Capabilities(tuple(features), longest),
        loaded=Loaded(context_length=number_of(reported, "loaded_context_length") or longest) if here else None,
    )
