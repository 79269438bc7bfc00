"""Starts and ends the background server of a plugin, which runs in a session of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from typing import TYPE_CHECKING

import psutil

from engine_plugin import catalogue
from engine_plugin.cli.serve import LOG_VARIABLE
from engine_plugin.cli.server_record import ServerRecord, ServerRecordStore, is_server_process
from engine_plugin.errors import DeadlineError, PreconditionError
from engine_plugin.process.python import own_command, own_environ
from engine_plugin.system.files import in_thread, private_folder

if TYPE_CHECKING:
    from pathlib import Path

    from engine_plugin.manifest import Manifest

__all__ = ["end_server", "start_server"]

_READY = 30.0
_LOOK_AGAIN = 0.05
# `serve` stops the engine first, within a bound of its own; after this time it is killed.
_END = 40.0
_LOG_TAIL = 5
# On Windows; elsewhere it has a session of its own.
_APART = getattr(subprocess, "DETACHED_PROCESS", 0) | getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


async def start_server(manifest: Manifest) -> ServerRecord:
    """Run `serve` in the background and return its record once it is ready.

    Raises PreconditionError with the end of its log if it exits, DeadlineError if it takes too long, and
    DownloadError if its log cannot be written.
    """
    log = manifest.data_dir / "logs" / "server.log"
    try:
        private_folder(log.parent)
        process = _spawn(manifest, log)
    except OSError as error:
        raise catalogue.DISK_WRITE_REFUSED.error(
            place=error.filename or log, reason=error.strerror or error
        ) from error
    try:
        record = await _wait_ready(process, ServerRecordStore(manifest), log)
    except BaseException:
        process.terminate()
        await in_thread(process.wait, _END)
        raise
    if process.poll() is None:
        process.returncode = 0  # it keeps running; without this, Popen warns when it is collected
    return record


async def _wait_ready(process: subprocess.Popen[bytes], records: ServerRecordStore, log: Path) -> ServerRecord:
    deadline = time.monotonic() + _READY
    while (record := records.find()) is None:
        # Polled, because a file and a process of another session cannot be awaited on every system.
        if process.poll() is not None and not records.is_taken():  # taken by the server of a concurrent command
            raise PreconditionError(f"the server exited with code {process.returncode}: {_tail(log)} (log: {log})")
        if time.monotonic() > deadline:
            raise DeadlineError(f"the server was not ready within {_READY:g} s and was stopped. See its log: {log}")
        await asyncio.sleep(_LOOK_AGAIN)
    return record


def _spawn(manifest: Manifest, log: Path) -> subprocess.Popen[bytes]:
    command = own_command("engine_plugin.cli.main", "serve", "--plugin", str(manifest.plugin_dir))
    log.touch(0o600)
    log.chmod(0o600)  # the umask may have removed more
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=manifest.plugin_dir,
            env=own_environ(os.environ) | {LOG_VARIABLE: str(log)},
            start_new_session=True,
            creationflags=_APART,
        )


async def end_server(record: ServerRecord) -> None:
    """End the recorded process unless its pid was reused: SIGTERM, wait, SIGKILL, wait."""
    process = is_server_process(record)
    if process is None:
        return
    try:
        process.terminate()
        await in_thread(process.wait, _END)
    except psutil.TimeoutExpired:
        process.kill()
        await in_thread(process.wait, _END)
    except psutil.NoSuchProcess:
        pass


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_TAIL:]
    return " | ".join(lines) or "no output"
