"""One model in the memory of the server, as the pool sees it."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin.engines.local.single_flight import SingleFlight
from engine_plugin.errors import BadGatewayError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from engine_plugin.engines.local.admission import Admission
    from engine_plugin.engines.openvino.client import ServerClient
    from engine_plugin.engines.openvino.entries import ModelEntry
    from engine_plugin.engines.openvino.server import OpenVinoServer
    from engine_plugin.models.store import StoredModel
    from engine_plugin.process.run import ProcessRun

__all__ = ["LoadedModel"]

_UNLOADED = "the model was unloaded during this request"


class LoadedModel:
    """One model in a server's memory, or being loaded. Owned by the pool; closed once, then discarded."""

    def __init__(self, model: StoredModel, entry: ModelEntry, server: OpenVinoServer, admission: Admission) -> None:
        self.model = model
        self.admission = admission
        self._entry = entry
        self._server = server
        self._work: SingleFlight[None] = SingleFlight(f"loading {model.name}")
        self._loaded = False
        self._closed = False
        self._run: ProcessRun | None = None
        """The run of the server in which the model became available."""
        self._clients: set[ServerClient] = set()

    async def ensure_ready(self) -> None:
        """Load the model, or join a load that is under way; after a restart of the server, wait for the model.

        Raises ModelUnusableError or EngineStartError with the server's reason.
        """
        if not self.ready:
            await self._work.run(self._load)

    async def _load(self) -> None:
        try:
            await self._server.ensure_ready()
            run = self._server.latest_run
            await self._server.add(self._entry)
        except BaseException:
            self._loaded = False
            self._server.forget(self.model.name)
            if self._server.ready:  # it may still be loading the model, or list it as failed
                await self._server.remove(self.model.name)
            raise
        self._run, self._loaded = run, True

    @property
    def loaded(self) -> bool:
        """Whether it was loaded; also true while its server is being restarted."""
        return self._loaded

    def doubt(self) -> None:
        """Have the next request, or load, check whether the server still has the model."""
        self._run = None

    @property
    def ready(self) -> bool:
        """Whether the model has been available in this run of the server."""
        return self._loaded and self._run is self._server.latest_run and self._server.ready

    @property
    def dead(self) -> bool:
        """Whether it is not in memory, and is loaded only by the next request."""
        return not self._work.running and (not self._loaded or self._server.dead)

    @property
    def crashed(self) -> bool:
        """Whether its server served and died, and has not served for a stable time since."""
        return self._server.crashed

    @asynccontextmanager
    async def working(self) -> AsyncIterator[ServerClient]:
        """A client for one request, which fails with UnavailableError when the model leaves memory.

        After an error of the server the next request checks the model again.
        """
        if self._closed:
            raise UnavailableError(_UNLOADED)
        client = self._server.client()
        self._clients.add(client)
        try:
            yield client
        except (BadGatewayError, UnavailableError):
            self.doubt()
            raise
        finally:
            self._clients.discard(client)

    async def close(self) -> None:
        """Unload the model; running requests are cancelled."""
        self._closed = True
        self.admission.close()
        for client in self._clients:
            client.end(_UNLOADED)
        await self._work.cancel()
        await self._server.remove(self.model.name)
        self._loaded = False

    def clean_up(self) -> None:
        """Keep the model out of the server's next run."""
        self._server.forget(self.model.name)
