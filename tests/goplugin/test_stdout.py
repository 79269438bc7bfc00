"""The buffer behind the plugin's standard output. Taking over fd 1 itself is tested in test_serve."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from engine_plugin.goplugin.stdout import OutputBuffer
from tests.patience import LIMIT, within


async def read_all(buffer: OutputBuffer) -> list[bytes]:
    chunks = []
    while chunk := await within(buffer.get()):
        chunks.append(chunk)
    return chunks


@pytest.mark.promise("G21")
async def test_chunks_are_bounded_and_not_empty() -> None:
    buffer = OutputBuffer()
    buffer.put(b"a" * 2500)
    buffer.put(b"")
    buffer.close()
    assert [len(chunk) for chunk in await read_all(buffer)] == [1024, 1024, 452]
    assert buffer.dropped == 0


@pytest.mark.promise("G31")
async def test_full_buffer_drops_the_oldest_output() -> None:
    """A host that does not read blocks no writer."""
    buffer = OutputBuffer(limit=10)
    for number in range(8):
        buffer.put(b"%03d" % number)
    buffer.close()
    assert await read_all(buffer) == [b"4005006007"]
    assert buffer.dropped == 14


async def test_write_from_another_thread_wakes_the_reader() -> None:
    buffer = OutputBuffer()
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)  # one turn of the loop: the reader waits
    thread = threading.Thread(target=buffer.put, args=(b"hello",))
    thread.start()
    assert await within(reader) == b"hello"
    thread.join()


async def test_closing_the_buffer_ends_all_readers() -> None:
    buffer = OutputBuffer()
    readers = [asyncio.create_task(buffer.get()) for _ in range(3)]
    await asyncio.sleep(0)  # one turn of the loop: all three wait
    buffer.close()
    assert await within(asyncio.gather(*readers)) == [b""] * 3


async def test_cancelled_reader_loses_no_output() -> None:
    buffer = OutputBuffer()
    reader = asyncio.create_task(buffer.get())
    await asyncio.sleep(0)  # one turn of the loop: the reader waits
    reader.cancel()
    buffer.put(b"still here")
    await asyncio.wait({reader})
    assert await within(buffer.get()) == b"still here"


def test_reader_of_a_closed_loop_is_removed() -> None:
    buffer = OutputBuffer()

    async def give_up() -> None:
        task = asyncio.create_task(buffer.get())
        await asyncio.sleep(0)  # one turn of the loop: the reader waits
        task.cancel()

    asyncio.run(give_up())
    buffer.put(b"x")
    buffer.close()
    assert asyncio.run(read_all(buffer)) == [b"x"]


FLOOD = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
from engine_plugin.goplugin.stdout import StandardOutput
output = StandardOutput()
os.write(1, b"x" * 200_000)
output.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems read with a thread from the start")
def test_output_is_read_although_the_host_left_sigio_blocked() -> None:
    done = subprocess.run([sys.executable, "-c", FLOOD], capture_output=True, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


# While the loop waits, the signal goes to another thread. Afterwards a signal must still have a handler.
IDLE = r"""
import asyncio, os, signal, sys, threading, time
from engine_plugin.goplugin.stdout import StandardOutput
output = StandardOutput()
begun = threading.Event()
def print_there():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGIO])
    begun.wait()
    time.sleep(0.2)  # nothing tells that the main thread has begun to wait
    os.write(1, b"printed")
    signal.pthread_kill(threading.get_ident(), signal.SIGIO)
async def wait():
    with output.waking_loop():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
        threading.Thread(target=print_there).start()
        asyncio.get_running_loop().call_soon(begun.set)
        sys.stderr.write((await asyncio.wait_for(output.buffer.get(), 30)).decode() + "\n")
asyncio.run(wait())
signal.raise_signal(signal.SIGIO)
sys.stderr.write("alive\n")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems read with a thread from the start")
def test_first_output_wakes_an_idle_loop() -> None:
    done = subprocess.run([sys.executable, "-c", IDLE], capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stderr) == (0, "printed\nalive\n")
