"""Ports of 127.0.0.1 for an engine that takes its port as an option: choose one, and find the process that holds it.

Another process may take the port between the choice and the engine's bind. So the plugin sends nothing to the port
before `listens` confirms that the engine holds it. The functions block for some milliseconds: call them in a thread.
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
    """`count` different ports that are free now."""
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
    """The process that listens on the port, as `name (pid 7)`; "another process" if unknown; "" without one."""
    with contextlib.suppress(psutil.Error):  # macOS shows them to root only
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
