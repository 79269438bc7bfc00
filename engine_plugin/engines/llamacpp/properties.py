"""What a llama.cpp server says of the model that it serves: the answer of GET /props.

Its keys are llama.cpp's (tools/server/README.md): `default_generation_settings.n_ctx`, `modalities`,
`chat_template_caps` and `chat_template`.
"""

from __future__ import annotations

from typing import Any

from engine_plugin.jsontext import json_object
from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.info import Capabilities
from engine_plugin.templates.jinja import Templates

__all__ = ["capabilities_told", "templates_told"]


def capabilities_told(body: bytes) -> Capabilities:
    """What an answer of /props says; what is not in it, or is not understood, is not said."""
    shape = json_object(body)
    length = _part(_part(shape, "default_generation_settings"), "n_ctx")
    return Capabilities(_features(shape), length if type(length) is int and length > 0 else 0)


def templates_told(body: bytes) -> Templates:
    """The chat templates in an answer of /props."""
    shape = json_object(body)
    named = {"default": _part(shape, "chat_template"), "tool_use": _part(shape, "chat_template_tool_use")}
    tokens = {name: _part(shape, name) for name in ("bos_token", "eos_token")}
    return Templates(_texts(named), _texts(tokens))


def _texts(named: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in named.items() if isinstance(text, str) and text}


def _features(shape: Any) -> tuple[str, ...]:
    template = _part(shape, "chat_template")
    if not isinstance(template, str):
        return ()
    features = set(features_of_template(template))
    uses_tools = _part(_part(shape, "chat_template_caps"), "supports_tools")  # its own look at how tools are rendered
    if isinstance(uses_tools, bool):
        features = features | {"tools"} if uses_tools else features - {"tools"}
    modalities = _part(shape, "modalities")
    return (*sorted(features), *(sense for sense in ("vision", "audio") if _part(modalities, sense) is True))


def _part(shape: Any, key: str) -> Any:
    return shape.get(key) if isinstance(shape, dict) else None
