"""What is known of families of models by their names, for models of which neither engine nor file says enough.

The lengths are those that the makers give for the first models of a family, in tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["Family", "estimated_context", "family_of", "parameters_of"]


@dataclass(frozen=True, slots=True)
class Family:
    """The context of a family's models in tokens, and what they can do beside completing (words of FEATURES)."""

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
    """A name as the table has it: without the owner before it, `Llama-3.1-8B` being `llama3.1-8b`."""
    last = name.rstrip("/").rpartition("/")[2].casefold()
    return _JOINT.sub("", _MAKERS.sub("", last))


_PLAIN = {_plain(key): family for key, family in _FAMILIES.items()}


def family_of(*names: str) -> Family | None:
    """The family of a model by what it, or its architecture, is called; the longest prefix in the table wins."""
    best = ""
    for name in map(_plain, names):
        for key in _PLAIN:
            if len(key) > len(best) and name.startswith(key) and not _goes_on(key, name[len(key) :]):
                best = key
    return _PLAIN.get(best)


def _goes_on(key: str, rest: str) -> bool:
    """Whether the name has another number there than the key: llama30b is no llama3."""
    return key[-1].isdigit() and rest[:1].isdigit()


def parameters_of(text: str) -> float:
    """The number of parameters that a size or a name tells, 0 for none: of `7.6B`, `8x7B`, `llama3:70b-q4_0`."""
    found = _PARAMETERS.search(text.casefold())
    if found is None:
        return 0.0
    return int(found[1] or 1) * float(found[2]) * _UNITS[found[3]]


def estimated_context(parameters: float) -> int:
    """What context (tokens) a model of so many parameters most likely has, 0 when their number is not known."""
    if parameters <= 0:
        return 0
    return next((context for least, context in _ESTIMATES if parameters >= least), _LEAST)
