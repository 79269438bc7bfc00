"""The capabilities of a model: its features and its context length, from several sources.

The sources in their order: plugin.yaml, the engine, the model's own file, the table of families, and for the context
length an estimate from the number of parameters. Every engine calls `resolve`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Generic, TypeVar
from weakref import WeakValueDictionary

from engine_plugin.models.families import estimated_context, family_of, parameters_of
from engine_plugin.models.info import FEATURE_OF_KIND, FEATURES, ModelCapabilities

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from engine_plugin.models.info import ModelDescription

__all__ = [
    "DigestCache",
    "ModelOverride",
    "features_of_template",
    "override_for",
    "resolve",
    "told_by_file",
]

_LONGEST = 100_000_000


@dataclass(frozen=True, slots=True)
class ModelOverride:
    """One entry of `engine.models` in plugin.yaml, which overrides the capabilities of some models.

    Part of every engine's options.
    """

    name: str
    """A pattern for names, with `*` and `?`, which ignores case and `:latest`."""

    context_length: int = field(default=0, metadata={"min": 0, "max": _LONGEST})
    """In tokens; 0 for no override."""

    capabilities: tuple[str, ...] = field(default=(), metadata={"choices": FEATURES})
    """All features of the model; () for no override."""


def override_for(name: str, overrides: Iterable[ModelOverride]) -> ModelOverride | None:
    """The first entry whose pattern fits the name."""
    names = {name.casefold(), name.casefold().removesuffix(":latest")}
    for override in overrides:
        if any(fnmatchcase(one, override.name.casefold()) for one in names):
            return override
    return None


def resolve(
    name: str,
    family: str = "",
    parameter_size: str = "",
    *,
    kind: str = "chat",
    engine: ModelCapabilities | None = None,
    file: ModelCapabilities | None = None,
    overrides: Sequence[ModelOverride] = (),
) -> ModelCapabilities:
    """The capabilities of a model: features and context length, each from the first source that has it.

    `family` and `parameter_size` are those of its details ("" if unknown), `kind` is one of KINDS. The
    `context_source` of `engine` and `file` is ignored. The features always have that of the kind. Only a chat model
    has the context length of a family or an estimate.
    """
    override = override_for(name, overrides)
    configured = None if override is None else ModelCapabilities(override.capabilities, override.context_length)
    sources = {"configuration": configured, "engine": engine, "file": file}
    if kind == "chat":
        size = parameters_of(parameter_size) or parameters_of(name)
        sources |= {"family": family_of(name, family), "estimate": ModelCapabilities((), estimated_context(size))}
    known = {source: reported for source, reported in sources.items() if reported is not None}
    features = next((reported.features for reported in known.values() if reported.features), ())
    source = next((source for source, reported in known.items() if reported.context_length > 0), "")
    length = known[source].context_length if source else 0
    return ModelCapabilities(_ordered({*features, FEATURE_OF_KIND.get(kind, "completion")}), length, source)


def _ordered(features: Iterable[str]) -> tuple[str, ...]:
    """The features in the order of FEATURES, without unknown words."""
    given = set(features)
    return tuple(feature for feature in FEATURES if feature in given)


def told_by_file(kind: str, details: ModelDescription) -> ModelCapabilities:
    """The capabilities that an inspection wrote into `details.extra`: features as booleans, and `context_length`."""
    reported = {
        feature: details.extra[feature] for feature in FEATURES if isinstance(details.extra.get(feature), bool)
    }
    features = {FEATURE_OF_KIND.get(kind, "completion"), *(feature for feature, has in reported.items() if has)}
    length = details.extra.get("context_length")
    return ModelCapabilities(
        _ordered(features) if reported else (), length if type(length) is int and length > 0 else 0
    )


_THINKING_MARKS = ("<think>", "</think>", "enable_thinking", "reasoning_content", "<|channel|>analysis")
_TOOL_MARKS = ("tools", "tool_calls")


def features_of_template(template: str) -> tuple[str, ...]:
    """The features that a chat template (Jinja) supports: completion, and possibly tools and thinking.

    The template is searched, not rendered. Without one ("") a model has completion.
    """
    found = {"completion"}
    if any(mark in template for mark in _TOOL_MARKS):
        found.add("tools")
    if any(mark in template for mark in _THINKING_MARKS):
        found.add("thinking")
    return _ordered(found)


T = TypeVar("T")


class DigestCache(Generic[T]):
    """A cache of answers about models: kept while the digest stays the same, or for `ttl` seconds without a digest.

    Concurrent callers share one question; after a failure the next caller asks again. Used from one event loop.
    """

    def __init__(self, ttl: float = 300.0, limit: int = 1000, clock: Callable[[], float] = time.monotonic) -> None:
        """Keeps the `limit` most recently used models. `clock` returns seconds."""
        self._clock = clock
        self._ttl = ttl
        self._limit = limit
        self._known: OrderedDict[tuple[str, str], tuple[float, T]] = OrderedDict()
        self.asking: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()
        """The questions that run now; each lock goes with its last caller."""

    async def get(self, name: str, digest: str, ask: Callable[[], Awaitable[T]]) -> T:
        """The cached answer, else the result of `ask`. Raises what `ask` raises."""
        key = (name, digest)
        if (known := self._fresh(key)) is not None:
            return known[1]
        async with self.asking.setdefault(key, asyncio.Lock()):
            if (known := self._fresh(key)) is not None:
                return known[1]
            value = await ask()
            self._keep(key, value)
            return value

    def put(self, name: str, digest: str, value: T) -> None:
        """Add an answer that was found without a question."""
        self._keep((name, digest), value)

    def peek(self, name: str, digest: str) -> T | None:
        """The cached answer, or None."""
        known = self._fresh((name, digest))
        return None if known is None else known[1]

    def forget(self) -> None:
        """Drop all answers. Called when another server may have the same names."""
        self._known.clear()

    def _fresh(self, key: tuple[str, str]) -> tuple[float, T] | None:
        known = self._known.get(key)
        if known is None or (not key[1] and self._clock() - known[0] >= self._ttl):
            return None
        self._known.move_to_end(key)
        return known

    def _keep(self, key: tuple[str, str], value: T) -> None:
        self._known[key] = (self._clock(), value)
        self._known.move_to_end(key)
        while len(self._known) > self._limit:
            self._known.popitem(last=False)
