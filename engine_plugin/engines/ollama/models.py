"""The models of an Ollama server: what is there, what each can do, which one answers, and how one goes."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.ollama.entries import (
    EPOCH,
    capabilities_shown,
    capabilities_told,
    entries_of,
    loaded_of,
    model_of,
)
from engine_plugin.engines.ollama.references import Reference, References
from engine_plugin.errors import EnginePluginError, ModelNotLoadedError
from engine_plugin.models.capabilities import DigestCache, override_for, resolve
from engine_plugin.models.info import Capabilities, ModelDetails, ModelInfo
from engine_plugin.models.names import is_cloud_name, near_names

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.engines.ollama.connection import OllamaClient
    from engine_plugin.engines.ollama.options import OllamaOptions

__all__ = ["FEATURE_OF_SERVICE", "ModelFacts", "ServerModels", "full_name"]

log = logging.getLogger(__name__)

FEATURE_OF_SERVICE = {
    "chat": "completion",
    "generate": "completion",
    "embed": "embedding",
    "speech-to-text": "transcription",
    "speech-to-text-ws": "transcription",
}
"""What a model must be able to do for each service: whatever hears (`audio`), which are chat models, transcribes."""

_AT_ONCE = 4
"""Models that a server is asked about at the same time."""
_SHOWS = 5.0
"""Seconds for what is asked about single models; of those that are not told of by then, the list must do."""
_MOST_MODELS = 10_000
_BATCH = 500
_LISTING_HOLDS = 20.0
_LOAD_PATIENCE = 3600.0
"""Seconds for a load where no deadline of the caller comes first."""
_POLL = 0.1
_HOSTS = ("registry.ollama.ai/", "ollama.com/")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a request's translation must know of its model.

    `name` is the server's name of it, `features` are words of FEATURES. `context_length` is what it was made for in
    tokens, when the server or plugin.yaml says so (never an estimate). `num_ctx` is what to ask for, None for
    whatever the server has: asking for all that a model can take would cost memory nobody wanted spent; `num_thread`
    is of that kind, too. A load and the calls after it must ask for the same, or the server loads the model again.
    `native` says that the host speaks Ollama's own JSON.
    """

    name: str
    kind: str
    features: frozenset[str]
    context_length: int | None
    num_ctx: int | None
    parameter_size: str
    native: bool
    num_thread: int | None = None


@dataclass(frozen=True, slots=True)
class _Listing:
    """The models as they were at a moment, by their full names in small letters."""

    models: Mapping[str, ModelInfo]
    at: float


def full_name(name: str) -> str:
    """The name with its tag and without the parts that Ollama adds by itself, in small letters, to compare it."""
    name = name.strip().lower()
    for host in _HOSTS:
        name = name.removeprefix(host)
    name = name.removeprefix("library/")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


class ServerModels:
    """What is known of a server's models. Owned by the engine, used from one event loop.

    Every method is handed the server's client, since the server may be another one the next time. A listing holds
    for 20 s, so that a call costs no question of its own; whoever changes the models calls `forget`.
    """

    def __init__(self, options: OllamaOptions, references: References | None = None) -> None:
        self._options = options
        self._references = references or References()
        self._shown: DigestCache[Capabilities] = DigestCache()
        self._listing: _Listing | None = None
        self._client: OllamaClient | None = None

    def forget(self) -> None:
        """The models have changed, or may have."""
        self._listing = None

    # What is there

    async def all(self, client: OllamaClient) -> list[ModelInfo]:
        """Every model, sorted by name, asked for anew."""
        self.forget()
        references = await self._references.by_model()
        models = [
            replace(model, references=references.get(Reference(full_name(model.name), model.digest), ()))
            for model in (await self._listed(client)).values()
        ]
        return sorted(models, key=lambda model: model.name)

    async def running(self, client: OllamaClient) -> list[ModelInfo]:
        """The models in memory, the one used last first."""
        entries = entries_of(await client.ask("GET", "/api/ps"))
        listed = await self._listed(client)
        found = [
            replace(listed.get(full_name(entry["name"])) or model_of(entry, Capabilities()), loaded=loaded_of(entry))
            for entry in entries
        ]
        return sorted(found, key=_leaves, reverse=True)

    async def get(self, client: OllamaClient, name: str) -> ModelInfo:
        """The model of that name, of `name:latest`, or that a pull of this name brought. Raises ModelNotFoundError
        with near names.

        A cloud model needs not be listed: the server hands the request on.
        """
        for fresh in (False, True):
            if fresh:
                if time.monotonic() - self._asked_at < _POLL:  # it was asked just now
                    break
                self.forget()
            listed = await self._listed(client)
            found = listed.get(full_name(name)) or await self._referred(name, listed)
            if found is not None:
                return found
        if is_cloud_name(name):
            return self._cloud(name)
        names = [model.name for model in (await self._listed(client)).values()]
        raise catalogue.model_missing(name, near=near_names(name, names), here=sorted(names), pull=name)

    async def default(self, client: OllamaClient, service: str) -> str:
        """The model that answers when nobody names one: one in memory, else the newest that can do it.

        Raises ModelNotFoundError when there is none.
        """
        wanted = FEATURE_OF_SERVICE[service]
        running, listed = await self.running(client), await self._listed(client)
        for model in running:
            if wanted in model.capabilities.features and full_name(model.name) in listed:  # not one that was deleted
                return model.name
        able = [model for model in listed.values() if wanted in model.capabilities.features]
        if able:
            return max(able, key=lambda model: (not is_cloud_name(model.name), model.modified_at)).name
        raise catalogue.model_missing(
            f"(any for {service})",
            here=sorted(model.name for model in listed.values()),
            sources=f"PullModel {_PROPOSED[wanted]}",
        )

    def facts(self, model: ModelInfo, *, native: bool) -> ModelFacts:
        """What a request's translation must know."""
        can = model.capabilities
        known = can.context_length if can.context_source in ("configuration", "engine") else 0
        return ModelFacts(
            name=model.name,
            kind=model.kind,
            features=frozenset(can.features),
            context_length=known or None,
            num_ctx=self._num_ctx(model, known),
            parameter_size=model.details.parameter_size,
            native=native,
            num_thread=self._options.threads or None,
        )

    async def refer(self, reference: str, model: ModelInfo) -> None:
        """Have a model answer to what its pull asked for."""
        if full_name(reference) == full_name(model.name):
            return
        try:
            await self._references.put(reference, Reference(full_name(model.name), model.digest))
        except OSError as error:  # the model is at the server, whatever is wrong with our folder
            log.warning("%s answers to %r only until the plugin ends: %s", model.name, reference, error)

    async def _referred(self, reference: str, listed: Mapping[str, ModelInfo]) -> ModelInfo | None:
        known = await self._references.get(reference)
        found = listed.get(known.name) if known else None
        return found if found is not None and known is not None and found.digest == known.digest else None

    # What is done with one

    async def delete(self, client: OllamaClient, name: str) -> None:
        """Delete it from the server, and from its memory, where it would stay. Raises ModelNotFoundError."""
        model = await self.get(client, name)
        try:
            if await self._is_loaded(client, model):
                await self._expire(client, model)
            await client.ask("DELETE", "/api/delete", {"model": model.name}, model=model.name)
            await self._references.forget(full_name(model.name))
        finally:
            self.forget()

    async def load(self, client: OllamaClient, name: str) -> None:
        """Bring it into memory: a request that asks nothing. Raises ModelNotFoundError."""
        model = await self.get(client, name)
        shape: dict[str, Any] = {"model": model.name, "stream": False}
        if keep_alive := self._options.keep_alive:
            shape["keep_alive"] = int(keep_alive) if keep_alive in ("-1", "0") else keep_alive
        facts = self.facts(model, native=False)
        asked = {"num_ctx": facts.num_ctx, "num_thread": facts.num_thread}
        if settings := {key: value for key, value in asked.items() if value is not None}:
            shape["options"] = settings
        path, nothing = ("/api/embed", "input") if model.kind == "embed" else ("/api/chat", "messages")
        await client.ask("POST", path, {**shape, nothing: []}, model=model.name, within=_LOAD_PATIENCE)

    async def unload(self, client: OllamaClient, name: str, within: float) -> None:
        """Have it leave memory when its running requests have ended, and wait for that up to `within` seconds.

        Raises ModelNotFoundError and ModelNotLoadedError.
        """
        model = await self.get(client, name)
        if not await self._is_loaded(client, model):
            raise ModelNotLoadedError(f"models: {model.name} is not loaded")
        await self._expire(client, model)
        end = time.monotonic() + within
        while await self._is_loaded(client, model):
            if time.monotonic() > end:
                log.warning("%s: its requests did not end in %g s", model.name, within)
                return
            await asyncio.sleep(_POLL)

    async def _expire(self, client: OllamaClient, model: ModelInfo) -> None:
        """Have it leave memory as soon as nobody uses it."""
        # Unlike the request without messages, the one without a prompt is understood for every kind of model.
        shape = {"model": model.name, "keep_alive": 0, "stream": False}
        await client.ask("POST", "/api/generate", shape, model=model.name)

    async def _is_loaded(self, client: OllamaClient, model: ModelInfo) -> bool:
        names = {full_name(entry["name"]) for entry in entries_of(await client.ask("GET", "/api/ps"))}
        return full_name(model.name) in names

    # How it is known

    @property
    def _asked_at(self) -> float:
        return self._listing.at if self._listing else 0.0

    async def _listed(self, client: OllamaClient) -> Mapping[str, ModelInfo]:
        if client is not self._client:
            self._client, self._listing = client, None
        listing = self._listing
        if listing is None or time.monotonic() - listing.at > _LISTING_HOLDS:
            models = await self._ask_for_all(client)
            listing = self._listing = _Listing({full_name(model.name): model for model in models}, time.monotonic())
        return listing.models

    async def _ask_for_all(self, client: OllamaClient) -> list[ModelInfo]:
        entries = entries_of(await client.ask("GET", "/api/tags"))
        entries, others = entries[:_MOST_MODELS], len(entries) - _MOST_MODELS
        asked = await self._ask_about(client, [entry for entry in entries if not _tells_all(entry)])
        if others > 0:
            log.warning("the server has %d models more than the %d that are looked at", others, _MOST_MODELS)
        models: list[ModelInfo] = []
        for entry in entries:
            models.append(self._info(entry, asked.get(entry["name"]) or capabilities_told(entry)))
            if not len(models) % _BATCH:
                await asyncio.sleep(0)  # others go on meanwhile
        return models

    async def _ask_about(self, client: OllamaClient, entries: list[dict[str, Any]]) -> dict[str, Capabilities]:
        """What `show` tells of models, for servers whose list does not, as far as it comes in time."""
        told: dict[str, Capabilities] = {}
        left = iter(entries)

        async def ask() -> None:
            for entry in left:
                shown = await self._shown_capabilities(client, entry)
                if shown is not None:
                    told[entry["name"]] = shown

        if entries:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SHOWS):
                    await asyncio.gather(*(ask() for _ in range(_AT_ONCE)))
        return told

    def _info(self, entry: dict[str, Any], told: Capabilities) -> ModelInfo:
        bare = model_of(entry, told)
        can = resolve(
            bare.name,
            bare.details.family,
            bare.details.parameter_size,
            kind=bare.kind,
            engine=told,
            overrides=self._options.models,
        )
        if "audio" in can.features:
            can = replace(can, features=(*can.features, "transcription"))
        return replace(bare, capabilities=can)

    async def _shown_capabilities(self, client: OllamaClient, entry: dict[str, Any]) -> Capabilities | None:
        """What `show` tells; None when it fails, and it is asked again."""
        name, digest = entry["name"], str(entry.get("digest") or "")

        async def ask() -> Capabilities:
            return capabilities_shown(await client.ask("POST", "/api/show", {"model": name}, model=name))

        try:
            return await self._shown.get(name, digest, ask)
        except EnginePluginError as error:
            log.debug("%s: the server does not tell what it can do: %s", name, error)
            return None

    def _num_ctx(self, model: ModelInfo, known: int) -> int | None:
        override = override_for(model.name, self._options.models)
        if override is not None and override.context_length:
            return override.context_length
        wanted = self._options.context_length
        return (min(wanted, known) if known else wanted) or None

    def _cloud(self, name: str) -> ModelInfo:
        can = resolve(name, overrides=self._options.models)
        return ModelInfo(name, "chat", 0, "", EPOCH, bundled=False, details=ModelDetails(), capabilities=can)


def _tells_all(entry: dict[str, Any]) -> bool:
    told = capabilities_told(entry)
    return bool(told.features and told.context_length)


_PROPOSED = {"completion": "llama3.2:1b", "embedding": "nomic-embed-text", "transcription": "gemma3n"}


def _leaves(model: ModelInfo) -> datetime:
    """When it leaves memory; the one used last leaves last."""
    expires = model.loaded.expires_at if model.loaded else None
    return expires or datetime.max.replace(tzinfo=UTC)
