"""The connection to the attached server: found on demand, and again when the server may have changed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.openai.discovery import STALE_AFTER
from engine_plugin.errors import EnginePluginError
from engine_plugin.single_flight import SingleFlight

if TYPE_CHECKING:
    from engine_plugin.engines.openai.discovery import AttachedServer, ServerFinder

__all__ = ["ServerConnection"]


class ServerConnection:
    """The server that `finder` found. Owned by the engine, used from one event loop."""

    def __init__(self, finder: ServerFinder) -> None:
        """No I/O."""
        self.finder = finder
        self.attachment: AttachedServer | None = None
        """The server; None: find it at the next call."""
        self.is_released = False
        """Whether calls are rejected until the next `reconnect`."""
        self._finding: SingleFlight[AttachedServer] = SingleFlight("looking for the server")

    @property
    def where(self) -> str:
        """The server in messages, found or not."""
        if self.attachment is not None:
            return self.attachment.title
        return self.finder.named.url if self.finder.named is not None else "a server on this machine"

    async def get(self, *, fresh: bool = False, for_call: bool = True) -> AttachedServer:
        """The server, inspected recently; with `fresh` now, since its models can change at any time.

        Raises the errors of `ServerFinder.find`, and with `for_call` EngineNotRunningError while disconnected.
        """
        if for_call and self.is_released:
            raise catalogue.ENGINE_NOT_RUNNING.error()
        found = self.attachment
        if found is not None and not fresh and time.monotonic() - found.at < STALE_AFTER:
            return found
        return await self._finding.run(self._find)

    async def reconnect(self) -> None:
        """Find the server and allow calls again after `disconnect`. Raises the errors of `ServerFinder.find`.

        What calls found missing is forgotten.
        """
        self.is_released = False
        if self.attachment is not None:
            self.attachment.forget_learned()
        await self.get(fresh=True)

    async def disconnect(self) -> None:
        """Disconnect until the next `reconnect`; running requests are broken off."""
        self.is_released = True
        await self._finding.cancel()
        self.forget()

    def forget(self, only: AttachedServer | None = None) -> None:
        """Find the server again at the next call; with `only`, unless another one was found since."""
        before = self.attachment
        if before is not None and only in (None, before):
            self.attachment = None
            before.http.close()

    def close_if_replaced(self, attachment: AttachedServer) -> None:
        """Close the client of a server that a call has used, if the connection no longer owns it."""
        if self.attachment is not attachment:
            attachment.http.close()

    async def _find(self) -> AttachedServer:
        before = self.attachment
        try:
            found = await self.finder.find(before)
        except EnginePluginError:
            self.forget()
            raise
        if self.is_released:
            found.http.close()  # a status query while disconnected; keep no connection
            return found
        self.attachment = found
        if before is not None:
            before.http.close()
        return found
