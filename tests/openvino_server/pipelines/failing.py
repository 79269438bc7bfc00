"""A worker whose model fails at its first request, in the way that its kind names. Run as a file.

`answer`: its answer cannot be sent. `step`: it ends the worker, as a language model does after a failed step, while
another thread is busy, as with the check of a grammar.
"""

from __future__ import annotations

import runpy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from openvino_server import pipelines

if TYPE_CHECKING:
    from openvino_server.frames import Channel, Inbox


class Unsendable(pipelines.OneAtATime):
    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def run(self, job: pipelines.Job) -> dict[str, Any]:
        return {"number": job.number, "lock": threading.Lock()}


class Broken:
    def __init__(self) -> None:
        self.facts: dict[str, Any] = {}

    def serve(self, inbox: Inbox, channel: Channel) -> None:
        ThreadPoolExecutor(1).submit(threading.Event().wait)
        inbox.get()
        raise SystemExit(1)


def load(settings: dict[str, Any]) -> pipelines.Server:
    return Unsendable() if settings["kind"] == "answer" else Broken()


if __name__ == "__main__":
    pipelines.load = load
    runpy.run_module("openvino_server.worker", run_name="__main__")
