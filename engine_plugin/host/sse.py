"""Decodes server-sent events from chunks of bytes, which can be split anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.jsontext import answer_object

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

__all__ = ["EventSplitter", "events"]

_DONE = b"[DONE]"
_EVENT = "an event of the stream"
_BOM = b"\xef\xbb\xbf"
_LINE_ENDS = (b"\n", b"\r\n", b"\r")


class EventSplitter:
    """Collects bytes and returns the data of each whole event (HTML Standard, section 9.2.6).

    Comments and the fields `event`, `id` and `retry` are dropped; several `data` lines are joined by a newline.
    Lines may end in LF, CRLF or CR. One splitter serves one stream.
    """

    def __init__(self) -> None:
        self._rest = bytearray()
        self._data: list[bytes] = []
        self._started = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """Add a chunk and return the data of every completed event."""
        held_cr = self._rest.endswith(b"\r")
        self._rest += chunk
        if not self._started:
            if len(self._rest) < len(_BOM) and _BOM.startswith(self._rest):
                return []
            self._rest = self._rest.removeprefix(_BOM)
            self._started = True
        elif not held_cr and b"\n" not in chunk and b"\r" not in chunk:
            return []  # do not search a long line again with each chunk
        return self._take_lines(final=False)

    def close(self) -> list[bytes]:
        """Return the last event at the end of the stream; many servers omit its blank line."""
        return self._take_lines(final=True) + self._dispatch()

    def _take_lines(self, *, final: bool) -> list[bytes]:
        lines = bytes(self._rest).splitlines(keepends=True)
        # A CR at the end can be the first half of a CRLF: keep the line until the next chunk.
        self._rest = bytearray(lines.pop() if lines and not lines[-1].endswith(b"\n") and not final else b"")
        complete: list[bytes] = []
        for line in lines:
            field, _, value = line.rstrip(b"\r\n").partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif line in _LINE_ENDS:
                complete += self._dispatch()
        return complete

    def _dispatch(self) -> list[bytes]:
        if not self._data:
            return []
        event = b"\n".join(self._data)
        self._data.clear()
        return [event]


async def events(chunks: AsyncIterable[bytes]) -> AsyncIterator[dict[str, Any]]:
    """Decode a stream of server-sent events into JSON objects; `[DONE]` ends it.

    Raises BadGatewayError for data that is not a JSON object. Called with what `PluginClient.stream` returns.
    """
    splitter = EventSplitter()
    async for chunk in chunks:
        for data in splitter.feed(chunk):
            if data == _DONE:
                return
            yield answer_object(data, _EVENT)
    for data in splitter.close():
        if data == _DONE:
            return
        yield answer_object(data, _EVENT)
