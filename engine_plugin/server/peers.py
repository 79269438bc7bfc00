"""Which user owns the other end of a connection to a loopback TCP port.

Any user may connect to a port of 127.0.0.1. Linux lists the user of each socket in /proc/net/tcp, Windows its process
in the table of connections. macOS lists them for root only, so there every local user is admitted, with a warning.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import sys
import time
from pathlib import Path
from urllib.parse import unquote

from engine_plugin.errors import AuthError
from engine_plugin.system.files import in_thread

__all__ = ["REFUSED", "LocalPeers"]

REFUSED = AuthError("the plugin serves only the user that runs it")
"""The answer to a call of another user."""

_log = logging.getLogger(__name__)

_OWN_CONNECTION = 2.0  # seconds
# After a connection is closed, another process can get its port; on Linux not within a second.
_KNOWN_FOR = 1.0
_MOST_KNOWN = 1024
_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
# States of a socket that a process holds; after the close the table lists root as its user.
_HELD = (b"01", b"08")  # ESTABLISHED, CLOSE_WAIT


class LocalPeers:
    """Admits processes of this user, of the host's user, and of root. Used by one server in its event loop."""

    def __init__(self, port: int) -> None:
        """`port` is the server's, on 127.0.0.1 or ::1."""
        self._port = port
        self._blind = False
        self._known: dict[str, tuple[bool, float]] = {}

    async def prepare(self, host: str) -> None:
        """Test, by a connection to `host`, whether the system reveals the owner of a connection.

        Called once the server listens. If it does not, every local user is admitted, and a warning is logged.
        """
        why = await in_thread(self._obstacle, host)
        if why:
            self._blind = True
            _log.warning(
                "every user of this machine can call the plugin at port %d: %s. Use unix sockets, or AutoMTLS.",
                self._port,
                why,
            )

    async def admits(self, peer: str) -> bool:
        """Whether `peer`, as gRPC writes it (`ipv4:127.0.0.1:4711`), may call. The answer is kept for a second."""
        if self._blind:
            return True
        known = self._known.get(peer)
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        admitted = await in_thread(self._look, peer)
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[peer] = (admitted, time.monotonic() + _KNOWN_FOR)
        return admitted

    def _obstacle(self, host: str) -> str:
        """Why the system does not reveal the owner of a connection; "" when it does. Blocking."""
        if sys.platform not in ("linux", "win32"):
            return "this system does not reveal the owner of a connection"
        try:
            with socket.create_connection((host, self._port), timeout=_OWN_CONNECTION) as own:
                name = own.getsockname()
                return "" if _same_user((name[0], name[1]), self._port) else "its table of connections is incomplete"
        except OSError as error:
            return f"{error.filename or 'the table of connections'}: {error.strerror or error}"

    def _look(self, peer: str) -> bool:
        address = _address(peer)
        try:
            admitted = address is not None and _same_user(address, self._port)
        except OSError as error:  # the test connection succeeded
            _log.error("the owner of the connection from %s is unknown: %s", peer, error)
            admitted = False
        if not admitted:
            _log.warning("a call from %s is refused: the connection does not belong to this user", peer)
        return admitted


def _address(peer: str) -> tuple[str, int] | None:
    """Host and port of a gRPC peer on this machine."""
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    try:
        place = ipaddress.ip_address(host.strip("[]"))
        mapped = getattr(place, "ipv4_mapped", None)
        return (str(mapped or place), int(port)) if kind in ("ipv4", "ipv6") else None
    except ValueError:
        return None


def _same_user(address: tuple[str, int], port: int) -> bool:
    """Whether the socket at `address`, connected to our `port`, belongs to a user who may call. Blocking.

    Raises OSError when the system cannot be asked.
    """
    if sys.platform == "win32":
        return _owner_of(address, port) in _owners()
    return _user_of(address, port) in _users()


def _user_of(address: tuple[str, int], port: int) -> int:
    """The uid of a client's socket, -1 if no process holds it. Raises OSError."""
    ends = b":%04X " % address[1]  # most lines have other ports
    for table in _TABLES:
        if table.name == "tcp6" and not table.exists():
            continue  # a system without IPv6
        for line in table.read_bytes().splitlines()[1:]:
            if ends not in line:
                continue
            fields = line.split()
            if fields[3] in _HELD and _endpoint(fields[1]) == address and _endpoint(fields[2])[1] == port:
                return int(fields[7])
    return -1


def _endpoint(text: bytes) -> tuple[str, int]:
    """An address as /proc/net/tcp writes it: 32-bit words in this machine's byte order, then the port."""
    words, _, port = text.partition(b":")
    raw = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    place = ipaddress.ip_address(raw)
    return str(getattr(place, "ipv4_mapped", None) or place), int(port, 16)


def _users() -> set[int]:
    if sys.platform == "win32":
        return set()
    users = {0, os.getuid(), os.geteuid()}
    with contextlib.suppress(OSError):
        users.add(Path(f"/proc/{os.getppid()}").stat().st_uid)
    return users


def _owner_of(address: tuple[str, int], port: int) -> str:
    """The user name of a client's socket, "" if unknown. Windows."""
    import psutil

    for entry in psutil.net_connections("tcp"):
        here, there = entry.laddr, entry.raddr
        if here and there and (here.ip, here.port, there.port) == (*address, port) and entry.pid:
            return _owner(entry.pid)
    return ""


def _owners() -> set[str]:
    return {_owner(pid) for pid in (os.getpid(), os.getppid())} - {""}


def _owner(pid: int) -> str:
    import psutil

    try:
        return psutil.Process(pid).username()
    except psutil.Error:
        return ""
