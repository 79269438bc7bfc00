"""OVMS and the embedded server, which both serve the API below /v3."""

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
from engine_plugin.models.info import KINDS, Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["OvmsAdapter"]


class OvmsAdapter(ServerAdapter):
    """All its models are loaded."""

    name: ClassVar[str] = "ovms"
    title: ClassVar[str] = "the OpenVINO Model Server"
    start: ClassVar[str] = "ovms --rest_port 8000 --config_path config.json"
    form_fields: ClassVar[Mapping[str, str]] = {}
    ignores: ClassVar[frozenset[str]] = frozenset({"suffix"})
    reads_wav_only: ClassVar[bool] = True

    def matches(self, probe: Probe) -> bool:
        return probe.base.version == "/v3" or any(text_of(entry, "owned_by") == "OVMS" for entry in probe.models)

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        reported = await probe.fetch_json("/v2")
        version = text_of(reported, "version") if isinstance(reported, dict) else ""
        return ServerInfo(tuple(_found(entry) for entry in probe.models), version)

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:
        if service == "text-to-image":
            body.pop("response_format", None)  # it always returns base64
            if "seed" in body:
                seed = body.pop("seed")
                body.setdefault("rng_seed", seed)
        return stream


def _found(entry: Mapping[str, Any]) -> ServerModel:
    """The embedded server reports kind, capabilities and context length; OVMS does not."""
    kind, given, context = text_of(entry, "kind"), entry.get("capabilities"), number_of(entry, "max_model_len")
    features = tuple(word for word in given if isinstance(word, str)) if isinstance(given, list) else ()
    return ServerModel.of(
        entry,
        kind=kind if kind in KINDS else "",
        engine=Capabilities(features, context),
        loaded=Loaded(context_length=context),
    )
