"""The constants of the handshake between hosts and this kind of plugin (docs/protocol.md). Imports nothing."""

from __future__ import annotations

__all__ = ["COOKIE", "CORE_PROTOCOL_VERSION", "PROTOCOL_VERSIONS", "Cookie"]


class Cookie:
    """go-plugin's magic cookie: an environment variable by which a plugin knows that a host has started it."""

    def __init__(self, name: str, value: str) -> None:
        self.name = name
        self.value = value


COOKIE = Cookie("AOG_PLUGIN", "aog-provider-plugin-v1")
"""The cookie of the AOG plugin SDK, which every host of these plugins sets."""

CORE_PROTOCOL_VERSION = 1
"""The version of go-plugin's own protocol: the first field of the handshake line."""

PROTOCOL_VERSIONS = (1,)
"""The versions of the provider protocol: the second field of the handshake line."""
