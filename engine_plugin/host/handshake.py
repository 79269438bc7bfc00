"""The host's half of go-plugin's start: the environment a plugin gets and the line it must answer with."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin import PLUGIN_DIR
from engine_plugin.errors import PluginProcessError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COOKIE_NAME", "COOKIE_VALUE", "Handshake", "parse_handshake", "plugin_environment"]

COOKIE_NAME = "AOG_PLUGIN"
COOKIE_VALUE = "aog-provider-plugin-v1"

_CORE_VERSION = 1
_PROTOCOL_VERSION = 1
_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Handshake:
    """Where a plugin listens: `unix:/path` or `host:port`; and its certificate (DER), if any."""

    address: str
    certificate: bytes = b""


def plugin_environment(extra: Mapping[str, str] | None = None, client_cert: str = "") -> dict[str, str]:
    """Our environment with what a plugin needs to know that a host of its kind started it.

    `client_cert` (PEM) asks it for AutoMTLS.
    `PLUGIN_*` of our own are left out: when we are a plugin ourselves they speak of our host's connection
    (a certificate, a socket directory), not of the one we are about to make. So is ENGINE_PLUGIN_DIR, which chooses
    a plugin for the command line: the one that is launched serves itself. `extra` may give it one, or AOG_VERSION,
    which makes it behave as AOG needs.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("PLUGIN_") and name != PLUGIN_DIR
    }
    environment.update(extra or {})
    environment |= {
        COOKIE_NAME: COOKIE_VALUE,
        "PLUGIN_PROTOCOL_VERSIONS": str(_PROTOCOL_VERSION),
        "PLUGIN_MIN_PORT": "10000",
        "PLUGIN_MAX_PORT": "25000",
    }
    if client_cert:
        environment["PLUGIN_CLIENT_CERT"] = client_cert
    return environment


def parse_handshake(line: str, auto_mtls: bool = False) -> Handshake:
    """Read `1|1|unix|/path|grpc|` (go-plugin, docs/internals.md), with a certificate if and only if `auto_mtls`.

    Raises PluginProcessError, saying what is wrong.
    """
    fields = line.strip().split("|")
    if len(fields) < 4 or not fields[0].strip().isdecimal():
        raise PluginProcessError(
            f"the first line on its standard output is not a go-plugin handshake: {line[:_SHOWN]!r}. "
            "A plugin must print nothing before its handshake line."
        )
    core, version, network, address = fields[:4]
    protocol = fields[4] if len(fields) > 4 else "netrpc"
    certificate = fields[5] if len(fields) > 5 else ""
    if int(core) != _CORE_VERSION:
        raise PluginProcessError(
            f"it speaks version {core} of go-plugin's core protocol, this host version {_CORE_VERSION}. "
            "Build the plugin with a go-plugin of the 1.x series."
        )
    if version != str(_PROTOCOL_VERSION):
        raise PluginProcessError(
            f"it speaks version {version} of the provider protocol, this host version {_PROTOCOL_VERSION}. "
            "Use a plugin and a host of the same protocol version."
        )
    if protocol != "grpc":
        raise PluginProcessError(f"it speaks {protocol!r}, this host only 'grpc'. Serve the plugin over gRPC.")
    if certificate and not auto_mtls:
        raise PluginProcessError("it sent a TLS certificate that this host did not ask for.")
    if auto_mtls and not certificate:
        raise PluginProcessError("it sent no TLS certificate: it knows nothing of AutoMTLS. Launch it without.")
    return Handshake(_target(network, address), _decode(certificate))


def _decode(certificate: str) -> bytes:
    """The sixth field: base64, which go-plugin sends without its padding."""
    try:
        return base64.b64decode(certificate + "=" * (-len(certificate) % 4), validate=True)
    except ValueError as error:
        raise PluginProcessError(f"its TLS certificate is not in base64: {error}.") from error


def _target(network: str, address: str) -> str:
    if network == "unix" and address:
        return f"unix:{address}"
    if network == "tcp" and address.rpartition(":")[2].isdecimal():
        return address
    raise PluginProcessError(
        f"it listens on {network!r} {address!r}; known are 'unix' with a path and 'tcp' with host:port."
    )
