"""The source of a download, and how messages name it without its secrets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from engine_plugin.redaction import entered

__all__ = ["LOOPBACK", "HttpSource", "file_path", "without_secrets"]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
"""The hosts to which credentials may be sent over plain http."""


def without_secrets(url: str) -> str:
    """A URL without credentials, query and fragment, for messages, logs and records."""
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
        if parts.scheme:
            return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        pass
    return url.partition("://")[0] + "://…"


@dataclass(frozen=True, slots=True)
class HttpSource:
    """An http(s) URL, without credentials or fragment; the query may hold a secret."""

    url: str = field(repr=False)
    username: str = field(default="", repr=False, compare=False)
    password: str = field(default="", repr=False, compare=False)
    token: str = field(default="", repr=False, compare=False)
    """An access token, sent as a Bearer in the place of username and password."""

    @classmethod
    def parse(cls, url: str, username: str = "", password: str = "") -> HttpSource:
        """The source for a URL; credentials in it are moved to the fields. Raises ValueError for another URL."""
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for an invalid port
        if parts.scheme.lower() not in ("http", "https") or not parts.hostname:
            raise ValueError("not an http(s) URL")
        if any(character.isspace() or not character.isprintable() for character in url):
            raise ValueError("a URL must not have blanks")
        bare = urlunsplit((parts.scheme.lower(), parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))
        username = username.strip() or unquote(parts.username or "")
        return cls(bare, username, entered(password or unquote(parts.password or ""), username))

    @property
    def file_name(self) -> str:
        """The last segment of the path, decoded."""
        return unquote(urlsplit(self.url).path.rpartition("/")[2])

    def beside(self, file_name: str) -> HttpSource:
        """Another file in the same folder of the server, with the same query and credentials."""
        parts = urlsplit(self.url)
        path = f"{parts.path.rpartition('/')[0]}/{quote(file_name)}"
        return replace(self, url=urlunsplit(parts._replace(path=path)))

    @property
    def label(self) -> str:
        """The URL without secrets, for messages and records."""
        return without_secrets(self.url)


def file_path(url: str) -> Path:
    """The path in a file:// URL. Raises ValueError for a URL that names another machine."""
    from urllib.request import url2pathname

    parts = urlsplit(url)
    if parts.netloc not in {"", "localhost"}:
        raise ValueError("a file:// URL has three slashes and an absolute path")
    return Path(url2pathname(parts.path))
