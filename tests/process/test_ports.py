"""Which process holds a port of 127.0.0.1."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing

import psutil
import pytest

from engine_plugin.process import ports

LISTEN = (
    "import socket, sys; server = socket.create_server(('127.0.0.1', 0));"
    "print(server.getsockname()[1], flush=True); sys.stdin.read()"
)


@pytest.mark.promise("F12")
def test_free_port_can_be_bound() -> None:
    with closing(socket.create_server(("127.0.0.1", ports.free_ports(1)[0]))):
        pass


@pytest.mark.promise("F12", "F13")
def test_listener_is_found_by_its_process() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert ports.listens(os.getpid(), port)
        assert ports.holder(port) == f"{psutil.Process().name()} (pid {os.getpid()})"
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
            assert not ports.listens(stranger.pid, port), "not everybody's"
            stranger.communicate(b"\n")
    assert not ports.listens(os.getpid(), port)
    assert ports.holder(port) == ""


@pytest.mark.promise("F13")
def test_port_of_a_descendant_belongs_to_its_ancestor() -> None:
    """A guard stays as the engine's parent on some systems."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", LISTEN], stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        port = int(child.stdout.readline())
        assert ports.listens(os.getpid(), port)
        assert ports.listens(child.pid, port)
        child.communicate("")
    assert not ports.listens(child.pid, port), "a process that is gone"


@pytest.mark.promise("F13")
def test_port_holder_hidden_by_the_system_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS shows the connections of other processes to root only."""

    def denied(_kind: str) -> None:
        raise psutil.AccessDenied(1)

    monkeypatch.setattr(psutil, "net_connections", denied)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        assert ports.holder(port) == "another process"
    assert ports.holder(port) == ""
