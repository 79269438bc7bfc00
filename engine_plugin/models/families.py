"""A table of families of models, for models about which engine and file say too little.

The lengths are those of the first models of a family, as published by their makers.
"""

from __future__ import annotations

import re

from engine_plugin.models.info import ModelCapabilities

__all__ = ["ESTIMATES", "FAMILIES", "LEAST", "estimated_context", "family_of", "parameters_of"]


_ROWS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("llama2", 4_096, ()),
    ("bakllava, llava", 4_096, ("vision",)),
    ("gemma2, llama3", 8_192, ()),
    ("codegemma", 8_192, ("insert",)),
    ("minicpm-v, moondream", 8_192, ("vision",)),
    ("codellama, phi4", 16_384, ()),
    ("starcoder2", 16_384, ("insert",)),
    ("mistral, mixtral", 32_768, ()),
    ("gemma3, phi3, phi3.5, qwen2", 131_072, ()),
    ("deepseek-coder-v2", 131_072, ("insert",)),
    ("deepseek-r1, qwq", 131_072, ("thinking",)),
    ("command-r, devstral, glm-4, llama3.1, llama3.2, llama3.3, mistral-large", 131_072, ("tools",)),
    ("mistral-nemo, mistral-small, qwen2.5", 131_072, ("tools",)),
    ("qwen2.5-coder", 131_072, ("tools", "insert")),
    ("qwen3", 131_072, ("tools", "thinking")),
    ("llama3.2-vision", 131_072, ("vision",)),
    ("codestral", 262_144, ("insert",)),
    ("kimi-k2, qwen3-coder", 262_144, ("tools",)),
)
"""Families, their context length in tokens, and their features besides completion: the table in docs/models.md."""

FAMILIES = {
    name: ModelCapabilities(features, context) for names, context, features in _ROWS for name in names.split(", ")
}

ESTIMATES = ((70e9, 131_072), (30e9, 65_536), (13e9, 32_768), (7e9, 16_384))
"""Numbers of parameters, and the context length that is estimated from each on."""

LEAST = 8_192
"""The estimate for fewer parameters."""

_JOINT = re.compile(r"(?<=[a-z])[-_ ](?=\d)")
_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,6}(?:\.\d{1,4})?) ?([kmbt])(?![a-z0-9])")
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_MAKERS = re.compile(r"^(?:meta|deepmind|google|microsoft|mistralai)[-_](?=llama|gemma|phi|mi[sx]tral)")


def _plain(name: str) -> str:
    """A name in the form of the table: `meta-llama/Llama-3.1-8B` becomes `llama3.1-8b`."""
    last = name.rstrip("/").rpartition("/")[2].casefold()
    return _JOINT.sub("", _MAKERS.sub("", last))


_PLAIN = {_plain(key): family for key, family in FAMILIES.items()}


def family_of(*names: str) -> ModelCapabilities | None:
    """The family whose key is the longest prefix of one of the names (of a model, of its architecture)."""
    best = ""
    for name in map(_plain, names):
        for key in _PLAIN:
            if len(key) > len(best) and name.startswith(key) and not _goes_on(key, name[len(key) :]):
                best = key
    return _PLAIN.get(best)


def _goes_on(key: str, rest: str) -> bool:
    """Whether the number at the end of the key goes on in the name: llama30b is not a llama3."""
    return key[-1].isdigit() and rest[:1].isdigit()


def parameters_of(text: str) -> float:
    """The number of parameters in a size or a name, such as `7.6B`, `8x7B` or `llama3:70b-q4_0`; 0 without one."""
    found = _PARAMETERS.search(text.casefold())
    if found is None:
        return 0.0
    return int(found[1] or 1) * float(found[2]) * _UNITS[found[3]]


def estimated_context(parameters: float) -> int:
    """An estimate of the context length (tokens) of a model with so many parameters; 0 if their number is unknown."""
    if parameters <= 0:
        return 0
    return next((context for least, context in ESTIMATES if parameters >= least), LEAST)
