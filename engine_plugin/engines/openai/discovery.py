"""Finds the server and identifies its kind and its models, by a few short requests with a timeout."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.openai.adapters import ADAPTERS, WELL_KNOWN_PORTS
from engine_plugin.engines.openai.adapters.base import Probe, text_of
from engine_plugin.engines.openai.address import VERSIONS, BaseUrl
from engine_plugin.engines.openai.errors import StillLoadingError, complaint_of_body, is_about_loading
from engine_plugin.engines.openai.keys import key_headers
from engine_plugin.errors import BadGatewayError, EnginePluginError, PreconditionError, UnavailableError
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.transport.http1 import Http1Client

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.openai.adapters.base import FetchJson, ServerAdapter, ServerInfo, ServerModel
    from engine_plugin.engines.openai.options import OpenAIOptions

__all__ = ["PROBE_TIMEOUT", "AttachedServer", "ServerFinder"]

PROBE_TIMEOUT = "ENGINE_PLUGIN_PROBE_TIMEOUT"
"""The environment variable with the timeout of these requests in seconds."""

log = logging.getLogger(__name__)

_MOST_MODELS = 5000
_NO_SERVER = "OpenAI-compatible server"
_WHERE = "correct its address: engine_host under provider in plugin.yaml"


@dataclass(eq=False, slots=True)
class AttachedServer:
    """A server that answered. `missing_services` collects the services that it turned out not to have."""

    base: BaseUrl
    server: ServerAdapter
    info: ServerInfo
    """What it reported when its models were listed last."""
    headers: Mapping[str, str]
    http: Http1Client
    missing_services: set[str] = field(default_factory=set)
    at: float = field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        """The server in messages."""
        return f"{self.server.title} at {self.base.url}"

    def model(self, name: str) -> ServerModel | None:
        """The model of this name; None if the server does not list it."""
        return next((found for found in self.info.models if found.name == name), None)

    def services(self, services: Sequence[str]) -> list[str]:
        """Those of `services` that the server has, as far as known."""
        return [
            service
            for service in services
            if service not in self.missing_services and (self.info.services is None or service in self.info.services)
        ]

    def unreachable(self, error: UnavailableError) -> UnavailableError:
        """The error for a failed connection."""
        return _unreachable(self.base, error, self.server)


class ServerFinder:
    """Finds the server by the options, the manifest or the well-known ports. Used from one event loop."""

    def __init__(self, options: OpenAIOptions, engine_host: str, environ: Mapping[str, str]) -> None:
        """No I/O. `engine_host` is from the manifest. Raises ValueError for an invalid address."""
        self._options = options
        self._environ = environ
        self._ports = WELL_KNOWN_PORTS
        self._tls: ssl.SSLContext | None = None
        self._timeout = _seconds(environ.get(PROBE_TIMEOUT, "")) or options.probe_timeout
        self.named: BaseUrl | None = None
        """The configured server; None: try the well-known ports of this machine."""
        if options.base_url:
            self.named = BaseUrl.parse(options.base_url, "engine.base_url in plugin.yaml")
        elif engine_host:
            self.named = BaseUrl.parse(engine_host, "provider.engine_host in plugin.yaml")

    async def find(self) -> AttachedServer:
        """Find the server.

        Raises UnavailableError if none answers, AuthError or PreconditionError for a key problem.
        """
        if self.named is not None:
            return await self._attach(self.named, certain=True)
        bases = [BaseUrl("http", "127.0.0.1", port, source="a well-known port") for port in self._ports]
        tried = await asyncio.gather(*(self._try_attach(base) for base in bases))
        found = next((one for one in tried if isinstance(one, AttachedServer)), None)
        if found is not None:
            return found
        # Prefer the error of a server that needs a key or loads its model.
        failures = [one for one in tried if isinstance(one, EnginePluginError)]
        there = (one for one in failures if type(one) is not UnavailableError)
        taken = [base.port for base, one in zip(bases, tried, strict=True) if not _refused(one)]
        raise next(there, None) or self._none_found(taken)

    async def _try_attach(self, base: BaseUrl) -> AttachedServer | EnginePluginError:
        try:
            return await self._attach(base, certain=False)
        except EnginePluginError as error:
            return error

    async def find_again(self, attachment: AttachedServer) -> AttachedServer:
        """Inspect the same server again. Raises like `find`."""
        return await self._attach(self.named or attachment.base, certain=self.named is not None)

    async def refresh_models(self, attachment: AttachedServer) -> bool:
        """List the models again; False if the server must be inspected again. Raises like `find`."""
        base, headers, server = attachment.base, attachment.headers, attachment.server
        client = self.open_client(attachment, base.port)
        try:
            _base, listing = await self._listed(client, base, headers, certain=self.named is not None, server=server)
            probe = Probe(base, listing, self._json_fetcher(client, base, headers))
            if not listing or not (self._options.server == server.name or server.matches(probe)):
                return False
            info = await server.inspect(probe)
        finally:
            client.close()
        if info is None:
            return False
        if {found.name for found in info.models} != {found.name for found in attachment.info.models}:
            if server.name == "other":
                return False  # the new models may identify its kind
            attachment.missing_services.clear()  # a new model may bring a service
        attachment.info = info
        return True

    async def require_alive(self, attachment: AttachedServer) -> None:
        """Check that the server answers. Raises UnavailableError."""
        base = attachment.base
        client = self.open_client(attachment, base.port)
        try:
            status, body = await self._get(client, f"{base.path}/models")
        except UnavailableError as error:
            raise attachment.unreachable(error) from error
        finally:
            client.close()
        if status >= 500:
            raise _unavailable(base, status, body, attachment.server)

    def open_client(self, attachment: AttachedServer, port: int) -> Http1Client:
        """Open a client for a port of the same host. The caller closes it."""
        base = attachment.base
        return Http1Client((base.host, port), attachment.headers, tls=self._tls if base.scheme == "https" else None)

    async def _attach(self, base: BaseUrl, *, certain: bool) -> AttachedServer:
        headers = key_headers(self._options, self._environ, base)
        if base.scheme == "https" and self._tls is None:
            self._tls = await in_thread(_tls_context, self._options.ca_file)
        tls = self._tls if base.scheme == "https" else None
        client = Http1Client((base.host, base.port), headers, tls=tls)
        try:
            base, listing = await self._listed(client, base, headers, certain=certain)
            server, info = await self._identify(client, base, listing, headers)
        finally:
            client.close()
        http = Http1Client(
            (base.host, base.port),
            headers,
            tls=tls,
            resend=False,
            connect_retries=self._options.connect_retries,
            backoff=self._options.connect_backoff,
        )
        return AttachedServer(base, server, info, headers, http)

    async def _listed(
        self,
        http: Http1Client,
        base: BaseUrl,
        headers: Mapping[str, str],
        *,
        certain: bool,
        server: ServerAdapter | None = None,
    ) -> tuple[BaseUrl, list[dict[str, Any]]]:
        """Find the path of the API and its list of models. `certain`: accept a server that lists none."""
        for version in VERSIONS if base.version is None else (base.version,):
            here = base.at_version(version)
            try:
                status, body = await self._get(http, f"{here.path}/models")
            except UnavailableError as error:
                raise _unreachable(base, error, server) from error
            if status in (401, 403):
                raise self._key_error(here, complaint_of_body(status, body).message, headers)
            if status >= 500 or 300 <= status < 400:
                raise _unavailable(base, status, body, server)
            listing = await in_thread(_model_list, body) if status == 200 else None
            if listing is not None:
                return here, listing
        if not certain:
            raise UnavailableError(f"{base.url} is not an OpenAI-compatible server")
        return base.at_version(base.version or VERSIONS[0]), []

    def _key_error(self, base: BaseUrl, reason: str, headers: Mapping[str, str]) -> EnginePluginError:
        """The error for a rejected or missing key."""
        variable = self._options.key_variable
        if headers:
            return catalogue.KEY_REFUSED.error(
                server="the server", address=base.url, reason=reason, variable=variable
            )
        if self._environ.get(variable) and self._options.send_key != "always":
            return PreconditionError(
                f"the server at {base.url} requires a key, but engine.send_key does not allow to send it. "
                "Set send_key: always in plugin.yaml"
            )
        return catalogue.KEY_MISSING.error(server="the server", address=base.url, variable=variable)

    def key_error(self, attachment: AttachedServer, reason: str) -> EnginePluginError:
        """The error for a request that the server rejected because of its key."""
        return self._key_error(attachment.base, reason, attachment.headers)

    async def _identify(
        self, http: Http1Client, base: BaseUrl, listing: Sequence[Mapping[str, Any]], headers: Mapping[str, str]
    ) -> tuple[ServerAdapter, ServerInfo]:
        chosen, probe = self._options.server, Probe(base, listing, self._json_fetcher(http, base, headers))
        for server in ADAPTERS:
            if server.name == chosen or (chosen == "auto" and server.matches(probe)):
                info = await server.inspect(probe)
                if info is not None:
                    return server, info
        raise _unreachable(base, UnavailableError(f"it is not {chosen}"))

    def _json_fetcher(self, http: Http1Client, base: BaseUrl, headers: Mapping[str, str]) -> FetchJson:
        async def fetch_json(path: str, *, port: int = 0) -> Any:
            if not port:
                return await self._json(http, base.prefix + path)
            other = Http1Client((base.host, port), headers, tls=self._tls if base.scheme == "https" else None)
            try:
                return await self._json(other, path)
            finally:
                other.close()

        return fetch_json

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
            raise UnavailableError(f"no answer within {self._timeout:g} s") from None
        except BadGatewayError as error:
            raise UnavailableError(str(error)) from error

    def _none_found(self, taken: Sequence[int]) -> UnavailableError:
        """The error without a server. `taken` are the ports of other programs."""
        ports = ", ".join(f"{port} ({whose})" for port, whose in self._ports.items())
        return catalogue.SERVER_UNREACHABLE.error(
            server=_NO_SERVER,
            address=f"the ports {ports} of this machine",
            reason=f"no such API at {' and '.join(map(str, taken))}" if taken else "connection refused",
            start="lms server start, vllm serve MODEL or llama-server -m MODEL.gguf, for example",
            otherwise="set its address: engine_host under provider in plugin.yaml",
        )


def _refused(error: object) -> bool:
    """Whether the connection was refused."""
    return isinstance(error, EnginePluginError) and _caused_by(error, ConnectionRefusedError)


def _caused_by(error: BaseException | None, kind: type[OSError]) -> bool:
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__
    return False


def _unreachable(base: BaseUrl, error: UnavailableError, server: ServerAdapter | None = None) -> UnavailableError:
    from ssl import SSLCertVerificationError

    otherwise = _WHERE
    if _caused_by(error, SSLCertVerificationError):
        otherwise = "name the authority of its certificate: engine.ca_file in plugin.yaml"
    return catalogue.SERVER_UNREACHABLE.error(
        server=server.title.removeprefix("the ") if server is not None and server.name != "other" else _NO_SERVER,
        address=base.url,
        reason=error.reason,
        start="see its documentation" if server is None else server.start,
        otherwise=otherwise,
    )


def _unavailable(base: BaseUrl, status: int, body: bytes, server: ServerAdapter | None) -> UnavailableError:
    """The error for a server that answers with an error or a redirection."""
    complaint = complaint_of_body(status, body)
    if is_about_loading(complaint):
        return StillLoadingError.of(f"{'the server' if server is None else server.title} at {base.url}", complaint)
    return _unreachable(base, UnavailableError(_status_reason(status, body)), server)


def _status_reason(status: int, body: bytes) -> str:
    if status < 400:
        return "it answers with a redirection, which is not followed"
    return f"it answers {status}: {complaint_of_body(status, body).message}"


def _model_list(body: bytes) -> list[dict[str, Any]] | None:
    """The entries of a list of models; None if the body is not one."""
    try:
        shape = read_json(body, LARGEST_JSON)
    except JsonError:
        return None
    entries = shape.get("data") if isinstance(shape, dict) else shape
    if not isinstance(entries, list):
        return None
    found = {text_of(entry, "id"): entry for entry in entries if isinstance(entry, dict)}
    found.pop("", None)  # no name, or an unprintable one
    if len(found) > _MOST_MODELS:
        log.warning("the server lists %d models; only the first %d are used", len(found), _MOST_MODELS)
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
                f"engine.ca_file: cannot read {ca_file}: {error.strerror or error}. Name a PEM file"
            ) from error
    return context
