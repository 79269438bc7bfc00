"""The server process: reads settings, prints its address, and exits when stdin ends."""

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
from openvino_server.model import ModelSettings
from openvino_server.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["WORKER", "serve"]

WORKER = (sys.executable, "-P", "-s", "-m", "openvino_server.worker")
_LAST_MOMENT = 1.0
_BURIAL = 0.5


def serve(settings: dict[str, Any], stdin: int, worker: Sequence[str] = WORKER) -> None:
    """Serve until the descriptor `stdin` ends, then exit this process. `worker` is the argv of a worker.

    `settings` are those of docs/openvino-server.md. Raises ValueError and TypeError for invalid ones, OSError when it
    cannot listen.
    """
    for name in {"config", "cache_dir"} & settings.keys():  # workers run in the root directory
        settings[name] = settings[name] and str(Path(settings[name]).absolute())
    asyncio.run(_serve(settings, stdin, worker))


async def _serve(settings: dict[str, Any], stdin: int, worker: Sequence[str]) -> None:
    if missing := {"host", "key", "config"} - settings.keys():
        raise ValueError(f"missing: {', '.join(sorted(missing))}")
    known = {field.name for field in fields(ModelSettings)}
    registry = Registry(
        Path(settings["config"]),
        ModelSettings(**{name: value for name, value in settings.items() if name in known}),
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
    gc.freeze()  # the collector need not visit what stays until the end
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
            os._exit(0)  # the loop hangs; the workers exit when their stdin ends

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _bury_children() -> None:
    """Reap the killed workers, for `_BURIAL` seconds at most: the first process of a container, which would inherit
    them, may never do it. Windows has no zombies."""
    give_up = time.monotonic() + _BURIAL
    if sys.platform != "win32":
        while time.monotonic() < give_up:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                time.sleep(0.002)
