"""A worker in which another thread is busy and gives up Python's lock only every 5 ms. Run as a file."""

from __future__ import annotations

import runpy
import sys
import threading


def spin() -> None:
    while True:
        sys.setswitchinterval(0.005)  # again, since the worker sets its own
        sum(range(3000))


if __name__ == "__main__":
    threading.Thread(target=spin, daemon=True).start()
    runpy.run_module("openvino_server.worker", run_name="__main__")
