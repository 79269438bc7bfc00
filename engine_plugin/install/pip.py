"""Installs Python packages into a directory of their own, with the pip that engine-plugin depends on.

Of the user's pip settings (`PIP_*` variables and pip.conf) only those about indexes, proxies and certificates apply.
Settings such as `user` or `target`, which choose where pip installs, would break an installation into the data
directory.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine_plugin.download.disk import NO_ROOM, disk_reason
from engine_plugin.download.events import ChunkProgress
from engine_plugin.errors import InstallError
from engine_plugin.process import python

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.base import Progress

__all__ = ["install_packages"]

_OUTPUT_LINES = 4
_FILE = re.compile(r"Downloading (?:\S*/)?([^\s/]+)")
_ARRIVED = re.compile(r"Progress (\d{1,18}) of (\d{1,18})")
_INSTALLING = re.compile(r"Installing collected packages: (.+)")
_ERRNO = re.compile(r"\[Errno (\d{1,4})\]")
_NETWORK_SETTINGS = (
    "index-url",
    "extra-index-url",
    "no-index",
    "find-links",
    "proxy",
    "cert",
    "client-cert",
    "trusted-host",
    "keyring-provider",
    "use-deprecated",
    "timeout",
    "retries",
    "cache-dir",
    "no-cache-dir",
)
_SETTING = re.compile(rf"(global|install)\.({'|'.join(_NETWORK_SETTINGS)})=(['\"].*)")
_LINE_ENDS = re.compile(r"\s*\n\s*")
_CONFIG_FILE = "PIP_CONFIG_FILE"
_SETTINGS_OUTPUT = 300


async def install_packages(
    target: Path,
    requirements: Sequence[str],
    environ: Mapping[str, str],
    progress: Progress,
    *,
    scratch: Path,
    wheels: Path | None = None,
) -> None:
    """Install wheels into `target`. `requirements` are arguments of pip: names, or `-r` and a file.

    `scratch` is a directory for temporary files on the same disk, which the caller removes. With `wheels`, pip takes
    wheels from that directory only and uses no network. `progress` gets the bytes of each download by file name.
    Raises InstallError with the end of pip's output.
    """
    home = _pip_home()
    argv = python.module_command("pip", "install", "--no-input", "--disable-pip-version-check", "--target")
    argv += [str(target), "--only-binary", ":all:", "--progress-bar", "raw", "--no-warn-conflicts"]
    if wheels is not None:
        argv += ["--no-index", "--find-links", str(wheels)]
    output = _Output(progress)
    try:
        env = {**await _pip_environ(environ, home), **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
        status = await python.run_with_output([*argv, *requirements], env, output.take)
    except OSError as error:
        raise InstallError(f"pip cannot be run: {error.strerror or error}") from error
    if status != 0:
        fix = f"Put the wheels into {wheels}" if wheels else "Check the network and pip's settings (`pip config`)"
        if full := output.errnos & NO_ROOM:
            number = full.pop()
            reason = disk_reason(OSError(number, os.strerror(number)), scratch)
            fix = f"{target}: {reason}. Free space there or in pip's cache, or move the data directory"
        raise InstallError(f"pip failed: {output.tail()}. {fix}")


class _Output:
    """Reads pip's output line by line: downloads are reported as progress, the last lines explain a failure."""

    def __init__(self, progress: Progress) -> None:
        self.errnos: set[int] = set()
        self._progress = progress
        self._file = ""
        self._lines: list[str] = []

    def take(self, line: str) -> None:
        """Read a line of stdout or stderr."""
        text = line.strip()
        if arrived := _ARRIVED.fullmatch(text):
            self._progress(ChunkProgress(self._file, int(arrived[1]), int(arrived[2])))
            return
        if file := _FILE.match(text):
            self._file = file[1]
        elif packages := _INSTALLING.fullmatch(text):
            self._progress(f"installing {packages[1]}")
        if text:
            self._lines = [*self._lines[1 - _OUTPUT_LINES :], text]
            self.errnos |= {int(number) for number in _ERRNO.findall(text)}

    def tail(self) -> str:
        """The last lines of the output."""
        return " | ".join(self._lines)


def _pip_home() -> Path:
    """The directory that contains pip. In a built plugin directory, only this package's path has it."""
    spec = importlib.util.find_spec("pip")
    if spec is None or spec.origin is None:
        raise InstallError(
            f"pip, a dependency of engine-plugin, is not installed for {sys.executable}. Reinstall engine-plugin "
            "with its dependencies"
        )
    return Path(os.fspath(spec.origin)).parent.parent


async def _pip_environ(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """The environment for pip, with the user's network settings as `PIP_*` variables.

    `home` is the directory that contains pip, `environ` the user's environment. Raises InstallError if pip cannot
    read its settings, OSError if pip cannot be run.
    """
    clean = {name: value for name, value in environ.items() if not name.upper().startswith("PIP_")}
    env = python.module_environ(clean, home)
    files = {_CONFIG_FILE: environ[_CONFIG_FILE]} if _CONFIG_FILE in environ else {}
    # -vvv overrides `quiet` in a file; _SETTING skips the additional output.
    argv = python.module_command("pip", "-vvv", "config", "list")
    status, out, err = await python.run_briefly(argv, {**env, **files})
    if status != 0:
        words = " | ".join((err.strip() or out.strip()).decode("utf-8", "replace").splitlines())
        raise InstallError(
            f"pip cannot read its settings: {words[-_SETTINGS_OUTPUT:] or f'exit code {status}'}. "
            f"Correct the file, or name another one in {_CONFIG_FILE}"
        )
    found = _settings_of_files(out.decode("utf-8", "replace"))
    for name in _NETWORK_SETTINGS:
        if value := environ.get(_variable(name), "").strip():
            found[name] = value
    return {**env, **{_variable(name): value for name, value in found.items()}, _CONFIG_FILE: os.devnull}


def _settings_of_files(listed: str) -> dict[str, str]:
    """The network settings in the output of `pip config list`; those of `install` override those of `global`."""
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}}
    for line in listed.splitlines():
        if match := _SETTING.fullmatch(line.strip()):
            section, name, value = match.groups()
            sections[section][name] = _LINE_ENDS.sub(" ", str(ast.literal_eval(value))).strip()
    return {name: value for name, value in (sections["global"] | sections["install"]).items() if value}


def _variable(name: str) -> str:
    return f"PIP_{name.upper().replace('-', '_')}"
