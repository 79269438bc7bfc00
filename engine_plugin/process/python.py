"""Run helper programs that end with this process: modules of this package, and foreign programs."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import engine_plugin
from engine_plugin.errors import BadGatewayError
from engine_plugin.process import guard
from engine_plugin.process.child import STDERR, STDOUT, ChildProcess
from engine_plugin.process.environ import child_environ
from engine_plugin.process.lines import Lines
from engine_plugin.waiting import comes_true

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

__all__ = [
    "guarded",
    "module_command",
    "module_environ",
    "own_command",
    "own_environ",
    "run_briefly",
    "run_with_output",
]

_LAST_WORDS = 0.5
_LINE_LIMIT = 16 * 1024
_PYTHON = (sys.executable, "-P", "-s", "-m")
_FOREIGN = ("pip",)  # modules that do not arm themselves


def guarded(argv: Sequence[str]) -> list[str]:
    """argv that runs the foreign program `argv` below the guard, which ends it and its descendants with this process.

    Spawn it with `ChildProcess`, which sets the guard's parent. On Windows it is `argv` itself, because a Job Object
    replaces the guard. The guard runs as a file without the `site` module, which starts sooner than `-m`.
    """
    if sys.platform == "win32":
        return list(argv)
    return [sys.executable, "-I", "-S", guard.__file__, *argv]


def module_command(module: str, *arguments: str) -> list[str]:
    """The argv that runs `module` in the interpreter of this process."""
    return [*_PYTHON, module, *arguments]


def module_environ(environ: Mapping[str, str], site: Path | None = None) -> dict[str, str]:
    """The environment for `module_command`: this package, then `site` (an extra package directory), come first.

    `environ` is that of this process, or of another child. File names have the same encoding as in this process.
    """
    utf8 = "1" if sys.getfilesystemencoding() == "utf-8" else "0"
    places = [str(Path(engine_plugin.__file__).resolve().parent.parent)]
    if site is not None:
        places.append(str(site))
    ours = {"PYTHONPATH": os.pathsep.join(places), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": utf8}
    return {**child_environ(environ), **ours}


def own_command(module: str, *arguments: str) -> list[str]:
    """The argv that runs another part of this program, such as the plugin for the command line.

    It finds the same packages as this process, those in the user's own directory of packages too.
    """
    site = [] if _uses_user_site() else ["-s"]
    return [sys.executable, "-P", *site, "-m", module, *arguments]


def own_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for `own_command`: PYTHONPATH stays, without its relative directories."""
    given = [place for place in environ.get("PYTHONPATH", "").split(os.pathsep) if Path(place).is_absolute()]
    places = [str(Path(engine_plugin.__file__).resolve().parent.parent), *given]
    return {**environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(places)), "PYTHONUTF8": "1"}


def _uses_user_site() -> bool:
    import site

    return bool(site.ENABLE_USER_SITE) and site.getusersitepackages() in sys.path


async def run_briefly(
    argv: Sequence[str], env: Mapping[str, str], stdin: bytes = b"", timeout: float = 30.0
) -> tuple[int, bytes, bytes]:
    """Run a short-lived helper process: (exit status, stdout, stderr). It is killed after a cancel or `timeout`, and
    its descendants when it ends.

    It ends with this process: a module of this package (`module_command`) arms itself, another program runs below the
    guard, unless it gets `stdin`. Raises BadGatewayError after `timeout` seconds, OSError when it cannot be run.
    """
    captured = {STDOUT: bytearray(), STDERR: bytearray()}
    try:
        async with (
            _running(argv, env, lambda stream, data: captured[stream].extend(data), stdin) as child,
            asyncio.timeout(timeout),
        ):
            await asyncio.wait({child.exited})
    except TimeoutError:
        raise BadGatewayError(f"{Path(argv[0]).name} gave no answer in {timeout:g} s") from None
    return child.exited.result(), bytes(captured[STDOUT]), bytes(captured[STDERR])


async def run_with_output(argv: Sequence[str], env: Mapping[str, str], tell: Callable[[str], None]) -> int:
    """Run a program without a time limit, such as pip; `tell` gets each line of its output. Returns its status.

    It ends with this process and with this call, as in `run_briefly`. Raises OSError when it cannot be run.
    """
    output = {STDOUT: Lines(_LINE_LIMIT), STDERR: Lines(_LINE_LIMIT)}

    def feed(stream: int, data: bytes) -> None:
        for line in output[stream].feed(data):
            tell(line)

    async with _running(argv, env, feed) as child:
        await asyncio.wait({child.exited})
    for line in output[STDOUT].end() + output[STDERR].end():
        tell(line)
    return child.exited.result()


@asynccontextmanager
async def _running(
    argv: Sequence[str], env: Mapping[str, str], take: Callable[[int, bytes], None], stdin: bytes = b""
) -> AsyncIterator[ChildProcess]:
    """Run a helper with a closed stdin; afterwards read its last output and end its whole tree."""
    ours = tuple(argv[:4]) == _PYTHON and argv[4] not in _FOREIGN
    if not ours and not stdin:
        _require_program(argv[0], env)
        argv = guarded(argv)
    child = ChildProcess(take=take)
    await child.spawn(argv, env, stdin=stdin)
    try:
        child.close_stdin()
        yield child
        await comes_true(child.drained.wait(), within=_LAST_WORDS)  # a descendant may hold the pipes for ever
    finally:
        await child.kill()


def _require_program(name: str, env: Mapping[str, str]) -> None:
    """Raise the OSError of a missing program, because a guard could not."""
    if shutil.which(name, path=env.get("PATH")) is None:
        number = errno.EACCES if Path(name).exists() else errno.ENOENT
        raise OSError(number, os.strerror(number), name)
