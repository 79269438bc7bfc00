"""Running a module of ours in a Python process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import engine_plugin
from engine_plugin.engines.child import STDERR, STDOUT, ChildProcess
from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["module_command", "module_environ", "run_briefly"]

_LAST_WORDS = 0.5

_KILL_CONFIRM = 5.0


def module_command(module: str, *arguments: str) -> list[str]:
    """The argv that runs `module` in the interpreter that runs us."""
    return [sys.executable, "-P", "-s", "-m", module, *arguments]


def module_environ(environ: Mapping[str, str], site: Path | None = None) -> dict[str, str]:
    """`environ` for `module_command`: our package, then `site` (an extra package directory), come first."""
    places = [str(Path(engine_plugin.__file__).resolve().parent.parent)]
    if site is not None:
        places.append(str(site))
    return {**environ, "PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1"}


async def run_briefly(
    argv: Sequence[str], env: Mapping[str, str], stdin: bytes = b"", timeout: float = 30.0
) -> tuple[int, bytes, bytes]:
    """Run a short-lived helper process: (exit status, stdout, stderr). Killed when cancelled or too slow, and
    whatever it spawned is killed when it ends.

    Raises BadGatewayError after `timeout` seconds, OSError when it cannot be run.
    """
    heard = {STDOUT: bytearray(), STDERR: bytearray()}
    child = await ChildProcess.spawn(argv, env, lambda stream, data: heard[stream].extend(data), stdin=stdin)
    try:
        child.close_stdin()
        async with asyncio.timeout(timeout):
            await asyncio.wait({child.exited})
        with contextlib.suppress(TimeoutError):  # what it spawned may hold the pipes for ever
            async with asyncio.timeout(_LAST_WORDS):
                await child.drained.wait()
    except TimeoutError:
        raise BadGatewayError(f"{Path(argv[0]).name} gave no answer in {timeout:g} s") from None
    finally:
        await child.kill()
    return child.exited.result(), bytes(heard[STDOUT]), bytes(heard[STDERR])
