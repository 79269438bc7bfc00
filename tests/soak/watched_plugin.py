"""The hosted plugin as its host spawns it, with an additional private socket that reports its inside.

It is the one that SOAK_SOCKET names; `inside` says what it tells. An OpenVINO server that this plugin starts does the
same at the one that SOAK_RUNNER_SOCKET names.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from engine_plugin import app
from engine_plugin.goplugin import serve
from engine_plugin.protocol.handshake import COOKIE
from engine_plugin.server.seam import HostedPlugin
from tests.soak import inside

__all__ = ["RUNNER_SOCKET_VARIABLE", "SOCKET_VARIABLE", "main"]

SOCKET_VARIABLE = "SOAK_SOCKET"
RUNNER_SOCKET_VARIABLE = "SOAK_RUNNER_SOCKET"


async def _load() -> HostedPlugin:
    path = os.environ[SOCKET_VARIABLE]
    if RUNNER_SOCKET_VARIABLE in os.environ:
        from engine_plugin.engines.openvino import server

        vars(server)["SERVER_MODULE"] = "tests.soak.watched_runner"
    built = app.from_here(Path.cwd())
    observers = await asyncio.start_unix_server(inside.tell, path)

    async def aclose() -> None:
        observers.close()
        await built.aclose()

    return HostedPlugin(built.services, aclose)


def main() -> int:
    """Run the plugin. Returns the exit status."""
    return serve.run(_load, COOKIE)


if __name__ == "__main__":
    sys.exit(main())
