"""Parses the base URLs of servers."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from engine_plugin.system.addresses import is_loopback_host

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VERSIONS", "BaseUrl"]

VERSIONS = ("/v1", "/v3", "")
"""The paths that are tried, in this order, for a base URL without a version."""

_PORTS = {"http": 80, "https": 443}
_PATH = re.compile(
    r"(?P<prefix>.*?)(?P<version>/v[0-9]+)?"
    r"(?:/(?:chat/completions|completions|embeddings|models|rerank|responses))?"
)
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # addresses that servers listen on


@dataclass(frozen=True, slots=True)
class BaseUrl:
    """A server's base URL: `http://host:8000` + `prefix` + `version` + `/models`.

    `version` is `/v1`, `/v3` or the like, "" for an API at the root, None if unknown.
    """

    scheme: str
    host: str
    port: int
    prefix: str = ""
    version: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse `host:8000`, `https://host/llm/v1/` or the URL of an endpoint. Raises ValueError."""
        text = text.strip()
        parts = urlsplit(text if "://" in text else f"http://{text}")
        if parts.scheme not in _PORTS:
            raise ValueError(f"unsupported scheme {parts.scheme[:32]}://; use http or https")
        host, port = parts.hostname, parts.port  # the port may raise ValueError
        if not host or any(character.isspace() for character in text):
            raise ValueError("the host is missing")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("credentials and queries are not allowed; set the key in the environment")
        found = _PATH.fullmatch(re.sub(r"/+", "/", parts.path).rstrip("/"))
        prefix, version = (found["prefix"], found["version"]) if found else ("", None)
        port = _PORTS[parts.scheme] if port is None else port
        return cls(parts.scheme, _LOCAL.get(host, host), port, prefix, version)

    @property
    def is_loopback(self) -> bool:
        """Whether the host is certainly this machine."""
        return self.host.endswith(".localhost") or is_loopback_host(self.host)

    @property
    def authority(self) -> str:
        """Host and port as in a URL: `[::1]:8000`."""
        return f"{self._name}:{self.port}"

    @property
    def _name(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host

    @property
    def root(self) -> str:
        """The root URL for messages: `https://host/llm`."""
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self._name}{port}{self.prefix}"

    @property
    def path(self) -> str:
        """The path of the API: `/llm/v1`."""
        return self.prefix + (self.version or "")

    @property
    def url(self) -> str:
        """The base URL for messages."""
        return self.root + (self.version or "")

    def at_version(self, version: str) -> Self:
        """The same root with the API at `version`."""
        return replace(self, version=version)
