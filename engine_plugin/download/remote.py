"""One GET of a file over HTTP: redirects, credentials, and the headers that describe the file."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from engine_plugin import catalogue
from engine_plugin.download.events import StepStarted
from engine_plugin.download.partial import is_header_value
from engine_plugin.download.source import LOOPBACK, without_secrets
from engine_plugin.errors import AuthError, DownloadError, InvalidRequestError, NotFoundError
from engine_plugin.system.sizes import byte_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    import httpx

    from engine_plugin.download.events import PullEvent
    from engine_plugin.download.source import HttpSource

__all__ = [
    "Answer",
    "DroppedError",
    "FetchPolicy",
    "Remote",
    "UnreachableError",
    "http_client",
    "next_url",
    "open_url",
    "patiently",
]

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MOST_REDIRECTS = 10
_CONTENT_RANGE = re.compile(r"bytes (?:([0-9]{1,18})-([0-9]{1,18})|\*)/([0-9]{1,18}|\*)")
_LENGTH = re.compile(r"[0-9]{1,18}")
_LONGEST_WAIT = 366 * 86400.0
"""Seconds; the bound of a Retry-After."""
_HEX64 = re.compile(r'"?([0-9a-fA-F]{64})"?')


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """The limits of a download, in seconds; it fails after so many `attempts` in a row without progress."""

    connect_s: float = 15.0
    stall_s: float = 30.0
    attempts: int = 5
    backoff_s: float = 0.5
    longest_wait_s: float = 60.0


_STEP = 64 * 1024
"""Bytes by which an attempt must pass all earlier ones to count as progress, so that slow drips come to an end."""

T = TypeVar("T")


class DroppedError(Exception):
    """The transfer failed, and another attempt may succeed, after `retry_after` seconds if the server said so."""

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Remote:
    """The file behind an answer. `total` is 0 and texts are "" when the server does not say.

    `etag` is strong, as it came. Hugging Face names the digest as X-Linked-ETag on the redirect to its storage
    (`linked_sha256`); some storages make it the ETag.
    """

    etag: str
    last_modified: str
    total: int
    start: int
    linked_sha256: str

    @property
    def sha256(self) -> str:
        """The digest that the server gives, 64 hex digits or ""."""
        return self.linked_sha256 or _hex64(self.etag)

    @property
    def validator(self) -> str:
        """The ETag or Last-Modified, which identifies the version of the file, or ""."""
        return self.etag or self.last_modified


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer other than a redirect, before its body is read."""

    response: httpx.Response
    linked_sha256: str

    def remote(self) -> Remote:
        """The file of a 200, 206 or 416. Raises DownloadError for headers that contradict each other."""
        headers = self.response.headers
        etag, last_modified = (
            value if is_header_value(value) else ""
            for value in (headers.get("etag", ""), headers.get("last-modified", ""))
        )
        text = headers.get("content-length") or "0"
        if not _LENGTH.fullmatch(text):
            raise DownloadError(f"{self.place}: the server answered with an invalid Content-Length.")
        length = int(text)
        start, total = 0, length
        if self.response.status_code != 200:
            start, total = self._range(headers.get("content-range", ""), length)
        return Remote(
            etag="" if etag.startswith("W/") else etag,
            last_modified=last_modified,
            total=total,
            start=start,
            linked_sha256=self.linked_sha256,
        )

    def _range(self, text: str, length: int) -> tuple[int, int]:
        match = _CONTENT_RANGE.fullmatch(text)
        if match is None and self.response.status_code == 416:
            return 0, 0
        if match is None:
            raise DownloadError(f"{self.place}: the server answered a range request without a valid Content-Range.")
        first, last, total = match.groups()
        whole = 0 if total == "*" else int(total)
        if first is None:
            return 0, whole
        count = int(last) - int(first) + 1
        if count <= 0 or (whole and int(last) >= whole) or (length and length != count):
            raise DownloadError(
                f"{self.place}: the server contradicts itself: Content-Range {text!r}, Content-Length {length}."
            )
        return int(first), whole

    @property
    def place(self) -> str:
        """The address that answered, without secrets."""
        return without_secrets(str(self.response.url))

    def check_status(self) -> None:
        """Raise the error for a web page, and for a status other than 200, 206 and 416."""
        status = self.response.status_code
        if status in {401, 403}:
            raise AuthError(f"{self.place}: the server refused access (HTTP {status}).")
        if status in {404, 410}:
            raise NotFoundError(f"{self.place}: there is no such file (HTTP {status}). Correct the URL.")
        if status in {408, 429} or (status >= 500 and status not in {501, 505}):
            raise DroppedError(f"HTTP {status}", _seconds(self.response.headers.get("retry-after", "")))
        if status not in {200, 206, 416}:
            raise DownloadError(f"{self.place}: HTTP {status} is not a valid answer to a download.")
        if status != 416:
            self._check_content()

    def _check_content(self) -> None:
        headers = self.response.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind in {"text/html", "application/xhtml+xml"}:
            raise DownloadError(
                f"{self.place}: the server sent a web page, not the file. Use the file's download link "
                "(on Hugging Face: /resolve/, not /blob/)."
            )
        if headers.get("content-encoding", "identity").lower() not in {"identity", ""}:
            raise DownloadError(f"{self.place}: the server compressed the file against Accept-Encoding: identity.")


def _hex64(etag: str) -> str:
    match = _HEX64.fullmatch(etag.strip())
    return match[1].lower() if match else ""


def _seconds(retry_after: str) -> float | None:
    """Retry-After in seconds (RFC 9110, 10.2.3), or None."""
    if not retry_after or len(retry_after) > 100:
        return None
    if retry_after.strip().isdecimal():
        return min(float(retry_after), _LONGEST_WAIT)
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    try:
        when = parsedate_to_datetime(retry_after).astimezone(UTC)
    except (ValueError, TypeError, IndexError, OverflowError):  # all of these, for one date or another
        return None
    return min(max(0.0, (when - datetime.now(UTC)).total_seconds()), _LONGEST_WAIT)


class _NoSecrets(logging.Filter):
    """httpx logs each request's URL at INFO; a signed URL's query must not get into a log."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(without_secrets(str(arg)) if "://" in str(arg) else arg for arg in record.args)
        return True


_NO_SECRETS = _NoSecrets()


def http_client(policy: FetchPolicy, *, insecure: bool) -> httpx.AsyncClient:
    """A client that follows nothing and keeps no credentials by itself.

    Raises DownloadError for settings of the environment that cannot be used.
    """
    import httpx

    logging.getLogger("httpx").addFilter(_NO_SECRETS)
    try:
        return httpx.AsyncClient(
            verify=not insecure,
            timeout=httpx.Timeout(policy.stall_s, connect=policy.connect_s),
            follow_redirects=False,
            event_hooks={"response": [_take_location]},
        )
    except (ValueError, ImportError, httpx.InvalidURL) as error:  # an unknown scheme, SOCKS, no URL at all
        raise DownloadError(
            f"the proxy in HTTPS_PROXY, HTTP_PROXY or ALL_PROXY cannot be used ({_cause(error)}). Set it to the "
            "http:// address of a proxy, or unset it."
        ) from error
    except OSError as error:
        raise DownloadError(
            f"the certificates in SSL_CERT_FILE or SSL_CERT_DIR cannot be read ({_cause(error)}). Correct the path."
        ) from error


async def _take_location(response: httpx.Response) -> None:
    """Keep httpx from reading Location: it does even where it does not follow, and fails on a bad one."""
    response.extensions["location"] = response.headers.pop("location", "")


def _authorization(source: HttpSource, *, insecure: bool) -> dict[str, str]:
    if not (source.username or source.password or source.token):
        return {}
    import httpx

    url = httpx.URL(source.url)
    if url.scheme == "http" and url.host not in LOOPBACK and not insecure:
        raise InvalidRequestError.at(
            "source", "credentials would cross the network unprotected; use https, or set insecure to allow it."
        )
    if source.token:
        return {"Authorization": f"Bearer {source.token}"}
    pair = f"{source.username}:{source.password}".encode()
    return {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}


def next_url(here: httpx.URL, location: str, *, insecure: bool) -> httpx.URL:
    """Where a redirect leads. Raises DownloadError for a place to which none may lead."""
    import httpx

    place, why = f"{without_secrets(str(here))}: the server redirects", ""
    try:
        url = here.join(location).copy_with(username=None, password=None, fragment=None)
    except (httpx.InvalidURL, ValueError) as error:
        raise DownloadError(f"{place} to an invalid URL.") from error
    if url.port is not None and not 0 < url.port < 65536:
        why = f"to an invalid URL (port {url.port})"
    elif url.scheme not in {"http", "https"} or not url.host:
        why = f"to {url.scheme!r}, not to http(s)"
    elif here.scheme == "https" and url.scheme == "http" and not insecure:
        why = (
            f"from https to http ({without_secrets(str(url))}), where the file could be changed on its way. Set "
            "insecure to allow it"
        )
    if why:
        raise DownloadError(f"{place} {why}.")
    return url


class UnreachableError(DownloadError):
    """No connection to the server could be made."""


@contextmanager
def _reaching(source: str, client: httpx.AsyncClient, settings: str) -> Iterator[None]:
    """Errors of httpx in this block, as errors of this package.

    `source` names what is fetched; `settings` are what a person checks when there is no connection. Raises
    UnreachableError, DownloadError, or DroppedError where asking again may help.
    """
    import httpx

    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise catalogue.HUB_UNREACHABLE.error_as(
            UnreachableError, source=source, reason=_cause(error), settings=settings
        ) from error
    except httpx.TimeoutException as error:
        raise DroppedError(f"no byte came for {client.timeout.read:.0f} s") from error
    except httpx.TransportError as error:
        raise DroppedError(f"the connection was lost ({_cause(error)})") from error
    except httpx.HTTPError as error:
        raise DownloadError(f"{source}: the server's answer is not valid HTTP ({_cause(error)}).") from error


def _cause(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _origin(url: httpx.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


async def _sent(client: httpx.AsyncClient, url: httpx.URL, headers: Mapping[str, str]) -> httpx.Response:
    """The answer's head. An address or a header that cannot be used fails at once: asking again would not help."""
    import httpx

    try:
        return await client.send(client.build_request("GET", url, headers=headers), stream=True)
    except (
        httpx.InvalidURL,
        httpx.LocalProtocolError,
        httpx.UnsupportedProtocol,
        ValueError,
        OverflowError,
    ) as error:
        raise DownloadError(f"{without_secrets(str(url))}: the request cannot be sent ({_cause(error)}).") from error


@asynccontextmanager
async def open_url(
    client: httpx.AsyncClient,
    source: HttpSource,
    headers: Mapping[str, str],
    *,
    insecure: bool,
    settings: str = "the address, the network, HTTPS_PROXY",
) -> AsyncIterator[Answer]:
    """GET a URL and follow redirects; credentials go to the first origin only (scheme, host and port).

    `settings` are what a person checks when there is no connection. Raises UnreachableError; DroppedError where
    asking again may help; DownloadError for a redirect that is not followed and for an answer that is not valid HTTP,
    also while the body is read. Leaving closes the answer.
    """
    import httpx

    authorization = _authorization(source, insecure=insecure)
    try:
        first = url = httpx.URL(source.url)
    except httpx.InvalidURL as error:
        raise InvalidRequestError.at("source", f"{source.label!r} is no valid URL.") from error
    linked = ""
    with _reaching(source.label, client, settings):
        for _ in range(_MOST_REDIRECTS + 1):
            own = authorization if _origin(url) == _origin(first) else {}
            response = await _sent(client, url, {"Accept-Encoding": "identity", **headers, **own})
            try:
                linked = linked or _hex64(response.headers.get("x-linked-etag", ""))
                location = response.extensions["location"]
                if response.status_code not in _REDIRECTS or not location:
                    yield Answer(response, linked)
                    return
                url = next_url(url, location, insecure=insecure)
            finally:
                await response.aclose()
    raise DownloadError(f"{source.label}: more than {_MOST_REDIRECTS} redirects.")


async def patiently(
    attempt: Callable[[], Awaitable[T]],
    policy: FetchPolicy,
    publish: Callable[[PullEvent], None],
    place: str,
    arrived: Callable[[], int] = lambda: 0,
) -> T:
    """Call `attempt` again after each DroppedError, until several in a row made no progress.

    `arrived` returns the bytes that are here. Raises DownloadError about `place` in the end, and what `attempt`
    raises.
    """
    furthest, fruitless = arrived(), 0
    while True:
        try:
            return await attempt()
        except DroppedError as error:
            here = arrived()
            fruitless = 0 if here >= furthest + _STEP else fruitless + 1
            furthest = max(furthest, here)
            wait = min(policy.backoff_s * 2 ** max(fruitless - 1, 0), policy.longest_wait_s)
            if error.retry_after is not None:
                wait = error.retry_after
            if fruitless >= policy.attempts:
                raise DownloadError(
                    f"{place}: {error}; {policy.attempts} attempts made no progress after {here} bytes. Check the "
                    "network and try again: a download resumes if the server supports it."
                ) from error
            if wait > policy.longest_wait_s:
                raise DownloadError(
                    f"{place}: {error}; the server is busy for {wait:.0f} seconds. Try again then."
                ) from error
            after = f", after {byte_size(here)}" if here else ""
            publish(StepStarted(f"{error}; trying again in {wait:.1f} s{after}"))
        await asyncio.sleep(wait)
