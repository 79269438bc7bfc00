"""Finds the server and identifies its kind and its models, by a few short requests with a timeout."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.engines.openai.adapters import ADAPTERS, WELL_KNOWN_PORTS
from engine_plugin.engines.openai.adapters.base import Probe, Reported
from engine_plugin.engines.openai.address import VERSIONS, BaseUrl
from engine_plugin.engines.openai.errors import StillLoadingError, is_about_loading
from engine_plugin.engines.openai.keys import key_error, key_headers
from engine_plugin.errors import EnginePluginError, PreconditionError, UnavailableError
from engine_plugin.jsontext import JsonError, read_json
from engine_plugin.system.files import LARGEST_JSON, in_thread
from engine_plugin.transport.answers import Complaint
from engine_plugin.transport.connections import CONNECTIONS_AHEAD

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping, Sequence

    from engine_plugin.engines.openai.adapters.base import ServerAdapter, ServerInfo
    from engine_plugin.engines.openai.options import OpenAIOptions
    from engine_plugin.models.info import ModelInfo
    from engine_plugin.transport.http1 import Http1Client

__all__ = ["PROBE_TIMEOUT", "STALE_AFTER", "AttachedServer", "ServerFinder"]

PROBE_TIMEOUT = "ENGINE_PLUGIN_PROBE_TIMEOUT"
"""The environment variable with the timeout of these requests in seconds."""

STALE_AFTER = 300.0
"""Seconds after which the server is inspected again, and after which what calls found missing is forgotten."""

log = logging.getLogger(__name__)

_MOST_MODELS = 5000
_NO_SERVER = "OpenAI-compatible server"
_WHERE = "correct its address: engine_host under provider in plugin.yaml"


@dataclass(eq=False, slots=True)
class AttachedServer:
    """A server that answered.

    Calls collect what it turned out not to have: `missing_services`, and `text_only_models`, which transcribe without
    segments. `learned` is the time from which they collect it.
    """

    probe: Probe
    server: ServerAdapter
    info: ServerInfo
    """What it reported when its models were listed last."""
    http: Http1Client
    missing_services: set[str] = field(default_factory=set)
    text_only_models: set[str] = field(default_factory=set)
    learned: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.monotonic)

    @property
    def base(self) -> BaseUrl:
        """Its address."""
        return self.probe.base

    @property
    def title(self) -> str:
        """The server in messages."""
        return f"{self.server.title} at {self.base.url}"

    @property
    def names(self) -> set[str]:
        """The names of its models."""
        return {found.name for found in self.info.models}

    def model(self, name: str) -> ModelInfo | None:
        """The model of this name; None if the server does not list it."""
        return next((found for found in self.info.models if found.name == name), None)

    def has(self, service: str) -> bool:
        """Whether the server has a service, as far as known."""
        reported = self.info.services
        return service not in self.missing_services and (reported is None or service in reported)

    def keep_learned(self, before: AttachedServer) -> None:
        """Keep what calls found missing when the server was inspected before, unless that may have changed."""
        same = self.server is before.server and self.names == before.names  # else a new model may bring a service
        if same and time.monotonic() - before.learned < STALE_AFTER:
            self.missing_services, self.text_only_models = before.missing_services, before.text_only_models
            self.learned = before.learned

    def forget_learned(self) -> None:
        """Forget what calls found missing."""
        self.missing_services.clear()
        self.text_only_models.clear()

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
        address = options.base_url or engine_host
        self.named = BaseUrl.parse(address) if address else None
        """The configured server; None: try the well-known ports of this machine."""

    async def find(self, before: AttachedServer | None = None) -> AttachedServer:
        """Find and inspect the server; `before` is what was found last.

        Raises UnavailableError if none answers, AuthError or PreconditionError for a key problem.
        """
        known = self.named or (before.base if before is not None else None)
        if known is not None:
            return await self._attach(known, certain=self.named is not None, before=before)
        bases = [BaseUrl("http", "127.0.0.1", port) for port in self._ports]
        attaching = (self._attach(base, certain=False) for base in bases)
        tried = await asyncio.gather(*attaching, return_exceptions=True)
        failures: list[BaseException] = []
        for one in tried:
            if isinstance(one, AttachedServer):
                return one
            failures.append(one)
        # Prefer the error of a server that needs a key or loads its model.
        there = (error for error in failures if type(error) is not UnavailableError)
        taken = [
            base.port
            for base, error in zip(bases, failures, strict=True)
            if not _caused_by(error, ConnectionRefusedError)
        ]
        raise next(there, None) or self._none_found(taken)

    async def require_alive(self, attachment: AttachedServer) -> None:
        """Check that the server answers. Raises UnavailableError."""
        base = attachment.base
        try:
            status, body = await attachment.probe.get(f"{base.path}/models")
        except UnavailableError as error:
            raise attachment.unreachable(error) from error
        finally:
            attachment.probe.close()
        if status >= 500:
            raise _unavailable(base, status, body, attachment.server)

    async def _attach(self, base: BaseUrl, *, certain: bool, before: AttachedServer | None = None) -> AttachedServer:
        headers = key_headers(self._options, self._environ, base)
        if base.scheme == "https" and self._tls is None:
            self._tls = await in_thread(_tls_context, self._options.ca_file)
        probe = Probe(base, headers, self._tls, self._timeout)
        try:
            await self._list_models(probe, certain=certain, server=before.server if before else None)
            server, info = await self._identify(probe)
        finally:
            probe.close()
        retries, backoff = self._options.connect_retries, self._options.connect_backoff
        ahead = CONNECTIONS_AHEAD if server.holds_connections else 0
        http = probe.client(resend=False, ahead=ahead, connect_retries=retries, backoff=backoff)
        found = AttachedServer(probe, server, info, http)
        if before is not None:
            found.keep_learned(before)
        return found

    async def _list_models(self, probe: Probe, *, certain: bool, server: ServerAdapter | None) -> None:
        """Find the path of the API and its list of models. `certain`: accept a server that lists none."""
        base = probe.base
        for version in VERSIONS if base.version is None else (base.version,):
            here = base.at_version(version)
            try:
                status, body = await probe.get(f"{here.path}/models")
            except UnavailableError as error:
                raise _unreachable(base, error, server) from error
            if status in (401, 403):
                raise self.key_error(probe, Complaint.of_body(status, body).message)
            if status >= 500 or 300 <= status < 400:
                raise _unavailable(base, status, body, server)
            listing = await in_thread(_model_list, body) if status == 200 else None
            if listing is not None:
                probe.base, probe.models = here, listing
                return
        if not certain:
            raise UnavailableError(f"{base.url} is not an OpenAI-compatible server")
        probe.base = base.at_version(base.version or VERSIONS[0])

    def key_error(self, probe: Probe, reason: str) -> EnginePluginError:
        """The error for a rejected or missing key."""
        return key_error(self._options, self._environ, probe.base, reason, sent=bool(probe.headers))

    async def _identify(self, probe: Probe) -> tuple[ServerAdapter, ServerInfo]:
        chosen = self._options.server
        for server in ADAPTERS:
            if server.name == chosen or (chosen == "auto" and server.matches(probe)):
                info = await server.inspect(probe)
                if info is not None:
                    return server, info
        raise _unreachable(probe.base, UnavailableError(f"it is not {chosen}"))

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
    complaint = Complaint.of_body(status, body)
    if is_about_loading(complaint):
        return StillLoadingError.of(f"{'the server' if server is None else server.title} at {base.url}", complaint)
    redirects = "it answers with a redirection, which is not followed"
    reason = redirects if status < 400 else f"it answers {status}: {complaint.message}"
    return _unreachable(base, UnavailableError(reason), server)


def _model_list(body: bytes) -> list[Reported] | None:
    """The entries of a list of models; None if the body is not one."""
    try:
        shape = Reported.of(read_json(body, LARGEST_JSON))
    except JsonError:
        return None
    if not isinstance(shape.get("data"), list):
        return None
    found = {entry.text("id"): entry for entry in shape.objects_of("data")}
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
