from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from tests.goplugin.hosting import Hosted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    Launch = Callable[..., Awaitable[Hosted]]


@pytest.fixture
async def start(short_dir: Path) -> AsyncIterator[Launch]:
    """Start a plugin with its sockets in `short_dir`. The test fails if anything of it is left."""
    async with AsyncExitStack() as cleanup:

        async def start(*, tls: bool = False, **changes: str) -> Hosted:
            hosted = await Hosted.start(tls=tls, **({"PLUGIN_UNIX_SOCKET_DIR": str(short_dir)} | changes))
            cleanup.push_async_callback(hosted.close)
            return hosted

        yield start


@pytest.fixture
def launch(start: Launch) -> Launch:
    """Start a plugin and wait for its handshake line."""

    async def launch(*, tls: bool = False, **changes: str) -> Hosted:
        return await (await start(tls=tls, **changes)).announced()

    return launch
