"""The server of these tests keeps no connection, whenever somebody came."""

from __future__ import annotations

import asyncio
import gc
import socket

import pytest

from tests.models.server import file_server


@pytest.mark.parametrize("steps", range(6))
def test_connection_during_the_end_leaves_no_socket(steps: int) -> None:
    """What nobody closes is a warning, an error here, in whatever test runs when it is found."""

    async def visit() -> None:
        async with file_server(b"") as server:
            client = socket.create_connection(("127.0.0.1", server.port))
            for _ in range(steps):
                await asyncio.sleep(0)
        client.close()

    asyncio.run(visit())
    gc.collect()
