"""An answer whose first bytes have been looked at: whether it is a stream is seen there, not in its content type."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.engines.openai.requests import is_json
from engine_plugin.transport.http1 import HttpResponse

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Begun"]


class Begun(HttpResponse):
    """The answer from its first byte on. `is_whole`: it comes at once, though perhaps a stream was asked for."""

    def __init__(self, response: HttpResponse, first: bytes, *, is_whole: bool) -> None:
        self.status = response.status
        self.is_whole = is_whole
        self._response = response
        self._first = first

    @classmethod
    async def of(cls, response: HttpResponse, *, streams: bool) -> Self:
        """Wait for the first byte of what shall stream; servers that do not know how answer, or complain, at once."""
        if not streams:
            return cls(response, b"", is_whole=True)
        first = b""
        while not first.strip() and (more := await response.read_some()):
            first = (first + more).lstrip()
        return cls(response, first, is_whole=is_json(first))

    async def read_some(self) -> bytes:
        first, self._first = self._first, b""
        return first or await self._response.read_some()

    async def read(self, limit: int) -> bytes:
        first, self._first = self._first, b""
        return first + await self._response.read(max(0, limit - len(first)))
