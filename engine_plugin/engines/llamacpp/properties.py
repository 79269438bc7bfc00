"""Parses the answer of GET /props, with which a llama.cpp server describes its model.

The keys are documented in llama.cpp's tools/server/README.md: `default_generation_settings.n_ctx`, `modalities`,
`chat_template_caps` and `chat_template`.
"""

from __future__ import annotations

import json
from typing import Any

from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.info import Capabilities
from engine_plugin.templates.jinja import Templates

__all__ = ["parse_properties"]


def parse_properties(body: bytes) -> tuple[Capabilities, Templates]:
    """The capabilities and the chat templates in an answer of /props. Missing or invalid values are left out."""
    try:
        shape = json.loads(body)
    except (ValueError, RecursionError):
        shape = None
    length = _part(_part(shape, "default_generation_settings"), "n_ctx")
    named = {"default": _part(shape, "chat_template"), "tool_use": _part(shape, "chat_template_tool_use")}
    tokens = {name: _part(shape, name) for name in ("bos_token", "eos_token")}
    capabilities = Capabilities(_features(shape), length if type(length) is int and length > 0 else 0)
    return capabilities, Templates(_texts(named), _texts(tokens))


def _texts(named: dict[str, Any]) -> dict[str, str]:
    return {name: text for name, text in named.items() if isinstance(text, str) and text}


def _features(shape: Any) -> tuple[str, ...]:
    template = _part(shape, "chat_template")
    if not isinstance(template, str):
        return ()
    features = set(features_of_template(template))
    uses_tools = _part(_part(shape, "chat_template_caps"), "supports_tools")  # llama.cpp's own test of the template
    if isinstance(uses_tools, bool):
        features = features | {"tools"} if uses_tools else features - {"tools"}
    modalities = _part(shape, "modalities")
    return (*sorted(features), *(sense for sense in ("vision", "audio") if _part(modalities, sense) is True))


def _part(shape: Any, key: str) -> Any:
    return shape.get(key) if isinstance(shape, dict) else None
