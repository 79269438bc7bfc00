"""The embedded OpenVINO server with an additional private socket that reports its inside (`inside`)."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from openvino_server import __main__ as runner
from openvino_server import serving
from tests.soak import inside

__all__ = ["SOCKET_VARIABLE"]

SOCKET_VARIABLE = "SOAK_RUNNER_SOCKET"

if __name__ == "__main__":
    _serve_http = vars(serving)["serve_http"]

    async def serve_http(*arguments: Any) -> Any:
        """Listen, and let others look in."""
        path = os.environ[SOCKET_VARIABLE]
        if os.path.exists(path):  # noqa: PTH110, ASYNC240  # of a life before, once
            os.unlink(path)  # noqa: PTH108
        await asyncio.start_unix_server(inside.tell, path)
        return await _serve_http(*arguments)

    vars(serving)["serve_http"] = serve_http
    sys.exit(runner.main(["serve"]))
