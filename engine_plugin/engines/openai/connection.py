"""The server that the engine is attached to: looked for when it is needed, and again when it may have changed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.local.single_flight import SharedWork
from engine_plugin.errors import EnginePluginError

if TYPE_CHECKING:
    from engine_plugin.engines.openai.discovery import Attachment, Finder

__all__ = ["HeldServer"]

_STALE = 300.0
"""Seconds after which a server is looked at again."""


class HeldServer:
    """What `finder` found, for as long as it is there. Owned by the engine, used from one event loop."""

    def __init__(self, finder: Finder) -> None:
        """No I/O."""
        self.attachment: Attachment | None = None
        """The server that was found last; None: it is to be looked for."""
        self.let_go = False
        """Whether nothing is to be asked of it until the next `look_anew`."""
        self._finder = finder
        self._finding: SharedWork[Attachment] = SharedWork("looking for the server")
        self._listing: SharedWork[Attachment] = SharedWork("asking the server for its models")

    @property
    def where(self) -> str:
        """The server for people, whether or not it was found."""
        if self.attachment is not None:
            return self.attachment.title
        return self._finder.named.url if self._finder.named is not None else "a server on this machine"

    async def get(self, *, for_call: bool = True) -> Attachment:
        """The server, looked at not too long ago. `for_call`: not while it is let go. Raises as `Finder.find`."""
        self._require_held(for_call=for_call)
        found = self.attachment
        return found if found is not None and not _is_stale(found) else await self._look()

    async def listed(self, *, for_call: bool = True) -> Attachment:
        """The server with the models that it has now: it may load and lose some at any time. Raises as `get`."""
        self._require_held(for_call=for_call)
        return await self._listing.run(self._list)

    async def look_anew(self) -> None:
        """Look for it now, and hold it again after `release`. Raises as `Finder.find`."""
        self.let_go = False
        await self._look()

    async def release(self) -> None:
        """Let it go until the next `look_anew`; what is under way there breaks off."""
        self.let_go = True
        await self._finding.cancel()
        await self._listing.cancel()
        self.forget()

    def forget(self, only: Attachment | None = None) -> None:
        """Look for a server anew; `only`: unless another has been found already."""
        before = self.attachment
        if before is not None and only in (None, before):
            self.attachment = None
            before.http.close()

    def close_if_lost(self, attachment: Attachment) -> None:
        """Close what a call has used to its end, where another was found or none is held: nobody else will."""
        if self.attachment is not attachment:
            attachment.http.close()

    def _require_held(self, *, for_call: bool) -> None:
        if for_call and self.let_go:
            raise catalogue.ENGINE_NOT_RUNNING.error()

    async def _list(self) -> Attachment:
        known = self.attachment
        if known is None or _is_stale(known):
            return await self._look()
        try:
            same = await self._finder.list_again(known)
        except EnginePluginError:
            self.forget(known)
            raise
        return known if same else await self._look()

    async def _look(self) -> Attachment:
        return await self._finding.run(self._find)

    async def _find(self) -> Attachment:
        before = self.attachment
        try:
            found = await (self._finder.find() if before is None else self._finder.look_again(before))
        except EnginePluginError:
            self.forget()
            raise
        if self.let_go:
            found.http.close()  # asked for by who only wants to know; nothing is kept
            return found
        self.attachment = found
        if before is not None:
            before.http.close()
        return found


def _is_stale(attachment: Attachment) -> bool:
    return time.monotonic() - attachment.at >= _STALE
