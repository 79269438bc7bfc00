"""The handshake before the slow imports, for a plugin whose manifest is known to be valid.

The socket listens when the line is printed; connections wait in its queue until the plugin has loaded. This is for
the usual host, which wants a unix socket without TLS and without a group. Every other one gets its line, or the
reason why there is none, from `session`, once the plugin has loaded. Slow modules are not imported here.
"""

from __future__ import annotations

import os
import sys

from engine_plugin.protocol.handshake import COOKIE, CORE_PROTOCOL_VERSION, PROTOCOL_VERSIONS

TYPE_CHECKING = False  # `typing` is slow
if TYPE_CHECKING:
    import _socket
    import socket
    from collections.abc import Mapping

__all__ = ["EarlyListener", "announce_early"]

# With one of these, the line needs more than this module knows.
_SPECIAL = ("PLUGIN_CLIENT_CERT", "PLUGIN_UNIX_SOCKET_GROUP", "ENGINE_PLUGIN_TRANSPORT", "ENGINE_PLUGIN_DIR")
_WAITING_CONNECTIONS = 1024


class EarlyListener:
    """A listening unix socket in a private directory, which its owner removes by `close`.

    `output` is the pipe into which fd 1 leads once the line is printed; `StandardOutput` takes it over. `parent` is
    the host's pid, read before the line: without a host there is no reader, and the line cannot be printed.
    """

    def __init__(self, directory: str) -> None:
        """Raises OSError."""
        self.directory = directory
        self.path = f"{directory}/sock"
        self.output = -1
        self.parent = os.getppid()
        self._lock = -1
        self._listener: _socket.socket | None = None
        if sys.platform == "win32":
            raise OSError("Windows has no unix sockets")
        import _socket  # `socket` would take longer than all else here
        import fcntl

        os.mkdir(directory, 0o700)  # noqa: PTH102  # pathlib is slow
        try:
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            self._listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
            self._listener.bind(self.path)
            self._listener.listen(_WAITING_CONNECTIONS)
        except OSError:
            self.close()
            raise

    def take(self) -> socket.socket:
        """Return the socket, which is the caller's from here on."""
        import socket

        if self._listener is None:
            raise ValueError("the socket is taken already")
        listener, self._listener = self._listener, None
        return socket.socket(fileno=listener.detach())

    def close(self) -> None:
        """Remove the socket and its directory. May be called again."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for remove, path in ((os.unlink, self.path), (os.rmdir, self.directory)):
            try:
                remove(path)
            except OSError:  # not created, or removed meanwhile
                continue
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def announce_early(environ: Mapping[str, str]) -> EarlyListener | None:
    """Listen, and print the handshake line. None if that is left to the session.

    Called by the start file of a built plugin, before anything else, which closes the result at the end.
    """
    if sys.platform == "win32" or not _is_usual(environ):
        return None
    base = environ.get("PLUGIN_UNIX_SOCKET_DIR") or environ.get("TMPDIR") or "/tmp"  # noqa: S108  # as tempfile
    if not base.startswith("/") or "|" in base or "\n" in base:
        return None
    os.umask(0o077)
    try:
        early = EarlyListener(f"{base}/engine-plugin-{os.urandom(4).hex()}")
    except OSError:
        return None
    fields = [str(CORE_PROTOCOL_VERSION), str(PROTOCOL_VERSIONS[0]), "unix", early.path, "grpc", ""]
    if environ.get("PLUGIN_MULTIPLEX_GRPC"):
        fields.append("false")
    line = os.fsencode("|".join(fields) + "\n")
    try:
        written = os.write(1, line)
    except OSError:
        written = 0
    if written != len(line):  # the host has died; the session fails in the same way, and says so
        early.close()
        return None
    early.output, sink = os.pipe()
    os.dup2(sink, 1)
    os.close(sink)
    return early


def _is_usual(environ: Mapping[str, str]) -> bool:
    """Whether the host asks for nothing that needs the session, and this process can serve it natively."""
    from importlib.machinery import PathFinder

    return (
        environ.get(COOKIE.name) == COOKIE.value
        and environ.get("PLUGIN_PROTOCOL_VERSIONS", "1") == str(PROTOCOL_VERSIONS[0])
        and not any(environ.get(name) for name in _SPECIAL)
        and environ.get("ENGINE_PLUGIN_GRPC", "") in ("", "native")
        and PathFinder.find_spec("ngh2") is not None
        and sys.getfilesystemencoding() == "utf-8"  # else `begin_in_utf8` starts the process anew
    )
