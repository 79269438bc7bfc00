"""The models of an Ollama server: listing, capabilities, defaults, loading, unloading and deletion."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.ollama.entries import (
    EPOCH,
    listed_capabilities,
    listed_model,
    loaded_state,
    named_entries,
    shown_capabilities,
)
from engine_plugin.engines.ollama.options import keep_alive_value
from engine_plugin.engines.ollama.references import Reference, References
from engine_plugin.errors import EnginePluginError, ModelNotLoadedError
from engine_plugin.models.capabilities import DigestCache, resolve
from engine_plugin.models.info import ModelCapabilities, ModelDescription, ModelInfo
from engine_plugin.models.names import is_cloud_name, near_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.options import OllamaOptions

__all__ = ["FEATURE_OF_SERVICE", "MAX_MODELS", "SHOW_TIMEOUT", "ModelFacts", "ServerModels", "full_name"]

log = logging.getLogger(__name__)

FEATURE_OF_SERVICE = {
    "chat": "completion",
    "generate": "completion",
    "embed": "embedding",
    "speech-to-text": "transcription",
    "speech-to-text-ws": "transcription",
}
"""The feature that a model needs for each service. Chat models with `audio` get `transcription` from `_info`."""

_PARALLEL_SHOWS = 4
SHOW_TIMEOUT = 5.0
"""Seconds for all /api/show requests of a listing; models without an answer have the capabilities in the list."""
MAX_MODELS = 10_000
"""The most models of a listing."""
_BATCH = 500
_LISTING_AGE = 20.0
"""Seconds for which a listing is reused."""
_LOAD_TIMEOUT = 3600.0
"""Seconds for a load; the caller's deadline usually ends it earlier."""
_POLL = 0.1
_HOSTS = ("registry.ollama.ai/", "ollama.com/")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The facts of a model by which requests are converted.

    `name` is the server's name of the model. `features` are words of FEATURES. `options` are the `num_ctx` and
    `num_thread` to request; missing ones are left to the server, since a context larger than necessary costs memory.
    A load and the calls after it must request the same values, or the server loads the model again. `keep_alive` is
    the option of plugin.yaml. `native` says that the host uses Ollama's own JSON.
    """

    name: str
    features: frozenset[str]
    parameter_size: str
    options: Mapping[str, int]
    keep_alive: str
    native: bool


def full_name(name: str) -> str:
    """The name in lower case, with its tag and without the default host and namespace. For comparisons."""
    name = name.strip().lower()
    for host in _HOSTS:
        name = name.removeprefix(host)
    name = name.removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class ServerModels:
    """The models of the server in use. Owned by the engine, used from one event loop.

    Every method takes the client, since the engine may change servers. A listing is reused for 20 s, so that a call
    needs no further request; code that changes the models calls `invalidate`.
    """

    def __init__(self, options: OllamaOptions, references: References | None = None) -> None:
        self._options = options
        self._references = references or References()
        self._shown: DigestCache[ModelCapabilities] = DigestCache()
        self._listing: Mapping[str, ModelInfo] = {}
        """The models by their full names, as they were at `_listed_at` (time.monotonic)."""
        self._listed_at = -math.inf
        self._client: OllamaClient | None = None

    def invalidate(self) -> None:
        """Discard the listing. Called when the models may have changed."""
        self._listed_at = -math.inf

    # Listing

    async def all(self, client: OllamaClient) -> list[ModelInfo]:
        """All models, sorted by name, from a new listing."""
        self.invalidate()
        references = await self._references.by_model()
        models = [
            replace(model, references=references.get(Reference(full_name(model.name), model.digest), ()))
            for model in (await self._listed(client)).values()
        ]
        return sorted(models, key=lambda model: model.name)

    async def running(self, client: OllamaClient) -> list[ModelInfo]:
        """The loaded models, most recently used first."""
        entries = named_entries(await client.ask("GET", "/api/ps"))
        listed = await self._listed(client)
        found = [
            replace(
                listed.get(full_name(entry["name"])) or listed_model(entry, ModelCapabilities()),
                loaded=loaded_state(entry),
            )
            for entry in entries
        ]
        return sorted(found, key=_expiry, reverse=True)

    async def get(self, client: OllamaClient, name: str) -> ModelInfo:
        """The model with this name, with `name:latest`, or pulled by this reference.

        Cloud models need not be listed, since the server forwards their requests. Raises ModelNotFoundError with
        similar names.
        """
        found = await self._find(client, name)
        if found is None and time.monotonic() - self._listed_at >= _POLL:  # the listing may be out of date
            self.invalidate()
            found = await self._find(client, name)
        if found is not None:
            return found
        if is_cloud_name(name):
            return self._cloud(name)
        names = [model.name for model in self._listing.values()]
        raise catalogue.model_missing(name, near=near_names(name, names), here=sorted(names), pull=name)

    async def default(self, client: OllamaClient, service: str) -> str:
        """The model for a call without one: a loaded model that supports the service, else the newest such model.

        Raises ModelNotFoundError if there is none.
        """
        wanted = FEATURE_OF_SERVICE[service]
        running, listed = await self.running(client), await self._listed(client)
        for model in running:
            if wanted in model.capabilities.features and full_name(model.name) in listed:  # not deleted
                return model.name
        able = [model for model in listed.values() if wanted in model.capabilities.features]
        if able:
            return max(able, key=lambda model: (not is_cloud_name(model.name), model.modified_at)).name
        raise catalogue.model_missing(
            f"(any for {service})",
            here=sorted(model.name for model in listed.values()),
            sources=f"PullModel {_SUGGESTED[wanted]}",
        )

    def facts(self, model: ModelInfo, *, native: bool) -> ModelFacts:
        """The facts by which requests for a model are converted."""
        options = {"num_ctx": self._num_ctx(model), "num_thread": self._options.threads}
        return ModelFacts(
            model.name,
            frozenset(model.capabilities.features),
            model.details.parameter_size,
            {name: value for name, value in options.items() if value},
            self._options.keep_alive,
            native,
        )

    async def add_reference(self, reference: str, model: ModelInfo) -> None:
        """Let calls name a model by the reference by which it was pulled."""
        if full_name(reference) == full_name(model.name):
            return
        try:
            await self._references.put(reference, Reference(full_name(model.name), model.digest))
        except OSError as error:  # the pull itself succeeded
            log.warning("the reference %r to %s is lost when the plugin ends: %s", reference, model.name, error)

    async def _find(self, client: OllamaClient, name: str) -> ModelInfo | None:
        """The listed model with this name, else the one that was pulled by this reference."""
        listed = await self._listed(client)
        if found := listed.get(full_name(name)):
            return found
        known = await self._references.get(name)
        found = listed.get(known.name) if known else None
        return found if found and known and found.digest == known.digest else None

    # Changes

    async def delete(self, client: OllamaClient, name: str) -> None:
        """Unload and delete a model: a deleted one would stay in memory. Raises ModelNotFoundError."""
        model = await self.get(client, name)
        try:
            if await self._is_loaded(client, model):
                await self._expire(client, model)
            await client.ask("DELETE", "/api/delete", {"model": model.name}, model=model.name)
            await self._references.forget(full_name(model.name))
        finally:
            self.invalidate()

    async def load(self, client: OllamaClient, name: str) -> None:
        """Load a model by an empty request. Raises ModelNotFoundError."""
        model = await self.get(client, name)
        shape: dict[str, Any] = {"model": model.name, "stream": False}
        if keep_alive := self._options.keep_alive:
            shape["keep_alive"] = keep_alive_value(keep_alive)
        if options := self.facts(model, native=False).options:
            shape["options"] = options
        path, empty = ("/api/embed", "input") if model.kind == "embed" else ("/api/chat", "messages")
        await client.ask("POST", path, {**shape, empty: []}, model=model.name, within=_LOAD_TIMEOUT)

    async def unload(self, client: OllamaClient, name: str, within: float) -> None:
        """Unload a model when its running requests have ended; wait up to `within` seconds for that.

        Raises ModelNotFoundError and ModelNotLoadedError.
        """
        model = await self.get(client, name)
        if not await self._is_loaded(client, model):
            raise ModelNotLoadedError(f"models: {model.name} is not loaded")
        await self._expire(client, model)
        end = time.monotonic() + within
        while await self._is_loaded(client, model):
            if time.monotonic() > end:
                log.warning("%s is still loaded: its requests did not end in %g s", model.name, within)
                return
            await asyncio.sleep(_POLL)

    async def _expire(self, client: OllamaClient, model: ModelInfo) -> None:
        """Let the server unload a model when its requests have ended."""
        # Unlike /api/chat without messages, /api/generate without a prompt works for every kind of model.
        shape = {"model": model.name, "keep_alive": 0, "stream": False}
        await client.ask("POST", "/api/generate", shape, model=model.name)

    async def _is_loaded(self, client: OllamaClient, model: ModelInfo) -> bool:
        names = {full_name(entry["name"]) for entry in named_entries(await client.ask("GET", "/api/ps"))}
        return full_name(model.name) in names

    # The listing

    async def _listed(self, client: OllamaClient) -> Mapping[str, ModelInfo]:
        if client is not self._client or time.monotonic() - self._listed_at > _LISTING_AGE:
            listing = {full_name(model.name): model for model in await self._fetch_listing(client)}
            self._client, self._listing, self._listed_at = client, listing, time.monotonic()
        return self._listing

    async def _fetch_listing(self, client: OllamaClient) -> list[ModelInfo]:
        entries = named_entries(await client.ask("GET", "/api/tags"))
        entries, others = entries[:MAX_MODELS], len(entries) - MAX_MODELS
        shown = await self._fetch_capabilities(client, [entry for entry in entries if not _is_complete(entry)])
        if others > 0:
            log.warning("ignoring %d models of the server: the list is limited to %d", others, MAX_MODELS)
        models: list[ModelInfo] = []
        for entry in entries:
            models.append(self._info(entry, shown.get(entry["name"]) or listed_capabilities(entry)))
            if not len(models) % _BATCH:
                await asyncio.sleep(0)  # let other tasks run
        return models

    async def _fetch_capabilities(
        self, client: OllamaClient, entries: list[dict[str, Any]]
    ) -> dict[str, ModelCapabilities]:
        """The capabilities from /api/show, by name, for old servers whose list lacks them.

        Late answers are missing.
        """
        found: dict[str, ModelCapabilities] = {}
        left = iter(entries)

        async def show(name: str) -> ModelCapabilities:
            return shown_capabilities(await client.ask("POST", "/api/show", {"model": name}, model=name))

        async def show_next() -> None:
            for entry in left:
                name, digest = entry["name"], str(entry.get("digest") or "")
                try:
                    found[name] = await self._shown.get(name, digest, partial(show, name))
                except EnginePluginError as error:  # not cached
                    log.debug("%s: capabilities unknown: %s", name, error)

        if entries:
            with suppress(TimeoutError):
                async with asyncio.timeout(SHOW_TIMEOUT):
                    await asyncio.gather(*(show_next() for _ in range(_PARALLEL_SHOWS)))
        return found

    def _info(self, entry: dict[str, Any], reported: ModelCapabilities) -> ModelInfo:
        bare = listed_model(entry, reported)
        can = resolve(
            bare.name,
            bare.details.family,
            bare.details.parameter_size,
            kind=bare.kind,
            engine=reported,
            overrides=self._options.models,
        )
        if "audio" in can.features:
            can = replace(can, features=(*can.features, "transcription"))
        return replace(bare, capabilities=can)

    def _num_ctx(self, model: ModelInfo) -> int:
        """The context of plugin.yaml, at most what the server reports; 0 for the server's default."""
        can = model.capabilities
        if can.context_source == "configuration":
            return can.context_length
        wanted = self._options.context_length
        return min(wanted, can.context_length) if can.context_source == "engine" else wanted

    def _cloud(self, name: str) -> ModelInfo:
        can = resolve(name, overrides=self._options.models)
        return ModelInfo(name, "chat", 0, "", EPOCH, bundled=False, details=ModelDescription(), capabilities=can)


def _is_complete(entry: dict[str, Any]) -> bool:
    listed = listed_capabilities(entry)
    return bool(listed.features and listed.context_length)


_SUGGESTED = {"completion": "llama3.2:1b", "embedding": "nomic-embed-text", "transcription": "gemma3n"}


def _expiry(model: ModelInfo) -> datetime:
    """When a model is unloaded: each use postpones it, so that the order is that of use."""
    expires = model.loaded.expires_at if model.loaded else None
    return expires or datetime.max.replace(tzinfo=UTC)
