"""The contract server as a program. See the package for how it is called."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from .app import application
from .library import MODELS, Library
from .state import Memory, State, now, queue_limit

__all__ = ["main"]

_VERSION = "0.33.1"


@dataclass(frozen=True)
class _Wish:
    """How it shall differ from what is usual."""

    version: str
    bare: bool
    runners: bool
    until_stdin_ends: bool
    device: str


def main(argv: list[str]) -> int:
    """Run it; the exit status."""
    parser = argparse.ArgumentParser(prog="ollama")
    parser.add_argument("command", nargs="?", choices=("serve",))
    parser.add_argument("--version", "-v", action="store_true")
    parser.add_argument("--be-version", default=_VERSION)
    parser.add_argument("--bare", action="store_true", help="begin without models")
    parser.add_argument("--runners", action="store_true", help="a process for each loaded model")
    parser.add_argument("--until-stdin-ends", action="store_true")
    parser.add_argument("--device", default="", help="compute on one of these, such as CUDA, unless it is hidden")
    parser.add_argument("--fail", default="", help="do not serve, but end with these words")
    given = parser.parse_args(argv)
    if given.version:
        print("Warning: could not connect to a running Ollama instance")
        print(f"Warning: client version is {given.be_version}")
        return 0
    if given.command != "serve":
        parser.print_help()
        return 0
    if given.fail:
        print(f"Error: {given.fail}", file=sys.stderr)
        return 1
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "-1"
    device = given.device if given.device and not hidden else "cpu"
    wish = _Wish(given.be_version, given.bare, given.runners, given.until_stdin_ends, device)
    return asyncio.run(_serve(wish))


def _address() -> tuple[str, int]:
    """Where OLLAMA_HOST says that it shall listen."""
    given = os.environ.get("OLLAMA_HOST", "").strip()
    given = given.partition("://")[2] if "://" in given else given
    given = given.partition("/")[0]
    host, _, port = given.rpartition(":") if ":" in given else (given, "", "11434")
    return host.strip("[]") or "127.0.0.1", int(port)


async def _serve(wish: _Wish) -> int:
    environ = os.environ
    folder = Path(environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")
    state = State(
        library=Library(folder, () if wish.bare else MODELS),
        memory=Memory(
            runners=wish.runners,
            keep_alive=environ.get("OLLAMA_KEEP_ALIVE", ""),
            context=int(environ.get("OLLAMA_CONTEXT_LENGTH") or 4096),
        ),
        version=wish.version,
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
        _log("routes.go:2006", f'msg="Listening on {bound[0]}:{bound[1]} (version {wish.version})"')
        _log("types.go:60", f'msg="inference compute" id=0 library={wish.device} compute="" name={wish.device}')
        await _ended(wish)
    finally:
        state.memory.clear()
        await runner.cleanup()
    return 0


def _log(place: str, words: str) -> None:
    print(f"time={now()} level=INFO source={place} {words}", file=sys.stderr, flush=True)


async def _ended(wish: _Wish) -> None:
    """Until somebody asks it to end."""
    loop, end = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(NotImplementedError):  # Windows
            loop.add_signal_handler(number, end.set)
    if wish.until_stdin_ends:

        def watch() -> None:
            sys.stdin.buffer.read()
            with contextlib.suppress(RuntimeError):  # the loop may be gone already
                loop.call_soon_threadsafe(end.set)

        threading.Thread(target=watch, daemon=True).start()
    await end.wait()
