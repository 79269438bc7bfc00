"""Addresses: `unix:PATH` or `host:port` in this package, URIs for gRPC."""

from __future__ import annotations

import ipaddress
import os
import sys
from urllib.parse import quote

__all__ = [
    "SOCKET_PATH_LIMIT",
    "grpc_target",
    "host_of",
    "is_loopback",
    "is_loopback_host",
    "socket_is_gone",
    "unix_path",
]

SOCKET_PATH_LIMIT = 107 if sys.platform == "linux" else 103
"""The most bytes of a unix socket's path: sockaddr_un less the final zero."""


def unix_path(address: str) -> str | None:
    """The path of the socket; None for `host:port`. `unix:///x`, gRPC's form, is /x."""
    if not address.startswith("unix:"):
        return None
    path = address.removeprefix("unix:")
    return f"/{path.lstrip('/')}" if path.startswith("//") else path


def socket_is_gone(address: str) -> bool:
    """Whether `address` names a unix socket that does not exist, or no longer does."""
    path = unix_path(address)
    return path is not None and not os.path.lexists(path)


def grpc_target(address: str) -> str:
    """The URI by which gRPC finds `address`, whatever characters the path of a socket has (gRPC's naming.md)."""
    path = unix_path(address)
    return address if path is None else f"unix:{quote(os.fsencode(path))}"


def host_of(address: str) -> str:
    """The host of a `host:port`, an IPv6 address without its brackets."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether `address` is a TCP address that only processes of this machine can reach."""
    if unix_path(address) is not None:
        return False
    return is_loopback_host(host_of(address))


def is_loopback_host(host: str) -> bool:
    """Whether `host` is `localhost` or a loopback address, an IPv6 address without its brackets."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
