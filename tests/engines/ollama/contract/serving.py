"""`serve` of the contract server: its address, its log and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

from .app import application
from .library import MODELS, Library
from .state import Memory, State, now, queue_limit

if TYPE_CHECKING:
    from .program import Options

__all__ = ["serve"]


def _address() -> tuple[str, int]:
    """The address in OLLAMA_HOST."""
    given = os.environ.get("OLLAMA_HOST", "").strip()
    given = given.partition("://")[2] if "://" in given else given
    given = given.partition("/")[0]
    host, _, port = given.rpartition(":") if ":" in given else (given, "", "11434")
    return host.strip("[]") or "127.0.0.1", int(port)


async def serve(options: Options) -> int:
    """Serve until a signal, and return the exit status."""
    environ = os.environ
    folder = Path(environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    state = State(
        library=Library(folder, () if options.bare else MODELS),
        memory=Memory(
            runners=options.runners,
            keep_alive=environ.get("OLLAMA_KEEP_ALIVE", ""),
            context=int(environ.get("OLLAMA_CONTEXT_LENGTH") or 4096),
        ),
        version=options.version,
        queue_limit=queue_limit(environ),
        cloud=environ.get("OLLAMA_NO_CLOUD", "") in ("", "0", "false"),
    )
    runner = web.AppRunner(
        application(state), handler_cancellation=True, access_log=None, shutdown_timeout=0.1, handle_signals=False
    )
    await runner.setup()
    host, port = _address()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        print(f"Error: listen tcp {host}:{port}: bind: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        await runner.cleanup()
        return 1
    try:
        bound = runner.addresses[0]
        _log("images.go:919", 'msg="total blobs: 0"')
        _log("routes.go:2006", f'msg="Listening on {bound[0]}:{bound[1]} (version {options.version})"')
        _log("types.go:60", f'msg="inference compute" id=0 library={options.device} compute="" name={options.device}')
        await _ended(options)
    finally:
        state.memory.clear()
        await runner.cleanup()
    return 0


def _log(place: str, words: str) -> None:
    print(f"time={now()} level=INFO source={place} {words}", file=sys.stderr, flush=True)


async def _ended(options: Options) -> None:
    """Wait for a signal to stop."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, end.set)
    if options.until_stdin_ends:

        def watch() -> None:
            sys.stdin.buffer.read()
            with contextlib.suppress(RuntimeError):  # the loop may be gone already
                loop.call_soon_threadsafe(end.set)

        threading.Thread(target=watch, daemon=True).start()
    await end.wait()
