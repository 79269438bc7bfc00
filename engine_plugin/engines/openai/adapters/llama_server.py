"""llama.cpp's llama-server, which serves one model and describes it at /props."""

from __future__ import annotations

from typing import ClassVar

from engine_plugin.engines.openai.adapters.base import Probe, Reported, ServerAdapter, ServerInfo, kind_by_name
from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.info import Loaded, ModelCapabilities, ModelDescription, ModelInfo

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
        return probe.is_owner("llamacpp")

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        props = await probe.fetch("/props")
        return ServerInfo([_found(entry, props) for entry in probe.models], props.text("build_info"))


def _found(entry: Reported, props: Reported) -> ModelInfo:
    meta, context = entry.object("meta"), props.object("default_generation_settings").number("n_ctx")
    chats = kind_by_name(entry.text("id")) == "chat"  # models of other kinds can have a chat template too
    count = meta.number("n_params")
    size = next((f"{count / unit:.3g}{name}" for unit, name in _UNITS if count >= unit), "")
    return entry.model(
        size=meta.number("size"),
        details=ModelDescription("gguf", parameter_size=size),
        capabilities=ModelCapabilities(_features(props) if chats else (), context or meta.number("n_ctx_train")),
        loaded=Loaded(context_length=context),
    )


def _features(props: Reported) -> tuple[str, ...]:
    template, senses = props.get("chat_template"), props.object("modalities")
    if not isinstance(template, str) or not template:
        return ()
    return (*features_of_template(template), *(name for name in ("vision", "audio") if senses.get(name) is True))
