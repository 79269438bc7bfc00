"""Reads and writes files for commands; `-` is standard input or output."""

from __future__ import annotations

import asyncio
import io
import os
import sys
import threading
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_plugin.errors import InvalidRequestError
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

__all__ = ["STANDARD", "check_target", "pieces", "read_bytes", "read_text", "texts", "write_bytes"]

STANDARD = "-"
_PIECE = 32 * 1024
_AHEAD = 8
_MOST_TEXT = 32 * 1024 * 1024
_PICTURES = {"png", "jpg", "jpeg", "gif", "webp", "bmp", "tif", "tiff", "svg", "avif"}
_SOUNDS = {"wav", "mp3", "ogg", "oga", "opus", "flac", "m4a", "aac", "webm", "mp4"}


async def pieces(source: str) -> AsyncGenerator[bytes, None]:
    """Yield the content of a file or standard input as it arrives. Raises OSError.

    A daemon thread reads. The loop would wait for a thread of its own pool at exit, and a read from a terminal does
    not return after Ctrl-C.
    """
    loop, came, room = asyncio.get_running_loop(), asyncio.Queue[bytes | OSError](), threading.Semaphore(_AHEAD)
    left = threading.Event()

    def deliver(what: bytes | OSError) -> None:
        try:
            loop.call_soon_threadsafe(came.put_nowait, what)
        except RuntimeError:  # the loop is closed
            left.set()

    reader = threading.Thread(target=_read, args=(source, deliver, room, left), name="read input", daemon=True)
    reader.start()
    try:
        while what := await came.get():
            if isinstance(what, OSError):
                raise what
            room.release()
            yield what
    finally:
        left.set()
        room.release()


def _read(
    source: str, deliver: Callable[[bytes | OSError], None], room: threading.Semaphore, left: threading.Event
) -> None:
    standard = source == STANDARD
    try:
        with io.FileIO(sys.stdin.fileno() if standard else source, closefd=not standard) as file:
            while room.acquire() and not left.is_set() and (data := os.read(file.fileno(), _PIECE)):
                deliver(data)
    except OSError as error:
        deliver(error)
    else:
        deliver(b"")


async def read_bytes(source: str, most: int, remedy: str) -> bytes:
    """Return the content of a file or standard input. Raises OSError, or InvalidRequestError above `most` bytes."""
    data = bytearray()
    async with aclosing(pieces(source)) as parts:
        async for part in parts:
            data += part
            if len(data) > most:
                name = "standard input" if source == STANDARD else source
                raise InvalidRequestError(f"{name} exceeds the limit of {byte_size(most)}. {remedy}")
    return bytes(data)


async def read_text(source: str) -> str:
    """Return the content as text. Raises OSError, or InvalidRequestError if it is too long or not UTF-8."""
    try:
        return (await read_bytes(source, _MOST_TEXT, "Send less text")).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8 (byte {error.start})") from None


async def texts(arguments: Sequence[str]) -> list[str]:
    """Return the arguments, with the non-empty lines of standard input in place of `-`."""
    found: list[str] = []
    for argument in arguments:
        if argument == STANDARD:
            found += [line for line in (await read_text(STANDARD)).splitlines() if line.strip()]
        else:
            found.append(argument)
    return found


def check_target(target: str, form: str = "") -> None:
    """Check before the call that `write_bytes` can write to `target`. Raises click.UsageError.

    `form` is `png` or `wav`, which are not written to a terminal or under another extension; "" is text.
    """
    if target == STANDARD:
        if form and sys.stdout.isatty():
            raise click.UsageError(f"cannot write {form.upper()} to a terminal. Name a file: -o FILE")
        return
    path = Path(target)
    if target.endswith(("/", os.sep)) or path.is_dir():
        raise click.UsageError(f"{target} is a directory. Name a file in it")
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"{target}: the directory does not exist. Create it, or name another file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise click.UsageError(f"{target}: permission denied. Name another file")
    if form and path.suffix[1:].lower() in (_PICTURES | _SOUNDS) - {form}:
        raise click.UsageError(f"{target}: the output is {form.upper()}. Name it {path.with_suffix('.' + form).name}")


def write_bytes(target: str, data: bytes) -> None:
    """Write a file or standard output. Raises OSError."""
    if target != STANDARD:
        Path(target).write_bytes(data)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
