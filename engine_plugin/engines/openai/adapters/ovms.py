"""OVMS and the embedded server, which both serve the API below /v3."""

from __future__ import annotations

from typing import Any, ClassVar

from engine_plugin.engines.openai.adapters.base import Probe, Reported, ServerAdapter, ServerInfo
from engine_plugin.models.info import KINDS, Loaded, ModelCapabilities, ModelInfo

__all__ = ["OvmsAdapter"]


class OvmsAdapter(ServerAdapter):
    """All its models are loaded."""

    name: ClassVar[str] = "ovms"
    title: ClassVar[str] = "the OpenVINO Model Server"
    start: ClassVar[str] = "ovms --rest_port 8000 --config_path config.json"
    holds_connections: ClassVar[bool] = True
    form_fields: ClassVar[dict[str, str]] = {}
    ignores: ClassVar[frozenset[str]] = frozenset({"suffix"})
    reads_wav_only: ClassVar[bool] = True

    def matches(self, probe: Probe) -> bool:
        return probe.base.version == "/v3" or probe.is_owner("OVMS")

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        version = (await probe.fetch("/v2")).text("version")
        return ServerInfo([_found(entry) for entry in probe.models], version)

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:
        if service == "text-to-image":
            body.pop("response_format", None)  # it always returns base64
            if "seed" in body:
                seed = body.pop("seed")
                body.setdefault("rng_seed", seed)
        return stream


def _found(entry: Reported) -> ModelInfo:
    """The embedded server reports kind, capabilities and context length; OVMS does not."""
    kind, context = entry.text("kind"), entry.number("max_model_len")
    features = tuple(word for word in entry.items_of("capabilities") if isinstance(word, str))
    return entry.model(
        kind=kind if kind in KINDS else "",
        capabilities=ModelCapabilities(features, context),
        loaded=Loaded(context_length=context),
    )
