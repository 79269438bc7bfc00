"""Where a download comes from, and how to name it without giving away what it holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

__all__ = ["HttpSource", "without_secrets"]


def without_secrets(url: str) -> str:
    """A URL for people, logs and records: no credentials, query or fragment."""
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return url.partition("://")[0] + "://…"


@dataclass(frozen=True, slots=True)
class HttpSource:
    """An http(s) URL, without credentials or fragment; the query may hold a secret."""

    url: str = field(repr=False)
    username: str = field(default="", repr=False, compare=False)
    password: str = field(default="", repr=False, compare=False)

    @property
    def label(self) -> str:
        """The source for people and records."""
        return without_secrets(self.url)
