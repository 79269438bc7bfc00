"""The server's process: settings in, address out, and an end with the end of stdin."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvino_server.app import make_app, serve_http
from openvino_server.model import RunnerSettings
from openvino_server.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WORKER", "serve"]

WORKER = (sys.executable, "-P", "-s", "-m", "openvino_server.worker")
_LAST_MOMENT = 1.0
_BURIAL = 0.5


def serve(settings: dict[str, Any], stdin: int, worker: Sequence[str] = WORKER) -> None:
    """Serve until the descriptor `stdin` ends, then exit at once. `settings` come from the driver; `worker` runs a
    worker.

    Raises OSError when it cannot listen.
    """
    asyncio.run(_serve(settings, stdin, worker))


async def _serve(settings: dict[str, Any], stdin: int, worker: Sequence[str]) -> None:
    known = {field.name for field in fields(RunnerSettings)}
    registry = Registry(
        Path(settings["config"]),
        RunnerSettings(**{name: value for name, value in settings.items() if name in known}),
        worker,
        os.environ,
    )
    _exit_when_stdin_ends(registry, stdin)
    host = settings["host"]
    try:
        http, address = await serve_http(make_app(registry, settings["key"]), host, settings.get("port", 0))
    except OSError as error:
        raise OSError(f"cannot listen on {host}: {error.strerror or error}") from error
    print(json.dumps({"address": address}), flush=True)
    registry.load_soon()
    gc.freeze()  # what is there now stays; it need not be looked through again and again
    try:
        await asyncio.Event().wait()
    finally:
        await http.cleanup()


def _exit_when_stdin_ends(registry: Registry, stdin: int) -> None:
    """End all workers and this process when the other end of `stdin` is closed."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        registry.kill()
        _bury_children()
        os._exit(0)

    def watch() -> None:
        try:
            while os.read(stdin, 4096):
                pass
        finally:
            loop.call_soon_threadsafe(end)
            threading.Event().wait(_LAST_MOMENT)
            os._exit(0)  # the loop hangs; the workers notice the end of their stdin

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _bury_children() -> None:
    """Wait, but not for long, until the killed are gone: who inherits them, such as the first process of a container,
    may never do that, and Windows need not."""
    give_up = time.monotonic() + _BURIAL
    if sys.platform != "win32":
        while time.monotonic() < give_up:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                time.sleep(0.002)
