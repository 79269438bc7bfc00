"""A table of families of models, for models about which engine and file say too little.

The lengths are those of the first models of a family, as published by their makers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Family", "estimated_context", "family_of", "parameters_of"]


@dataclass(frozen=True, slots=True)
class Family:
    """The context length of a family in tokens, and its features besides completion (words of FEATURES)."""

    context_length: int
    features: tuple[str, ...] = ()


_TOOLS = ("tools",)
_THINKING = ("thinking",)
_VISION = ("vision",)

_FAMILIES = {
    "bakllava": Family(4_096, _VISION),
    "codegemma": Family(8_192, ("insert",)),
    "codellama": Family(16_384),
    "codestral": Family(262_144, ("insert",)),
    "command-r": Family(131_072, _TOOLS),
    "deepseek-coder-v2": Family(131_072, ("insert",)),
    "deepseek-r1": Family(131_072, _THINKING),
    "devstral": Family(131_072, _TOOLS),
    "gemma2": Family(8_192),
    "gemma3": Family(131_072),
    "glm-4": Family(131_072, _TOOLS),
    "kimi-k2": Family(262_144, _TOOLS),
    "llama2": Family(4_096),
    "llama3": Family(8_192),
    "llama3.1": Family(131_072, _TOOLS),
    "llama3.2": Family(131_072, _TOOLS),
    "llama3.2-vision": Family(131_072, _VISION),
    "llama3.3": Family(131_072, _TOOLS),
    "llava": Family(4_096, _VISION),
    "minicpm-v": Family(8_192, _VISION),
    "mistral": Family(32_768),
    "mistral-large": Family(131_072, _TOOLS),
    "mistral-nemo": Family(131_072, _TOOLS),
    "mistral-small": Family(131_072, _TOOLS),
    "mixtral": Family(32_768),
    "moondream": Family(8_192, _VISION),
    "phi3": Family(131_072),
    "phi3.5": Family(131_072),
    "phi4": Family(16_384),
    "qwen2": Family(131_072),
    "qwen2.5": Family(131_072, _TOOLS),
    "qwen2.5-coder": Family(131_072, ("tools", "insert")),
    "qwen3": Family(131_072, ("tools", "thinking")),
    "qwen3-coder": Family(262_144, _TOOLS),
    "qwq": Family(131_072, _THINKING),
    "starcoder2": Family(16_384, ("insert",)),
}

_ESTIMATES = ((70e9, 131_072), (30e9, 65_536), (13e9, 32_768), (7e9, 16_384))
_LEAST = 8_192

_JOINT = re.compile(r"(?<=[a-z])[-_ ](?=\d)")
_PARAMETERS = re.compile(r"(?<![a-z0-9.])(?:(\d{1,3})x)?(\d{1,6}(?:\.\d{1,4})?) ?([kmbt])(?![a-z0-9])")
_UNITS = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_MAKERS = re.compile(r"^(?:meta|deepmind|google|microsoft|mistralai)[-_](?=llama|gemma|phi|mi[sx]tral)")


def _plain(name: str) -> str:
    """A name in the form of the table: `meta-llama/Llama-3.1-8B` becomes `llama3.1-8b`."""
    last = name.rstrip("/").rpartition("/")[2].casefold()
    return _JOINT.sub("", _MAKERS.sub("", last))


_PLAIN = {_plain(key): family for key, family in _FAMILIES.items()}


def family_of(*names: str) -> Family | None:
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
    return next((context for least, context in _ESTIMATES if parameters >= least), _LEAST)
