"""The models of llama.cpp: GGUF files, whose headers the runner reads, and what a server tells of the one it serves.

The runner is a process of its own: a damaged or malicious file cannot exhaust the plugin's memory or crash it, and
the plugin needs no numpy. A server describes its model in the answer to GET /props, of which llama.cpp's
tools/server/README.md documents the keys.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.llamacpp.runner import TEMPLATE_TIMEOUT
from engine_plugin.errors import PullError
from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.info import ModelCapabilities
from engine_plugin.models.store import Inspection, ModelDescription, ModelStore, bundled_samples
from engine_plugin.process import python
from engine_plugin.system.sizes import parameter_size
from engine_plugin.templates.jinja import Templates

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.engines.llamacpp.software import LlamaCppSoftware

__all__ = ["kind_of", "model_store", "parse_properties"]

_INSPECT_TIMEOUT = 60.0
_SIGALRM = 14
# Encoder-only architectures, whose embedders may lack a pooling type in the header.
_ENCODERS = ("bert", "nomic-bert", "jina-bert", "modern-bert", "neo-bert", "eurobert", "t5encoder", "gemma-embedding")


def model_store(root: Path, software: LlamaCppSoftware) -> ModelStore:
    """The store of GGUF models below `root`, with the bundled samples."""

    async def inspect(path: Path) -> Inspection:
        check = software.check()
        if not check.installed:
            raise catalogue.ENGINE_NOT_INSTALLED.error(found=f"{check.detail}, and reading a model needs it")
        argv, environ = software.helper("inspect")
        asked = json.dumps({"path": str(path)}).encode() + b"\n"
        status, out, err = await python.run_briefly(argv, environ, asked, _INSPECT_TIMEOUT)
        if status != 0:
            reason = err.decode("utf-8", "replace").strip().rpartition("\n")[2].removeprefix("E ")
            if status == -_SIGALRM:
                reason = f"its chat template takes more than {TEMPLATE_TIMEOUT} s to render one word"
            name = path.name.removesuffix(".part")  # of a running pull
            raise PullError(f"{name} is not a model that llama.cpp can load: {reason or f'exit code {status}'}")
        return _inspection(json.loads(out))

    return ModelStore(root, suffix=".gguf", samples=bundled_samples("gguf"), inspect=inspect)


def _inspection(header: dict[str, Any]) -> Inspection:
    kept = ("context_length", "embedding_length", "pooling", "parameters")
    kind = kind_of(header)
    template = header["chat_template"]
    extra = {key: header[key] for key in kept} | {"chat_template": template is not None}
    if kind == "chat" and template is not None:
        found = features_of_template(template + (header["tool_template"] or ""))
        extra |= {feature: feature in found for feature in ("tools", "thinking")}
    details = ModelDescription(
        format="gguf",
        family=header["architecture"],
        families=(header["architecture"],),
        parameter_size=parameter_size(header["parameters"]),
        quantization_level=header["quantization"],
        extra=extra,
    )
    return Inspection(kind, details)


def kind_of(header: dict[str, Any]) -> str:
    """The kind of a model: rerank with a classifier head, embed if pooled or encoder-only, else chat."""
    if header["pooling"] == "RANK":
        return "rerank"
    if header["pooling"] != "NONE" or not header["causal"] or header["architecture"].startswith(_ENCODERS):
        return "embed"
    return "chat"


def parse_properties(body: bytes) -> tuple[ModelCapabilities, Templates]:
    """The capabilities and the chat templates in an answer of /props. Missing or invalid values are left out."""
    try:
        shape = json.loads(body)
    except (ValueError, RecursionError):
        shape = None
    length = _part(_part(shape, "default_generation_settings"), "n_ctx")
    named = {"default": _part(shape, "chat_template"), "tool_use": _part(shape, "chat_template_tool_use")}
    tokens = {name: _part(shape, name) for name in ("bos_token", "eos_token")}
    capabilities = ModelCapabilities(_features(shape), length if type(length) is int and length > 0 else 0)
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
