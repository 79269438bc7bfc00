"""go-plugin's handshake: the environment variables that a host sets, and the line that the plugin prints.

Nothing slow is imported here, so that a plugin run by hand explains itself at once.
Source of the contract: hashicorp/go-plugin, server.go and client.go (v1.7).
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.errors import EnginePluginError, UnsupportedError
from engine_plugin.protocol.handshake import CORE_PROTOCOL_VERSION, PROTOCOL_VERSIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from engine_plugin.protocol.handshake import Cookie

__all__ = ["RUN_BY_HAND", "HostEnv", "engine_environ", "handshake_line", "is_hosted"]

_DECIMAL = re.compile(r"[0-9]{1,9}")

RUN_BY_HAND = """\
This program is a plugin: a host such as AOG starts it and talks to it. It does nothing when run by hand.
Start the host instead, or serve by hand, without a host, with:

    engine-plugin serve
"""


@dataclass(frozen=True, slots=True)
class HostEnv:
    """What the host asks for. `transport` is unix or tcp.

    `min_port` and `max_port` apply to tcp only (0, 0: any free port).

    `socket_dir` and `socket_group` (a name or a number) apply to unix only; empty means the temporary
    directory, and no group. `client_cert` is the PEM of a host that wants AutoMTLS, else empty.
    """

    protocol_version: int
    transport: str
    min_port: int = 0
    max_port: int = 0
    socket_dir: str = ""
    socket_group: str = ""
    client_cert: str = ""
    multiplex: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], *, windows: bool = os.name == "nt") -> HostEnv:
        """Read the `PLUGIN_*` variables and ENGINE_PLUGIN_TRANSPORT (`unix` or `tcp`). Called by `serve`.

        Raises EnginePluginError, naming the wrong variable, and UnsupportedError for an unsupported request.
        """
        transport = _transport(environ.get("ENGINE_PLUGIN_TRANSPORT", ""), windows)
        ports = _port_range(environ) if transport == "tcp" else (0, 0)
        return cls(
            protocol_version=_negotiate(environ.get("PLUGIN_PROTOCOL_VERSIONS", ""), PROTOCOL_VERSIONS),
            transport=transport,
            min_port=ports[0],
            max_port=ports[1],
            socket_dir=environ.get("PLUGIN_UNIX_SOCKET_DIR", ""),
            socket_group=environ.get("PLUGIN_UNIX_SOCKET_GROUP", ""),
            client_cert=environ.get("PLUGIN_CLIENT_CERT", ""),
            multiplex=bool(environ.get("PLUGIN_MULTIPLEX_GRPC", "")),
        )


def is_hosted(environ: Mapping[str, str], cookie: Cookie) -> bool:
    """Whether a host started this process: the magic cookie is set."""
    return environ.get(cookie.name) == cookie.value


def engine_environ(environ: Mapping[str, str], cookie: Cookie) -> dict[str, str]:
    """The environment for an engine's process: without the variables that the host set for the plugin alone."""
    return {key: value for key, value in environ.items() if key != cookie.name and not key.startswith("PLUGIN_")}


def handshake_line(host: HostEnv, network: str, address: str, certificate: bytes = b"") -> bytes:
    """The handshake line, `1|1|unix|/path|grpc|` with its newline, which announces the plugin's address.

    The sixth field is the server's certificate (DER), in base64 without its padding; it is empty unless the host has
    asked for AutoMTLS: a host crashes on one that it did not ask for. The seventh says whether we multiplex the
    broker (we do not) and may be sent only to a host that asked.
    """
    shown = base64.b64encode(certificate).decode().rstrip("=") if host.client_cert else ""
    fields = [str(CORE_PROTOCOL_VERSION), str(host.protocol_version), network, address, "grpc", shown]
    if host.multiplex:
        fields.append("false")
    return os.fsencode("|".join(fields) + "\n")


def _negotiate(offered: str, ours: Iterable[int]) -> int:
    """The highest version that both support; else our lowest, so that the host reports the mismatch."""
    theirs = {int(item) for item in offered.split(",") if _DECIMAL.fullmatch(item)}
    return max(theirs.intersection(ours), default=min(ours))


def _transport(wanted: str, windows: bool) -> str:
    if wanted not in ("", "unix", "tcp"):
        raise EnginePluginError(f"ENGINE_PLUGIN_TRANSPORT is {wanted!r}. Set it to unix or tcp, or unset it.")
    if wanted == "unix" and windows:
        raise UnsupportedError("ENGINE_PLUGIN_TRANSPORT=unix does not work on Windows. Unset it, or set it to tcp.")
    return wanted or ("tcp" if windows else "unix")


def _port_range(environ: Mapping[str, str]) -> tuple[int, int]:
    low, high = (_port(environ, key) for key in ("PLUGIN_MIN_PORT", "PLUGIN_MAX_PORT"))
    if low > high:
        raise EnginePluginError(
            f"PLUGIN_MIN_PORT ({low}) is greater than PLUGIN_MAX_PORT ({high}). "
            "Correct the port range in the host's settings."
        )
    return low, high


def _port(environ: Mapping[str, str], key: str) -> int:
    text = environ.get(key, "") or "0"
    if not _DECIMAL.fullmatch(text) or int(text) > 65535:
        raise EnginePluginError(f"{key} is {text!r}, not a port number. Set it to 0–65535 in the host's settings.")
    return int(text)
