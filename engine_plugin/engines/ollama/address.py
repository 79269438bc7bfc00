"""The address of an Ollama server:

parsed by the rules of OLLAMA_HOST, and chosen from configuration and environment.
"""

from __future__ import annotations

import ipaddress
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine_plugin.system.addresses import is_loopback_host

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

__all__ = ["DEFAULT_PORT", "ServerAddress", "configured_address"]

log = logging.getLogger(__name__)

DEFAULT_PORT = 11434
_PORTS = {"http": 80, "https": 443}
_CLOUD = "ollama.com"
_AUTHORITY = re.compile(r"(?:\[(?P<bracketed>[^\]]+)\]|(?P<host>[^:]*))(?::(?P<port>.*))?")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """The root of a server.

    `prefix` is the path below which it is served, such as `/ollama`, or "". `source` names the setting that the
    address is from, for messages.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    source: str = ""
    ignored: str = ""
    """The OLLAMA_HOST that is not used, and why; "" if there is none."""

    @classmethod
    def parse(cls, text: str, source: str = "") -> Self:
        """Parse an OLLAMA_HOST or a base URL; of `…/v1` the root above it. Raises ValueError.

        The default port is 11434, with a scheme that of the scheme. 0.0.0.0 and ::, on which servers listen, become
        the loopback address.
        """
        text = text.strip()
        if not text.isprintable() or " " in text or not text.isascii():
            raise ValueError("an address must be ASCII without spaces")
        if set(text) & set("?#\\"):
            raise ValueError("an address must not have a query, a fragment or a backslash")
        scheme, separator, rest = (f"https://{text}" if text == _CLOUD else text).rpartition("://")
        scheme = scheme.lower() if separator else "http"
        if scheme not in _PORTS:
            raise ValueError(f"the scheme must be http or https, not {scheme[:32]}")
        authority, _, path = rest.partition("/")
        host, port = _host_and_port(authority, _PORTS[scheme] if separator else DEFAULT_PORT)
        return cls(scheme, _connectable(host), port, _prefix(path), source)

    @property
    def is_loopback(self) -> bool:
        """Whether the address is certainly on this machine."""
        return is_loopback_host(self.host)

    @property
    def authority(self) -> str:
        """Host and port as in a URL: `[::1]:11434`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.prefix}"


def _host_and_port(authority: str, default: int) -> tuple[str, int]:
    if "@" in authority:
        raise ValueError("an address must not have credentials; put the key into OLLAMA_API_KEY")
    if authority.count(":") > 1 and not authority.startswith("["):  # an IPv6 address without brackets
        return authority, default
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        raise ValueError(f"{authority!r} is not a valid host")
    return found["bracketed"] or found["host"] or "127.0.0.1", _port(found["port"], default)


def _port(text: str | None, default: int) -> int:
    if not text:
        return default
    number = text.lstrip("0")
    if not (number.isascii() and number.isdigit() and len(number) <= 5 and int(number) <= 65535):
        raise ValueError(f"{text[:32]!r} is not a valid port")
    return int(number)


def _connectable(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host) or len(host) > 253:
            raise ValueError(f"{host[:64]!r} is not a valid host") from None
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host


def _prefix(path: str) -> str:
    """The path without a last `v1` or `api`, which are parts of the server's own API."""
    steps = [step for step in path.split("/") if step]
    if steps and steps[-1] in ("v1", "api"):
        steps.pop()
    return "".join(f"/{step}" for step in steps)


def configured_address(configured: str, engine_host: str, environ: Mapping[str, str]) -> ServerAddress:
    """The address of the server to attach to: engine.address, else provider.engine_host, OLLAMA_HOST or the default.

    Raises ValueError for an invalid address in plugin.yaml. An invalid OLLAMA_HOST, which Ollama itself tolerates, is
    logged and ignored; `ignored` of the returned address says so.
    """
    for source, text in (("engine.address", configured), ("provider.engine_host", engine_host)):
        if text:
            try:
                return ServerAddress.parse(text, f"{source} in plugin.yaml")
            except ValueError as error:
                raise ValueError(f"{source}: {text[:128]!r} is not a valid address: {error}") from None
    ignored = ""
    text = environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    if text:
        try:
            return ServerAddress.parse(text, "OLLAMA_HOST")
        except ValueError as error:
            shown = f"…@{text.rpartition('@')[2]}" if "@" in text else text  # without credentials
            ignored = f"OLLAMA_HOST is ignored: {shown[:128]!r} is not a valid address: {error}"
            log.warning("%s", ignored)
    return ServerAddress("http", "127.0.0.1", DEFAULT_PORT, source="the default address", ignored=ignored)
