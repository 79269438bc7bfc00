"""Streams of engines, read up to their end."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.ollama.answers import collect
from engine_plugin.errors import EnginePluginError
from engine_plugin.transport.answers import stream_events
from tests.transport.test_ndjson import Body

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

EVENT, DONE, ERROR = b'data: {"a": 1}\n\n', b"data: [DONE]\n\n", b'data: {"error": {"message": "broken"}}\n\n'
LINE, LAST, FAILURE = b'{"response": "a"}\n', b'{"response": "b", "done": true}\n', b'{"error": "broken"}\n'


async def events(*blocks: bytes) -> list[bytes]:
    return [block async for block in stream_events(Body(*blocks))]


async def lines(*blocks: bytes) -> dict[str, Any]:
    return await collect("generate", Body(*blocks), "m")


@pytest.mark.parametrize("read", [events, lines])
@pytest.mark.parametrize("end", ["the last one", "an error"])
async def test_generators_are_closed_by_their_readers(read: Callable[..., Awaitable[Any]], end: str) -> None:
    """One that is left to the event loop costs a task and a wake-up for each call."""
    abandoned: list[Any] = []
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(finalizer=abandoned.append)
    one, last, error = (EVENT, DONE, ERROR) if read is events else (LINE, LAST, FAILURE)
    try:
        if end == "an error":
            with pytest.raises(EnginePluginError):
                await read(one, error, one)
        else:
            assert await read(one, last + one, one)
    finally:
        sys.set_asyncgen_hooks(*hooks)
    assert abandoned == []
