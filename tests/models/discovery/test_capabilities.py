"""Which source a capability comes from, and for how long it is cached."""

from __future__ import annotations

import asyncio
import gc

import pytest

from engine_plugin.models.capabilities import (
    DigestCache,
    ModelOverride,
    features_of_template,
    override_for,
    resolve,
    told_by_file,
)
from engine_plugin.models.info import FEATURE_OF_KIND, KINDS, ModelCapabilities, ModelDescription

ENGINE = ModelCapabilities(("tools",), 1000)
FILE = ModelCapabilities(("thinking",), 2000)
OVERRIDES = (ModelOverride("qwen3*", 3000, ("vision",)),)


def test_order_of_the_sources_of_capabilities() -> None:
    def found(
        name: str = "qwen3:8b",
        engine: ModelCapabilities | None = ENGINE,
        file: ModelCapabilities | None = FILE,
        overrides: tuple[ModelOverride, ...] = OVERRIDES,
    ) -> tuple[tuple[str, ...], int, str]:
        told = resolve(name, engine=engine, file=file, overrides=overrides)
        return told.features, told.context_length, told.context_source

    assert found() == (("completion", "vision"), 3000, "configuration")
    assert found(overrides=()) == (("completion", "tools"), 1000, "engine")
    assert found(overrides=(), engine=None) == (("completion", "thinking"), 2000, "file")
    assert found(overrides=(), engine=None, file=None) == (("completion", "tools", "thinking"), 131_072, "family")
    assert found("own:8b", None, None, ()) == (("completion",), 16_384, "estimate")
    assert found("own", None, None, ()) == (("completion",), 0, "")


def test_features_and_context_may_come_from_different_sources() -> None:
    told = resolve(
        "own",
        engine=ModelCapabilities((), 1000),
        file=ModelCapabilities(("tools",), 2000),
        overrides=(ModelOverride("own", capabilities=("thinking",)),),
    )
    assert told == ModelCapabilities(("completion", "thinking"), 1000, "engine")


def test_unknown_features_are_dropped_and_the_others_ordered() -> None:
    told = resolve("own", engine=ModelCapabilities(("vision", "telepathy", "tools", "completion")))
    assert told.features == ("completion", "tools", "vision")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "chat"])
def test_only_chat_models_have_estimates(kind: str) -> None:
    told = resolve("qwen3-embedding:8b", "qwen3", "8B", kind=kind)
    assert told == ModelCapabilities((FEATURE_OF_KIND[kind],))


def test_family_and_size_of_the_details_are_used_for_a_plain_name() -> None:
    assert resolve("own", "qwen2", "7B").context_length == 131_072
    assert resolve("own", "gpt-oss", "20.9B") == ModelCapabilities(("completion",), 32_768, "estimate")


@pytest.mark.parametrize("pattern", ["qwen3:8b", "QWEN3*", "qwen3:8b:latest*", "*8b", "qwen3:?b"])
def test_override_matches_names_by_a_pattern(pattern: str) -> None:
    fits = pattern != "qwen3:8b:latest*"
    assert (override_for("Qwen3:8b", [ModelOverride(pattern)]) is not None) == fits


def test_first_matching_override_applies_without_latest() -> None:
    entries = [ModelOverride("embed", 1), ModelOverride("*", 2)]
    assert [(override_for(name, entries) or entries[0]).context_length for name in ("embed:latest", "x")] == [1, 2]


def test_capabilities_from_the_details_of_a_file() -> None:
    said = ModelDescription(extra={"tools": True, "thinking": False, "vision": False, "context_length": 4096})
    assert told_by_file("chat", said) == ModelCapabilities(("completion", "tools"), 4096)
    nothing_more = ModelDescription(extra={"tools": False, "context_length": True})
    assert told_by_file("chat", nothing_more) == ModelCapabilities(("completion",))
    assert resolve("qwen3", file=told_by_file("chat", nothing_more)).features == ("completion",)
    assert told_by_file("embed", ModelDescription(extra={"context_length": 512})) == ModelCapabilities((), 512)


@pytest.mark.parametrize(
    ("template", "features"),
    [
        ("", ("completion",)),
        ("{{ messages[0].content }}", ("completion",)),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", ("completion", "tools")),
        ("{% if enable_thinking %}x{% endif %}", ("completion", "thinking")),
        ("{{ '<think>' }}{{ message.tool_calls }}", ("completion", "tools", "thinking")),
    ],
)
def test_features_of_chat_templates(template: str, features: tuple[str, ...]) -> None:
    assert features_of_template(template) == features


class Server:
    """Counts the requests for a model's details."""

    def __init__(self) -> None:
        self.asked = 0
        self.failing = False
        self.began = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self) -> int:
        self.asked += 1
        self.began.set()
        await self.gate.wait()
        if self.failing:
            raise ConnectionError
        return self.asked


async def test_digest_cache_asks_once_for_a_digest() -> None:
    now = [0.0]
    cache: DigestCache[int] = DigestCache(ttl=10, clock=lambda: now[0])
    server = Server()
    assert [await cache.get("a", "sha256:1", server) for _ in range(3)] == [1, 1, 1]
    now[0] = 1e6
    assert await cache.get("a", "sha256:1", server) == 1
    assert await cache.get("a", "sha256:2", server) == 2
    assert cache.peek("a", "sha256:2") == 2
    assert cache.peek("b", "sha256:2") is None


async def test_digest_cache_expires_without_a_digest() -> None:
    now = [0.0]
    cache: DigestCache[int] = DigestCache(ttl=10, clock=lambda: now[0])
    server = Server()
    assert [await cache.get("a", "", server), await cache.get("a", "", server)] == [1, 1]
    now[0] = 9.9
    assert cache.peek("a", "") == 1
    now[0] = 10.0
    assert cache.peek("a", "") is None
    assert await cache.get("a", "", server) == 2
    cache.forget()
    assert await cache.get("a", "", server) == 3


async def test_callers_share_a_question_and_failures_are_not_cached() -> None:
    cache: DigestCache[int] = DigestCache()
    server = Server()
    server.gate.clear()
    asking = [asyncio.create_task(cache.get("a", "1", server)) for _ in range(3)]
    await server.began.wait()
    server.failing = True
    asking[0].cancel()
    server.gate.set()
    assert [type(end) for end in await asyncio.gather(*asking, return_exceptions=True)] == [
        asyncio.CancelledError,
        ConnectionError,
        ConnectionError,
    ]
    server.failing = False
    before = server.asked
    assert await asyncio.gather(*(cache.get("a", "1", server) for _ in range(3))) == [before + 1] * 3
    asking.clear()  # with the locks in their tracebacks
    gc.collect()
    assert len(cache.asking) == 0


async def test_digest_cache_is_bounded() -> None:
    cache: DigestCache[int] = DigestCache(limit=2)
    for name in "abc":
        cache.put(name, "1", 0)
    assert [cache.peek(name, "1") for name in "abc"] == [None, 0, 0]
