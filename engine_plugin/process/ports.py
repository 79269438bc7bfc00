"""Ports of 127.0.0.1, for a foreign engine that must be told one: choosing, and seeing who got it.

Between choosing a port and the engine's bind anybody may take it. So the port is never taken for the engine's
before the engine itself is seen to listen there. Functions block for some milliseconds: call them in a thread.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import psutil

from engine_plugin.process import tree

__all__ = ["free_ports", "holder", "listens"]

_CONNECT_TIMEOUT = 0.5


def free_ports(count: int) -> tuple[int, ...]:
    """So many different ports that are free at this moment."""
    with contextlib.ExitStack() as probes:
        found = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in found:
            probe.bind(("127.0.0.1", 0))
        return tuple(int(probe.getsockname()[1]) for probe in found)


def listens(pid: int, port: int) -> bool:
    """Whether the process, or one of its descendants, listens on the port."""
    with contextlib.suppress(psutil.Error):
        for process in [psutil.Process(pid), *tree.descendants(pid)]:
            with contextlib.suppress(psutil.Error):
                if any(_is_listener(connection, port) for connection in process.net_connections("tcp")):
                    return True
    return False


def holder(port: int) -> str:
    """Who listens on the port, as `name (pid 7)`; "another process" where the system does not say; "" for nobody."""
    with contextlib.suppress(psutil.Error):  # macOS tells root only
        for connection in psutil.net_connections("tcp"):
            if _is_listener(connection, port):
                with contextlib.suppress(psutil.Error):
                    if connection.pid is not None:
                        return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
                return "another process"
        return ""
    with socket.socket() as probe:
        probe.settimeout(_CONNECT_TIMEOUT)
        return "another process" if probe.connect_ex(("127.0.0.1", port)) == 0 else ""


def _is_listener(connection: Any, port: int) -> bool:
    return connection.status == psutil.CONN_LISTEN and bool(connection.laddr) and connection.laddr.port == port
