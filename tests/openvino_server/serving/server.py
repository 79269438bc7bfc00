"""The embedded server with the tests' worker: `python -m tests.openvino_server.serving.server`, settings on stdin."""

from __future__ import annotations

import json
import os
import sys

from engine_plugin.process import guard
from openvino_server.serving import serve
from tests.openvino_server.serving.conftest import WORKER

if __name__ == "__main__":
    guard.arm()
    line = b""
    while not line.endswith(b"\n"):
        line += os.read(0, 1)
    serve(json.loads(line), 0, WORKER)
    sys.exit(1)
