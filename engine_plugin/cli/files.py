"""What commands read and write: files, and `-` for standard input and output."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

__all__ = ["STANDARD", "check_target", "pieces", "read_bytes", "read_text", "texts", "write_bytes"]

STANDARD = "-"
_PIECE = 32 * 1024
_AHEAD = 8
_MOST_TEXT = 32 * 1024 * 1024
_MEDIA = {"png", "jpg", "jpeg", "gif", "webp", "bmp", "tif", "tiff", "svg", "avif"} | {
    "wav",
    "mp3",
    "ogg",
    "oga",
    "opus",
    "flac",
    "m4a",
    "aac",
    "webm",
    "mp4",
}


async def pieces(source: str) -> AsyncGenerator[bytes, None]:
    """What a file or standard input holds, as it comes. Raises OSError.

    A thread of its own reads, which ends with the process: one of the loop's would have to be waited for, and a
    person who presses Ctrl-C gives no more input.
    """
    loop, came, room = asyncio.get_running_loop(), asyncio.Queue[bytes | OSError](), threading.Semaphore(_AHEAD)
    left = threading.Event()

    def tell(what: bytes | OSError) -> None:
        try:
            loop.call_soon_threadsafe(came.put_nowait, what)
        except RuntimeError:  # the loop is closed: nobody listens
            left.set()

    reader = threading.Thread(target=_read, args=(source, tell, room, left), name="read input", daemon=True)
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
    source: str, tell: Callable[[bytes | OSError], None], room: threading.Semaphore, left: threading.Event
) -> None:
    try:
        file = sys.stdin.fileno() if source == STANDARD else os.open(source, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            while room.acquire() and not left.is_set() and (data := os.read(file, _PIECE)):
                tell(data)
        finally:
            if source != STANDARD:
                os.close(file)
    except OSError as error:
        tell(error)
    else:
        tell(b"")


async def read_bytes(source: str, most: int, remedy: str) -> bytes:
    """All that a file or standard input holds. Raises OSError, InvalidRequestError when it is more than `most`."""
    data = bytearray()
    async with aclosing(pieces(source)) as parts:
        async for part in parts:
            data += part
            if len(data) > most:
                name = "standard input" if source == STANDARD else source
                raise InvalidRequestError(
                    f"{name} holds more than the {most >> 20} MiB that a request takes. {remedy}"
                )
    return bytes(data)


async def read_text(source: str) -> str:
    """The same as text. Raises InvalidRequestError when it is none."""
    try:
        return (await read_bytes(source, _MOST_TEXT, "Give less at once.")).decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"standard input is not UTF-8 (byte {error.start})") from None


async def texts(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the lines of standard input in the place of `-`; empty lines are passed over."""
    found: list[str] = []
    for argument in arguments:
        if argument == STANDARD:
            found += [line for line in (await read_text(STANDARD)).splitlines() if line.strip()]
        else:
            found.append(argument)
    return found


def check_target(target: str, form: str = "") -> None:
    """Notice before the work what would keep `write_bytes` from writing. Raises click.UsageError.

    `form` is png or wav, which no terminal can show and no other name should be given to; "" is text.
    """
    if target == STANDARD:
        if form and sys.stdout.isatty():
            raise click.UsageError("standard output is a terminal, which cannot show this. Name a file: -o FILE")
        return
    path = Path(target)
    if target.endswith(("/", os.sep)) or path.is_dir():
        raise click.UsageError(f"{target} is a directory. Name the file in it that is to be written")
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"there is no directory for {target}. Create it, or name another file")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise click.UsageError(f"{target} may not be written by this user. Name another file")
    if form and path.suffix[1:].lower() in _MEDIA - {form}:
        raise click.UsageError(f"{target} would hold {form.upper()}. Name it {path.with_suffix('.' + form).name}")


def write_bytes(target: str, data: bytes) -> None:
    """Write a file or standard output. Raises OSError."""
    if target != STANDARD:
        Path(target).write_bytes(data)
        return
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
