"""LM Studio: its own interface beside OpenAI's tells each model's type, context and whether it is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.servers.base import Found, Glance, Seen, Server, number_of, text_of
from engine_plugin.models.info import Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LmStudio"]

_KINDS = {"llm": "chat", "vlm": "chat", "embeddings": "embed", "tts": "text-to-speech", "stt": "speech-to-text"}
_ABLE = frozenset({"chat", "generate", "embed"})


class LmStudio(Server):
    """Its OpenAI face says little of its models, its own one much."""

    name: ClassVar[str] = "lmstudio"
    title: ClassVar[str] = "LM Studio"
    start: ClassVar[str] = "lms server start"
    loads_when_asked: ClassVar[bool] = True
    no_limit: ClassVar[tuple[int | None, ...]] = (-1,)

    def may_be(self, glance: Glance) -> bool:
        return glance.base.port == 1234 or any(
            text_of(entry, "owned_by") == "organization_owner" for entry in glance.models
        )

    async def look(self, glance: Glance) -> Seen | None:
        told = await glance.ask("/api/v0/models")
        entries = told.get("data") if isinstance(told, dict) else None
        if not isinstance(entries, list):
            return None
        known = {text_of(entry, "id"): entry for entry in entries if isinstance(entry, dict)}
        return Seen(tuple(_found(entry, known.get(text_of(entry, "id"), {})) for entry in glance.models), able=_ABLE)


def _found(entry: Mapping[str, Any], told: Mapping[str, Any]) -> Found:
    kind, longest = text_of(told, "type"), number_of(told, "max_context_length")
    given = told.get("capabilities")
    features = ["vision"] if kind == "vlm" else []
    if isinstance(given, list) and "tool_use" in given:
        features.append("tools")
    here = text_of(told, "state") == "loaded"
    return Found.of(
        entry,
        kind=_KINDS.get(kind, ""),
        format=text_of(told, "compatibility_type"),
        family=text_of(told, "arch"),
        quantization=text_of(told, "quantization"),
        engine=Capabilities(tuple(features), longest),
        loaded=Loaded(context_length=number_of(told, "loaded_context_length") or longest) if here else None,
    )
