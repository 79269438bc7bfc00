"""Where the server is, what kind it is, and what it says of itself: a few cheap questions, none of which may hang."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.openai.address import VERSIONS, BaseUrl
from engine_plugin.engines.openai.errors import StillLoadingError, complaint_of_body, is_about_loading
from engine_plugin.engines.openai.keys import key_headers
from engine_plugin.engines.openai.servers import SERVERS, WELL_KNOWN_PORTS
from engine_plugin.engines.openai.servers.base import Glance, text_of
from engine_plugin.errors import BadGatewayError, EnginePluginError, PreconditionError, UnavailableError
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.transport.http1 import Http1Client

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.openai.options import OpenAIOptions
    from engine_plugin.engines.openai.servers.base import Ask, Found, Seen, Server

__all__ = ["PROBE_TIMEOUT", "Attachment", "Finder"]

PROBE_TIMEOUT = "ENGINE_PLUGIN_PROBE_TIMEOUT"
"""The environment variable with the seconds that a server may take to say what it is."""

log = logging.getLogger(__name__)

_MOST_MODELS = 5000
_NO_SERVER = "OpenAI-compatible server"
_WHERE = "correct its address: engine_host under provider in plugin.yaml"


@dataclass(eq=False, slots=True)
class Attachment:
    """A server that answered. `lacks` collects the services that it turned out not to have."""

    base: BaseUrl
    server: Server
    seen: Seen
    """What it says of itself, as of the last time that it was asked for its models."""
    headers: Mapping[str, str]
    http: Http1Client
    lacks: set[str] = field(default_factory=set)
    at: float = field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        """Who it is, for people."""
        return f"{self.server.title} at {self.base.url}"

    def model(self, name: str) -> Found | None:
        """What the server says of the model of that name; None when it has none."""
        return next((found for found in self.seen.models if found.name == name), None)

    def able(self, services: Sequence[str]) -> list[str]:
        """Those of the services that it has, as far as is known."""
        return [
            service
            for service in services
            if service not in self.lacks and (self.seen.able is None or service in self.seen.able)
        ]

    def down(self, error: UnavailableError) -> UnavailableError:
        """For a connection that could not be made."""
        return _down(self.base, error, self.server)


class Finder:
    """Finds the server that the options, the manifest or this machine's ports name. Used from one event loop."""

    def __init__(self, options: OpenAIOptions, engine_host: str, environ: Mapping[str, str]) -> None:
        """No I/O. `engine_host` is the manifest's. Raises ValueError for an address that is none."""
        self._options = options
        self._environ = environ
        self._ports = WELL_KNOWN_PORTS
        self._tls: ssl.SSLContext | None = None
        self._timeout = _seconds(environ.get(PROBE_TIMEOUT, "")) or options.probe_timeout
        self.named: BaseUrl | None = None
        """The server that somebody named; None: the well-known ports of this machine are tried."""
        if options.base_url:
            self.named = BaseUrl.parse(options.base_url, "engine.base_url in plugin.yaml")
        elif engine_host:
            self.named = BaseUrl.parse(engine_host, "provider.engine_host in plugin.yaml")

    async def find(self) -> Attachment:
        """The server. Raises UnavailableError when none answers, AuthError and PreconditionError about the key."""
        if self.named is not None:
            return await self._attach(self.named, certain=True)
        bases = [BaseUrl("http", "127.0.0.1", port, source="a port that such servers use") for port in self._ports]
        tried = await asyncio.gather(*(self._tried(base) for base in bases))
        found = next((one for one in tried if isinstance(one, Attachment)), None)
        if found is not None:
            return found
        # One that wants a key is there, as is one that loads its model; else nothing is.
        failures = [one for one in tried if isinstance(one, EnginePluginError)]
        there = (one for one in failures if type(one) is not UnavailableError)
        taken = [base.port for base, one in zip(bases, tried, strict=True) if not _refused(one)]
        raise next(there, None) or self._nothing(taken)

    async def _tried(self, base: BaseUrl) -> Attachment | EnginePluginError:
        try:
            return await self._attach(base, certain=False)
        except EnginePluginError as error:
            return error

    async def look_again(self, attachment: Attachment) -> Attachment:
        """The same server with what it says now. Raises as `find` does."""
        return await self._attach(self.named or attachment.base, certain=self.named is not None)

    async def list_again(self, attachment: Attachment) -> bool:
        """Have the server say again which models it has; False when it is to be looked at anew. Raises as `find`."""
        base, headers, server = attachment.base, attachment.headers, attachment.server
        probe = self.client(attachment, base.port)
        try:
            _base, listing = await self._listed(probe, base, headers, certain=self.named is not None, server=server)
            glance = Glance(base, listing, self._asker(probe, base, headers))
            if not listing or not (self._options.server == server.name or server.may_be(glance)):
                return False
            seen = await server.look(glance)
        finally:
            probe.close()
        if seen is None:
            return False
        if {found.name for found in seen.models} != {found.name for found in attachment.seen.models}:
            if server.name == "other":
                return False  # these may say more of what it is
            attachment.lacks.clear()  # a service may have come with its model
        attachment.seen = seen
        return True

    async def require_alive(self, attachment: Attachment) -> None:
        """Ask the server for its models once more. Raises UnavailableError when it does not answer."""
        base = attachment.base
        probe = self.client(attachment, base.port)
        try:
            status, body = await self._get(probe, f"{base.path}/models")
        except UnavailableError as error:
            raise attachment.down(error) from error
        finally:
            probe.close()
        if status >= 500:
            raise _cannot(base, status, body, attachment.server)

    def client(self, attachment: Attachment, port: int) -> Http1Client:
        """A client of a port of the same host. The caller closes it."""
        base = attachment.base
        return Http1Client((base.host, port), attachment.headers, tls=self._tls if base.scheme == "https" else None)

    async def _attach(self, base: BaseUrl, *, certain: bool) -> Attachment:
        headers = key_headers(self._options, self._environ, base)
        if base.scheme == "https" and self._tls is None:
            self._tls = await in_thread(_tls_context, self._options.ca_file)
        tls = self._tls if base.scheme == "https" else None
        probe = Http1Client((base.host, base.port), headers, tls=tls)
        try:
            base, listing = await self._listed(probe, base, headers, certain=certain)
            server, seen = await self._recognised(probe, base, listing, headers)
        finally:
            probe.close()
        http = Http1Client(
            (base.host, base.port),
            headers,
            tls=tls,
            resend=False,
            connect_retries=self._options.connect_retries,
            backoff=self._options.connect_backoff,
        )
        return Attachment(base, server, seen, headers, http)

    async def _listed(
        self,
        http: Http1Client,
        base: BaseUrl,
        headers: Mapping[str, str],
        *,
        certain: bool,
        server: Server | None = None,
    ) -> tuple[BaseUrl, list[dict[str, Any]]]:
        """Where the interface is, and its list of models. `certain`: a server that lists none is one, too."""
        for version in VERSIONS if base.version is None else (base.version,):
            here = base.at_version(version)
            try:
                status, body = await self._get(http, f"{here.path}/models")
            except UnavailableError as error:
                raise _down(base, error, server) from error
            if status in (401, 403):
                raise self._about_key(here, complaint_of_body(status, body).message, headers)
            if status >= 500 or 300 <= status < 400:
                raise _cannot(base, status, body, server)
            listing = await in_thread(_listing, body) if status == 200 else None
            if listing is not None:
                return here, listing
        if not certain:
            raise UnavailableError(f"{base.url} is no such server")
        return base.at_version(base.version or VERSIONS[0]), []

    def _about_key(self, base: BaseUrl, reason: str, headers: Mapping[str, str]) -> EnginePluginError:
        """For a server that refuses us: why, and which variable to mend."""
        variable = self._options.key_variable
        if headers:
            return catalogue.KEY_REFUSED.error(
                server="the server", address=base.url, reason=reason, variable=variable
            )
        if self._environ.get(variable) and self._options.send_key != "always":
            return PreconditionError(
                f"the server at {base.url} asks for a key, which engine.send_key keeps from it. "
                "Set send_key: always in plugin.yaml"
            )
        return catalogue.KEY_MISSING.error(server="the server", address=base.url, variable=variable)

    def key_error(self, attachment: Attachment, reason: str) -> EnginePluginError:
        """For a server that refuses a request for its key."""
        return self._about_key(attachment.base, reason, attachment.headers)

    async def _recognised(
        self, http: Http1Client, base: BaseUrl, listing: Sequence[Mapping[str, Any]], headers: Mapping[str, str]
    ) -> tuple[Server, Seen]:
        chosen, glance = self._options.server, Glance(base, listing, self._asker(http, base, headers))
        for server in SERVERS:
            if server.name == chosen or (chosen == "auto" and server.may_be(glance)):
                seen = await server.look(glance)
                if seen is not None:
                    return server, seen
        raise _down(base, UnavailableError(f"it is no {chosen}"))

    def _asker(self, http: Http1Client, base: BaseUrl, headers: Mapping[str, str]) -> Ask:
        async def ask(path: str, *, port: int = 0) -> Any:
            if not port:
                return await self._json(http, base.prefix + path)
            other = Http1Client((base.host, port), headers, tls=self._tls if base.scheme == "https" else None)
            try:
                return await self._json(other, path)
            finally:
                other.close()

        return ask

    async def _json(self, http: Http1Client, path: str) -> Any:
        try:
            status, body = await self._get(http, path)
            return await in_thread(read_json, body, LARGEST_JSON) if status == 200 else None
        except (EnginePluginError, JsonError):
            return None

    async def _get(self, http: Http1Client, path: str) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(self._timeout), http.request("GET", path) as response:
                return response.status, await response.read(LARGEST_JSON)
        except TimeoutError:
            raise UnavailableError(f"it does not answer in {self._timeout:g} s") from None
        except BadGatewayError as error:
            raise UnavailableError(str(error)) from error

    def _nothing(self, taken: Sequence[int]) -> UnavailableError:
        """`taken` are the ports where somebody is, who is no such server."""
        ports = ", ".join(f"{port} ({whose})" for port, whose in self._ports.items())
        return catalogue.SERVER_UNREACHABLE.error(
            server=_NO_SERVER,
            address=f"the ports {ports} of this machine",
            reason=f"what is at {' and '.join(map(str, taken))} does not speak that interface"
            if taken
            else "nobody listens there",
            start="lms server start, vllm serve MODEL or llama-server -m MODEL.gguf, for example",
            otherwise="name the address of yours: engine_host under provider in plugin.yaml",
        )


def _refused(error: object) -> bool:
    """Whether nothing listens."""
    return isinstance(error, EnginePluginError) and _caused_by(error, ConnectionRefusedError)


def _caused_by(error: BaseException | None, kind: type[OSError]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False


def _down(base: BaseUrl, error: UnavailableError, server: Server | None = None) -> UnavailableError:
    from ssl import SSLCertVerificationError

    otherwise = _WHERE
    if _caused_by(error, SSLCertVerificationError):
        otherwise = "name the authority of its certificate: engine.ca_file in plugin.yaml"
    return catalogue.SERVER_UNREACHABLE.error(
        server=server.title.removeprefix("the ") if server is not None and server.name != "other" else _NO_SERVER,
        address=base.url,
        reason=error.reason,
        start="as its maker says" if server is None else server.start,
        otherwise=otherwise,
    )


def _cannot(base: BaseUrl, status: int, body: bytes, server: Server | None) -> UnavailableError:
    """For a server that answers, but does not serve."""
    complaint = complaint_of_body(status, body)
    if is_about_loading(complaint):
        return StillLoadingError.of(f"{'the server' if server is None else server.title} at {base.url}", complaint)
    return _down(base, UnavailableError(_said(status, body)), server)


def _said(status: int, body: bytes) -> str:
    if status < 400:
        return "it is somewhere else: it answers with a redirection, which is not followed"
    return f"it answers {status}: {complaint_of_body(status, body).message}"


def _listing(body: bytes) -> list[dict[str, Any]] | None:
    """The entries of a list of models; None when it is none."""
    try:
        shape = read_json(body, LARGEST_JSON)
    except JsonError:
        return None
    entries = shape.get("data") if isinstance(shape, dict) else shape
    if not isinstance(entries, list):
        return None
    found = {text_of(entry, "id"): entry for entry in entries if isinstance(entry, dict)}
    found.pop("", None)  # no name, or none that anybody could write
    if len(found) > _MOST_MODELS:
        log.warning("the server lists %d models; only the first %d are looked at", len(found), _MOST_MODELS)
    return list(islice(found.values(), _MOST_MODELS))


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if 0 < value < 600 else 0.0


def _tls_context(ca_file: str) -> ssl.SSLContext:
    import ssl

    context = ssl.create_default_context()
    if ca_file:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:
            raise PreconditionError(
                f"engine.ca_file: {ca_file} cannot be used ({error.strerror or error}). Name a PEM file"
            ) from error
    return context
