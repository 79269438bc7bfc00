"""Running a module of ours in a Python process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import engine_plugin
from engine_plugin.engines import tree
from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["module_command", "module_environ", "run_briefly"]


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
    """Run a short-lived helper process: (exit status, stdout, stderr). Killed when cancelled or too slow.

    Raises BadGatewayError after `timeout` seconds, OSError when it cannot be run.
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=dict(env),
        **tree.spawn_options(),
    )
    try:
        async with asyncio.timeout(timeout):
            out, err = await process.communicate(stdin)
    except TimeoutError:
        raise BadGatewayError(f"{Path(argv[0]).name} gave no answer in {timeout:g} s") from None
    finally:
        if process.returncode is None:
            tree.kill_tree(process.pid)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await process.wait()
    return process.returncode or 0, out, err
