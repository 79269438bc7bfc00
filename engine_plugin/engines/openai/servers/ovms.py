"""The OpenVINO Model Server, and this package's own server for OpenVINO, which answers alike: below /v3."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.servers.base import Found, Glance, Seen, Server, number_of, text_of
from engine_plugin.models.info import KINDS, Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Ovms"]


class Ovms(Server):
    """All its models are in memory."""

    name: ClassVar[str] = "ovms"
    title: ClassVar[str] = "the OpenVINO Model Server"
    start: ClassVar[str] = "ovms --rest_port 8000 --config_path config.json"
    form_fields: ClassVar[Mapping[str, str]] = {}
    ignores: ClassVar[frozenset[str]] = frozenset({"suffix"})
    reads_wav_only: ClassVar[bool] = True

    def may_be(self, glance: Glance) -> bool:
        return glance.base.version == "/v3" or any(text_of(entry, "owned_by") == "OVMS" for entry in glance.models)

    async def look(self, glance: Glance) -> Seen | None:
        told = await glance.ask("/v2")
        version = text_of(told, "version") if isinstance(told, dict) else ""
        return Seen(tuple(_found(entry) for entry in glance.models), version)

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:
        if service == "text-to-image":
            body.pop("response_format", None)  # it gives base64 and knows no field for that
            if "seed" in body:
                seed = body.pop("seed")
                body.setdefault("rng_seed", seed)
        return stream


def _found(entry: Mapping[str, Any]) -> Found:
    """Our own server says what a model is for, what it can do and how long its context is; OVMS does not."""
    kind, given, context = text_of(entry, "kind"), entry.get("capabilities"), number_of(entry, "max_model_len")
    features = tuple(word for word in given if isinstance(word, str)) if isinstance(given, list) else ()
    return Found.of(
        entry,
        kind=kind if kind in KINDS else "",
        engine=Capabilities(features, context),
        loaded=Loaded(context_length=context),
    )
