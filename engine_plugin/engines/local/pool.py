"""The models in memory: loaded on first use, evicted least recently used first, never under a running request."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from engine_plugin import catalogue
from engine_plugin.engines.local.admission import ClosedError
from engine_plugin.errors import ModelNotLoadedError
from engine_plugin.system.sizes import byte_size
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from engine_plugin.engines.local.admission import Admission
    from engine_plugin.models.store import StoredModel

__all__ = ["ModelPool", "ModelServer"]

log = logging.getLogger(__name__)


class ModelServer(Protocol):
    """One model in memory, or on its way there. Made by the driver for the pool, closed once, then thrown away."""

    model: StoredModel
    """What it serves."""

    admission: Admission
    """The bound on its requests; closed by `close`."""

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and can answer."""

    @property
    def dead(self) -> bool:
        """Whether it serves nothing, and will not without a request."""

    @property
    def crashed(self) -> bool:
        """Whether it served and died, and has not served for a stable time since."""

    async def ensure_ready(self) -> None:
        """Load the model, sharing a load that is under way. Raises EnginePluginError with the engine's reason."""

    async def close(self) -> None:
        """Take the model out of memory; requests under way break off."""

    def clean_up(self) -> None:
        """Remove what a server that has ended leaves."""


ServerT = TypeVar("ServerT", bound=ModelServer)


class _Entry(Generic[ServerT]):
    """A model's server and who uses it. It takes no new users while it is `retiring`."""

    def __init__(self, server: ServerT) -> None:
        self.server = server
        self.users = 0
        self.last_used = time.monotonic()
        self.idle = asyncio.Event()
        self.idle.set()
        self.gone = asyncio.Event()
        """Set at its end, before the caller that evicted it goes on: requests that wait for the model come first, and
        are served together."""
        self.retiring: asyncio.Task[None] | None = None


class ModelPool(Generic[ServerT]):
    """At most `limit` model servers, whose models have `memory` bytes together (0: no matter how many).

    Every change of the table happens between two awaits, so it needs no lock.
    """

    def __init__(
        self, limit: int, drain_timeout: float, make: Callable[[StoredModel], ServerT], memory: int = 0
    ) -> None:
        """`make` raises EnginePluginError for a model that cannot be loaded now."""
        self.limit = limit
        """How many models may be in memory."""
        self._memory = memory
        self._drain_timeout = drain_timeout
        self._make = make
        self._entries: dict[str, _Entry[ServerT]] = {}

    @asynccontextmanager
    async def turn(self, model: StoredModel, slots: int) -> AsyncIterator[ServerT]:
        """As `use`, with so many slots of the server. Who still waits for them when the model leaves memory waits for
        the model's next server: after an upgrade, that of the new version.

        Raises UnavailableError when too many wait already.
        """
        while True:
            async with AsyncExitStack() as held:
                server = await held.enter_async_context(self.use(model))
                try:
                    await held.enter_async_context(server.admission.slots(slots))
                except ClosedError:
                    continue
                yield server
                return

    @asynccontextmanager
    async def use(self, model: StoredModel) -> AsyncIterator[ServerT]:
        """A ready server for the model, loaded if need be, that is not evicted inside the block.

        Raises PreconditionError for one that is larger than all the memory.
        """
        entry = await self._enter(model)
        try:
            yield entry.server
        finally:
            self._leave(entry)

    async def load(self, model: StoredModel) -> None:
        """Load the model and leave it in memory."""
        async with self.use(model):
            pass

    async def unload(self, name: str) -> None:
        """Drain the model and take it out of memory. Raises ModelNotLoadedError."""
        entry = self._entries.get(name)
        if entry is None or entry.server.dead:
            if entry is not None and self._of_no_use(entry):
                self._forget(name, entry)
            raise ModelNotLoadedError(f"models: {name} is not loaded")
        await self._retire(entry, self._drain_timeout)

    async def close(self) -> None:
        """End every server at once, without draining."""
        await asyncio.gather(*(self._retire(entry, 0) for entry in list(self._entries.values())))

    async def drain(self) -> None:
        """Unload every model, letting running requests end first."""
        await asyncio.gather(*(self._retire(entry, self._drain_timeout) for entry in list(self._entries.values())))

    def users(self, name: str) -> int:
        """How many requests use the model now."""
        entry = self._entries.get(name)
        return entry.users if entry else 0

    def idle(self, name: str) -> float | None:
        """The seconds since the model was last used, 0 while it is; None when it is not here."""
        entry = self._entries.get(name)
        if entry is None:
            return None
        return 0.0 if entry.users else time.monotonic() - entry.last_used

    def servers(self) -> list[ServerT]:
        """The servers whose model is in memory: no longer loading, and alive."""
        return [server for server in self.all_servers() if server.ready]

    def all_servers(self) -> list[ServerT]:
        """Those that load, are restarted, or crashed once too often as well."""
        return [entry.server for entry in self._entries.values()]

    async def _enter(self, model: StoredModel) -> _Entry[ServerT]:
        while True:
            entry = self._entries.get(model.name)
            if entry is None:
                if not await self._make_room(model):
                    continue  # the table changed while we waited
                if model.name in self._entries:
                    continue
                entry = self._entries[model.name] = _Entry(self._make(model))
            elif entry.retiring is not None:
                await entry.gone.wait()
                continue
            elif entry.server.dead and entry.server.model != model:
                await self._retire(entry, self._drain_timeout)  # another file has this name now
                continue
            entry.users += 1
            entry.idle.clear()
            try:
                await entry.server.ensure_ready()
            except BaseException:
                self._leave(entry)
                if self._of_no_use(entry) and not entry.server.crashed:  # else its deaths must stay counted
                    self._forget(model.name, entry)
                raise
            return entry

    def _leave(self, entry: _Entry[ServerT]) -> None:
        entry.users -= 1
        entry.last_used = time.monotonic()
        if not entry.users:
            entry.idle.set()

    def _of_no_use(self, entry: _Entry[ServerT]) -> bool:
        """Whether it may be dropped without being closed: it serves nothing, and no request starts it."""
        return entry.server.dead and not entry.users and entry.retiring is None

    def _forget(self, name: str, entry: _Entry[ServerT]) -> None:
        if self._entries.get(name) is entry:
            del self._entries[name]
            entry.server.clean_up()
            entry.gone.set()

    def _has_room(self, model: StoredModel) -> bool:
        taken = sum(entry.server.model.size for entry in self._entries.values())
        return len(self._entries) < self.limit and not 0 < self._memory < taken + model.size

    async def _make_room(self, model: StoredModel) -> bool:
        """True when there is room right now; else wait for one eviction and return False."""
        if 0 < self._memory < model.size:
            raise catalogue.MEMORY_INSUFFICIENT.error(
                model=model.name,
                needed=byte_size(model.size),
                limit=f"engine.memory_limit in plugin.yaml allows {byte_size(self._memory)}",
            )
        for name, entry in list(self._entries.items()):
            if self._of_no_use(entry):
                self._forget(name, entry)
        if self._has_room(model):
            return True
        staying = [entry for entry in self._entries.values() if entry.retiring is None]
        if staying:
            victim = min(staying, key=lambda entry: (entry.users > 0, entry.last_used))
            log.info("evicting %s to make room", victim.server.model.name)
            await self._retire(victim, self._drain_timeout)
        else:
            retiring = [entry.retiring for entry in self._entries.values() if entry.retiring is not None]
            await asyncio.wait(retiring, return_when=asyncio.FIRST_COMPLETED)
        return False

    async def _retire(self, entry: _Entry[ServerT], patience: float) -> None:
        """Begin or join the end of an entry. The task goes on if this caller is cancelled."""
        if entry.retiring is not None and patience == 0:
            entry.idle.set()  # ends a drain that is under way
        if entry.retiring is None:
            entry.retiring = asyncio.create_task(self._end(entry, patience))
        await asyncio.shield(entry.retiring)

    async def _end(self, entry: _Entry[ServerT], patience: float) -> None:
        name = entry.server.model.name
        try:
            if patience and not await comes_true(entry.idle.wait(), within=patience):
                log.warning("%s: %d requests did not end in %g s", name, entry.users, patience)
            await entry.server.close()
        finally:
            self._forget(name, entry)
