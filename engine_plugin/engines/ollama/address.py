"""Where an Ollama server is: the rules of OLLAMA_HOST, and whose word counts first."""

from __future__ import annotations

import ipaddress
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

__all__ = ["DEFAULT_PORT", "ServerAddress", "attach_address"]

log = logging.getLogger(__name__)

DEFAULT_PORT = 11434
_PORTS = {"http": 80, "https": 443}
_CLOUD = "ollama.com"
_NAME = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """A server's root. `prefix` is a path below which it is served, "" or such as `/ollama`; `source` says in words
    who named it."""

    scheme: str
    host: str
    port: int
    prefix: str = ""
    source: str = ""
    passed_over: str = ""
    """What somebody named, and why it could not be used, in words."""

    @classmethod
    def parse(cls, text: str, source: str = "") -> Self:
        """An address as OLLAMA_HOST, or a base URL, has it; `…/v1` means the root above it. Raises ValueError.

        Without a scheme the port is 11434, with one it is the scheme's. 0.0.0.0 and :: are where a server listens:
        whoever asks it uses the loopback address.
        """
        text = text.strip()
        if not text.isprintable() or " " in text or not text.isascii():
            raise ValueError("an address has neither spaces nor characters beyond ASCII")
        if set(text) & set("?#\\"):
            raise ValueError("an address has no query and no fragment")
        scheme, separator, rest = text.rpartition("://")
        scheme = scheme.lower()
        if not separator:
            scheme = "https" if rest == _CLOUD else "http"
        if scheme not in _PORTS:
            raise ValueError(f"{scheme[:32]}:// is not a scheme of Ollama: use http or https")
        port = _PORTS[scheme] if separator or rest == _CLOUD else DEFAULT_PORT
        authority, _, path = rest.partition("/")
        host, port = _host_and_port(authority, port)
        return cls(scheme, _connectable(host), port, _prefix(path), source)

    @property
    def is_loopback(self) -> bool:
        """Whether it is on this machine, for certain."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """For people, and for a client that takes URLs."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.prefix}"


def _host_and_port(authority: str, default: int) -> tuple[str, int]:
    if "@" in authority:
        raise ValueError("an address has no credentials: put a key into OLLAMA_API_KEY")
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{authority!r} is no host")
        return host, _port(rest[1:], default)
    if authority.count(":") > 1:  # an IPv6 address without brackets
        return authority, default
    host, _, port = authority.partition(":")
    return host or "127.0.0.1", _port(port, default)


def _port(text: str, default: int) -> int:
    if not text:
        return default
    number = text.lstrip("0")
    if not (number.isascii() and number.isdigit() and len(number) <= 5 and int(number) <= 65535):
        raise ValueError(f"{text[:32]!r} is no port")
    return int(number)


def _connectable(host: str) -> str:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _NAME.fullmatch(host) or len(host) > 253:
            raise ValueError(f"{host[:64]!r} is no host") from None
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return host


def _prefix(path: str) -> str:
    """`v1` is where the same server speaks OpenAI's JSON: its root is one above."""
    steps = [step for step in path.split("/") if step]
    if steps and steps[-1] in ("v1", "api"):
        steps.pop()
    return "".join(f"/{step}" for step in steps)


def attach_address(configured: str, engine_host: str, environ: Mapping[str, str]) -> ServerAddress:
    """Where to look for a server: `engine.address`, else provider.engine_host, else OLLAMA_HOST, else the usual.

    Raises ValueError for one of plugin.yaml's that is none. An OLLAMA_HOST that is none is passed over with a
    warning, for Ollama itself does not stop at that either; the address that is used instead tells of it.
    """
    for source, text in (("engine.address", configured), ("provider.engine_host", engine_host)):
        if text:
            try:
                return ServerAddress.parse(text, f"{source} in plugin.yaml")
            except ValueError as error:
                raise ValueError(f"{source} is {text[:128]!r}: {error}") from None
    passed_over = ""
    text = environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    if text:
        try:
            return ServerAddress.parse(text, "OLLAMA_HOST")
        except ValueError as error:
            shown = f"…@{text.rpartition('@')[2]}" if "@" in text else text  # credentials are nobody's business
            passed_over = f"OLLAMA_HOST is {shown[:128]!r}, which cannot be used: {error}"
            log.warning("%s", passed_over)
    return ServerAddress("http", "127.0.0.1", DEFAULT_PORT, source="the default address", passed_over=passed_over)
