"""Keeps secrets out of text: error messages, log records and progress events.

`entered` registers a secret and strips the white space around it. `redacted` replaces every registered secret, and
whatever has the form of one, where an error, a record or an event becomes text.
"""

from __future__ import annotations

import base64
import logging
import re
from collections import OrderedDict
from urllib.parse import quote, quote_plus

__all__ = ["RedactingFormatter", "entered", "redacted", "sendable"]

_MARK = "***"
_INVISIBLE = "\ufeff\u200b\u2060"
_SHORTEST, _SHORTEST_WORD = 4, 6
"""The fewest characters of a secret, and of one that is a plain word, to be searched for in texts: shorter ones would
replace ordinary words."""
_MOST = 256
"""The most spellings of secrets that are kept; the oldest are dropped first."""

_PARAMETERS = (
    r"[\w.-]*(?:token|signature|secret|passw(?:or)?d|credential|api[_-]?key|access[_-]?key(?:id)?|auth[_-]?key)"
    r"|sig|pwd|policy|key-pair-id|googleaccessid|jwt|auth"
)
_FORMS: tuple[tuple[re.Pattern[str], str], ...] = (
    # user:password@ in a URL, also in one with too few or too many slashes
    (re.compile(r"\b((?:https?|ftp|socks5h?|wss?):[/\\]*)[^\s/\\'\"<>]+@", re.IGNORECASE), rf"\1{_MARK}@"),
    # the same with a slash in the password, which no port number can be
    (
        re.compile(r"\b(https?:[/\\]*)[^\s/\\@:'\"<>]+:(?!\d{1,5}(?:[/?#]|$))[^\s@'\"<>]*@", re.IGNORECASE),
        rf"\1{_MARK}@",
    ),
    (re.compile(rf"([?&;](?:{_PARAMETERS})=)[^&;\s'\"<>#]+", re.IGNORECASE), rf"\1{_MARK}"),
    (re.compile(r"\b((?:proxy-)?authorization['\"]?\s*[:=,]\s*b?['\"]?)[^'\",)\r\n]+", re.IGNORECASE), rf"\1{_MARK}"),
    (re.compile(r"\b(bearer|basic)(\s+)(?=[^\s'\",;]*[\d_=])[^\s'\",;]+", re.IGNORECASE), rf"\1\2{_MARK}"),
    (
        re.compile(
            r"\b(?:hf_[A-Za-z0-9]{10,}|api_org_[A-Za-z0-9]{10,}|sk-[A-Za-z0-9_-]{16,}|ms-[0-9a-f-]{30,}"
            r"|gh[opsur]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AIza[\w-]{30,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]*)"
        ),
        _MARK,
    ),
)


class _Known:
    """The secrets that this process has registered."""

    def __init__(self) -> None:
        self._spellings: OrderedDict[str, None] = OrderedDict()
        self.pattern: re.Pattern[str] | None = None

    def add(self, secret: str) -> None:
        plain = secret.isalpha() and secret.islower()
        if len(secret) < (_SHORTEST_WORD if plain else _SHORTEST) or secret in self._spellings:
            return
        for spelling in _spellings(secret):
            self._spellings[spelling] = None
            self._spellings.move_to_end(spelling)
        while len(self._spellings) > _MOST:
            self._spellings.popitem(last=False)
        longest_first = sorted(self._spellings, key=len, reverse=True)
        alternatives = "|".join(re.escape(spelling) for spelling in longest_first)
        self.pattern = re.compile(rf"(?<![A-Za-z0-9])(?:{alternatives})(?![A-Za-z0-9])")


_KNOWN = _Known()


def _spellings(secret: str) -> set[str]:
    """The spellings of a secret in messages: plain, quoted for a URL, and as `repr`."""
    return {secret, quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1], ascii(secret)[1:-1]}


def entered(secret: str, user: str = "") -> str:
    """Register a secret for `redacted`; returns it without white space around it.

    Called where a token, key or password enters. `user` is the user name of a password: both together are sent in
    base64, which is registered too.
    """
    secret = secret.strip().strip(_INVISIBLE).strip()
    if secret:
        _KNOWN.add(secret)
        pair = base64.b64encode(f"{user}:{secret}".encode("utf-8", "replace")).decode()
        _KNOWN.add(pair)
    return secret


def redacted(text: str) -> str:
    """`text` with every secret replaced by `***`."""
    if _KNOWN.pattern is not None:
        text = _KNOWN.pattern.sub(_MARK, text)
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def sendable(text: str) -> str:
    """`text` without secrets, and as valid UTF-8: it may quote a path in an unknown encoding."""
    return redacted(text).encode("utf-8", "replace").decode()


class RedactingFormatter(logging.Formatter):
    """A log formatter that redacts message, exception and stack."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))
