"""llama.cpp's llama-server, which serves one model and describes it at /props."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from engine_plugin.engines.openai.adapters.base import (
    Probe,
    ServerAdapter,
    ServerInfo,
    ServerModel,
    kind_by_name,
    number_of,
    text_of,
)
from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.info import Capabilities, Loaded

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["LlamaServerAdapter"]

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


class LlamaServerAdapter(ServerAdapter):
    """The reported context length is that of a slot."""

    name: ClassVar[str] = "llama-server"
    title: ClassVar[str] = "llama-server"
    start: ClassVar[str] = "llama-server -m MODEL.gguf --port 8080"
    raw_scores: ClassVar[bool] = True
    detects_disconnect: ClassVar[bool] = False
    ignored_event: ClassVar[bytes] = b"data: null\n\n"
    ignores: ClassVar[frozenset[str]] = frozenset({"suffix", "echo"})
    unlimited_tokens: ClassVar[tuple[int | None, ...]] = (-1,)

    def matches(self, probe: Probe) -> bool:
        return any(text_of(entry, "owned_by") == "llamacpp" for entry in probe.models)

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        props = await probe.fetch_json("/props")
        props = props if isinstance(props, dict) else {}
        return ServerInfo(tuple(_found(entry, props) for entry in probe.models), text_of(props, "build_info"))


def _found(entry: Mapping[str, Any], props: Mapping[str, Any]) -> ServerModel:
    meta = entry.get("meta")
    meta = meta if isinstance(meta, dict) else {}
    settings = props.get("default_generation_settings")
    context = number_of(settings, "n_ctx") if isinstance(settings, dict) else 0
    count = number_of(meta, "n_params")
    chats = kind_by_name(text_of(entry, "id")) == "chat"  # models of other kinds can have a chat template too
    features = _features(props) if chats else ()
    return ServerModel.of(
        entry,
        size=number_of(meta, "size"),
        format="gguf",
        parameter_size=_parameters(count),
        engine=Capabilities(features, context or number_of(meta, "n_ctx_train")),
        loaded=Loaded(context_length=context),
    )


def _features(props: Mapping[str, Any]) -> tuple[str, ...]:
    template, senses = props.get("chat_template"), props.get("modalities")
    if not isinstance(template, str) or not template:
        return ()
    heard = [name for name in ("vision", "audio") if isinstance(senses, dict) and senses.get(name) is True]
    return (*features_of_template(template), *heard)


def _parameters(count: int) -> str:
    return next((f"{count / unit:.3g}{name}" for unit, name in _UNITS if count >= unit), "")
