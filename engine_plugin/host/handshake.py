"""The host's half of go-plugin's handshake: the plugin's environment and the line that it prints."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin import PLUGIN_DIR
from engine_plugin.errors import PluginProcessError
from engine_plugin.protocol.handshake import COOKIE, CORE_PROTOCOL_VERSION, PROTOCOL_VERSIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Handshake", "parse_handshake", "plugin_environment"]

_PROTOCOL_VERSION = PROTOCOL_VERSIONS[-1]
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Handshake:
    """A plugin's address, `unix:/path` or `host:port`, and its certificate (DER), if any."""

    address: str
    certificate: bytes = b""


def plugin_environment(extra: Mapping[str, str] | None = None, client_cert: str = "") -> dict[str, str]:
    """Return this process's environment with the variables of the handshake.

    `client_cert` (PEM) requests AutoMTLS. `PLUGIN_*` variables of this process are removed: if it is a plugin itself,
    they describe the connection to its own host. ENGINE_PLUGIN_DIR is removed too, because it selects a plugin for
    the command line. `extra` can set it again, or set AOG_VERSION, which selects the behavior for AOG.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PLUGIN_") and name != PLUGIN_DIR
    }
    environment.update(extra or {})
    environment |= {
        COOKIE.name: COOKIE.value,
        "PLUGIN_PROTOCOL_VERSIONS": str(_PROTOCOL_VERSION),
        "PLUGIN_MIN_PORT": "10000",
        "PLUGIN_MAX_PORT": "25000",
    }
    if client_cert:
        environment["PLUGIN_CLIENT_CERT"] = client_cert
    return environment


def parse_handshake(line: str, auto_mtls: bool = False) -> Handshake:
    """Read `1|1|unix|/path|grpc|` (go-plugin, docs/internals.md), with a certificate if and only if `auto_mtls`.

    Raises PluginProcessError for an invalid or incompatible line.
    """
    fields = line.strip().split("|")
    if len(fields) < 4 or not fields[0].strip().isdecimal():
        raise PluginProcessError(
            f"the first line on its standard output is not a go-plugin handshake: {line[:_SHOWN]!r}. "
            "A plugin must print the handshake line first."
        )
    core, version, network, address = fields[:4]
    protocol = fields[4] if len(fields) > 4 else "netrpc"
    certificate = fields[5] if len(fields) > 5 else ""
    if int(core) != CORE_PROTOCOL_VERSION:
        raise PluginProcessError(
            f"go-plugin core protocol mismatch: expected version {CORE_PROTOCOL_VERSION}, got {core}. "
            "Build the plugin with a go-plugin of the 1.x series."
        )
    if version != str(_PROTOCOL_VERSION):
        raise PluginProcessError(
            f"provider protocol mismatch: expected version {_PROTOCOL_VERSION}, got {version}. "
            "Use a plugin and a host of the same protocol version."
        )
    if protocol != "grpc":
        raise PluginProcessError(f"protocol mismatch: expected 'grpc', got {protocol!r}. Serve the plugin over gRPC.")
    if certificate and not auto_mtls:
        raise PluginProcessError(
            "unexpected TLS certificate in the handshake line: AutoMTLS is off. Launch the plugin with auto_mtls."
        )
    if auto_mtls and not certificate:
        raise PluginProcessError(
            "no TLS certificate in the handshake line: the plugin does not support AutoMTLS. Launch it without."
        )
    return Handshake(_target(network, address), _decode(certificate))


def _decode(certificate: str) -> bytes:
    """Decode the sixth field: base64, which go-plugin sends without padding."""
    try:
        return base64.b64decode(certificate + "=" * (-len(certificate) % 4), validate=True)
    except ValueError as error:
        raise PluginProcessError(f"the TLS certificate is not valid base64: {error}") from error


def _target(network: str, address: str) -> str:
    if network == "unix" and address:
        return f"unix:{address}"
    if network == "tcp" and address.rpartition(":")[2].isdecimal():
        return address
    raise PluginProcessError(
        f"not a valid address in the handshake line: {network!r} {address!r}. "
        "Use 'unix' with a path or 'tcp' with host:port."
    )
