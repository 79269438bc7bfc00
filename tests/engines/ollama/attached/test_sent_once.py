"""Requests that change an attached server are sent once."""

from __future__ import annotations

import asyncio

import pytest

from engine_plugin.errors import EnginePluginError

from .conftest import attached_server

VERSION = b'{"version": "0.30.0"}'


async def test_post_is_not_resent() -> None:
    """The server reads the request on an idle connection and closes it without an answer."""
    posts = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal posts
        try:
            while not (head := await reader.readuntil(b"\r\n\r\n")).startswith(b"POST"):
                body = VERSION if b"/api/version" in head else b"Ollama is running"
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            posts += 1
        except asyncio.IncompleteReadError:
            pass  # the client has gone
        finally:
            writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        server = attached_server(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}")
        try:
            client = await server.find()
            assert client is not None
            with pytest.raises(EnginePluginError):
                async with client.request("POST", "/api/pull", b"{}"):
                    pass
        finally:
            await server.detach()
    assert posts == 1
