"""The models of llama.cpp: GGUF files, whose headers the runner reads in a process of its own.

A damaged or malicious file then cannot exhaust the plugin's memory or crash it, and the plugin needs no numpy.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.llamacpp.runner import TEMPLATE_TIMEOUT
from engine_plugin.errors import PullError
from engine_plugin.models.capabilities import features_of_template
from engine_plugin.models.store import Inspection, ModelDetails, ModelStore, bundled_samples
from engine_plugin.process import python
from engine_plugin.system.sizes import parameter_size

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.engines.llamacpp.software import LlamaCppSoftware

__all__ = ["kind_of", "model_store"]

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
    details = ModelDetails(
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
