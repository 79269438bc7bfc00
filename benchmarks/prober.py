"""Polls a server's health from a separate process, so that the benchmark's other work does not delay it.

`python -m benchmarks.prober ADDRESS PATH`: ADDRESS is HOST:PORT or unix:PATH. A line on stdin begins asking, the next
ends it and is answered with a JSON list on stdout: the milliseconds of each answer.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time

__all__ = ["main"]

_PAUSE = 0.01
_ANSWER_LIMIT = 10.0


def _connect(address: str) -> socket.socket:
    if address.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_ANSWER_LIMIT)
        connection.connect(address.removeprefix("unix:"))
        return connection
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), _ANSWER_LIMIT)


def _ask(address: str, path: str) -> float:
    """One question over a connection of its own. Returns the milliseconds; raises RuntimeError when not healthy."""
    began = time.perf_counter()
    with _connect(address) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
        answer = connection.recv(4096)
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(f"not healthy: {answer[:100]!r}")
    return (time.perf_counter() - began) * 1000


def main(arguments: list[str]) -> int:
    """Answer until stdin ends."""
    address, path = arguments
    while sys.stdin.readline():
        stop = threading.Event()
        waiter = threading.Thread(target=lambda stop=stop: (sys.stdin.readline(), stop.set()), daemon=True)
        waiter.start()
        found = [_ask(address, path)]
        while not stop.wait(_PAUSE):
            found.append(_ask(address, path))
        waiter.join()
        print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
