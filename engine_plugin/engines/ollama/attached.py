"""The attached server: found when it is needed, never started or stopped."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.catalogue import on_this_system
from engine_plugin.download.partial import is_header_value
from engine_plugin.engines.ollama.address import DEFAULT_PORT
from engine_plugin.engines.ollama.client import OllamaClient
from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.redaction import entered
from engine_plugin.single_flight import SingleFlight
from engine_plugin.system.files import in_thread
from engine_plugin.transport.connections import CONNECTIONS_AHEAD
from engine_plugin.transport.http1 import BrokenOffError, Http1Client

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.engines.ollama.address import ServerAddress
    from engine_plugin.engines.ollama.options import OllamaOptions

__all__ = ["AttachedOllama", "is_older"]

log = logging.getLogger(__name__)

_KNOWN_FOR = 300.0
"""Seconds before a known server is probed again, unless a connection fails."""
_GREETING = b"Ollama is running"
_GREETING_LIMIT = 64 * 1024
_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,64}")
_DEVELOPMENT = "0.0.0"
"""The version that local builds of Ollama report."""


class AttachedOllama:
    """The server at `address`, if one answers there. Owned by the engine, used from one event loop."""

    def __init__(self, address: ServerAddress, options: OllamaOptions, environ: Mapping[str, str]) -> None:
        """No I/O."""
        self.address = address
        self.version = ""
        """The version that the server reported last; "" before the first probe that found one."""
        self._too_old = False
        self._reason = "not probed yet"
        """Why the last probe found no server."""
        self._options = options
        self._probe_timeout = _probe_timeout(options, environ)
        self.headers = _key_header(address, options, environ)
        self._http: Http1Client | None = None
        self._client: OllamaClient | None = None
        self._known_until = 0.0
        self._probing: SingleFlight[OllamaClient | None] = SingleFlight("looking for an Ollama server")

    @property
    def known(self) -> bool:
        """Whether the last probe, at most five minutes ago, found a server and no connection has failed since."""
        return self._client is not None and time.monotonic() < self._known_until

    async def find(self, *, refresh: bool = False) -> OllamaClient | None:
        """The client of the server; None if no server answers within `probe_timeout`, or with `server: manage`.

        Probes unless the server is `known`, or always with `refresh`. Raises PreconditionError for a server that is
        too old, AuthError for one that requires a key.
        """
        if self._options.server == "manage":
            return None
        client = self._client if self.known and not refresh else await self._probing.run(self._probe)
        if client is not None and self._too_old:
            raise catalogue.SOFTWARE_TOO_OLD.error(
                software=f"the Ollama at {self.address.url}",
                found=self.version,
                wanted=self._options.minimum_version,
                upgrade="Upgrade it: https://ollama.com/download, or set engine.server: manage in plugin.yaml "
                "for a managed server",
            )
        return client

    async def detach(self) -> None:
        """Abort the requests that run on the server and forget it; the server itself keeps running."""
        await self._probing.cancel()
        client, self._client, self._http = self._client, None, None
        self._known_until = 0.0
        if client is not None:
            client.close()

    @property
    def description(self) -> str:
        """The server in messages."""
        name = f"Ollama {self.version}".rstrip()
        return f"{name} at {self.address.url} is an attached server, which the plugin does not change"

    def unreachable(self) -> UnavailableError:
        """The error for a server that does not answer."""
        otherwise = "have the plugin run a managed server: call InstallEngine"
        if self._options.server == "attach":
            otherwise = f"correct the address ({self.address.source}): engine.address in plugin.yaml, or OLLAMA_HOST"
        return catalogue.SERVER_UNREACHABLE.error(
            server="Ollama server",
            address=self.address.url,
            reason="; ".join(filter(None, (self._reason, self.address.ignored))),
            start=_how_to_start(self.address),
            otherwise=otherwise,
        )

    async def _probe(self) -> OllamaClient | None:
        http = self._http or await self._connection()
        try:
            async with asyncio.timeout(self._probe_timeout):
                version = await _fetch_version(OllamaClient(http, self.address.url))
        except (EnginePluginError, TimeoutError) as error:
            late = f"no answer in {self._probe_timeout:g} s"
            self._reason = error.reason if isinstance(error, EnginePluginError) else late
            http.close()
            self._known_until = 0.0  # running requests continue: the server may only be slow to answer the probe
            if isinstance(error, AuthError):
                raise
            return None
        if self._client is None or version != self.version:
            log.info("found Ollama %s at %s (%s)", version, self.address.url, self.address.source)
        if self._client is None:
            self._http, self._client = http, OllamaClient(http, self.address.url, self._explain, self.headers)
        self.version, self._known_until = version, time.monotonic() + _KNOWN_FOR
        self._too_old = is_older(version, self._options.minimum_version)
        return self._client

    async def _explain(self, error: EnginePluginError) -> EnginePluginError:
        """The error to raise for a failed or broken connection, after which the next call probes the server."""
        self._known_until = 0.0
        if isinstance(error, BrokenOffError):
            return BadGatewayError(
                f"the Ollama at {self.address.url} {error.did}. See its log ({_log_of(self.address)}), and try again"
            )
        if not isinstance(error, UnavailableError):
            return error
        self._reason = error.reason
        return self.unreachable()

    async def _connection(self) -> Http1Client:
        tls = await in_thread(ssl.create_default_context) if self.address.scheme == "https" else None
        address = self.address.host, self.address.port
        return Http1Client(address, self.headers, tls=tls, resend=False, ahead=CONNECTIONS_AHEAD)


async def _fetch_version(client: OllamaClient) -> str:
    """The version of the server. Raises UnavailableError if the server is not Ollama."""
    greeting = b""
    with suppress(InvalidRequestError, UnsupportedError):  # a proxy may serve another page at the root
        async with client.request("GET", "/") as response:
            greeting = await response.read(_GREETING_LIMIT)
    version: object = None
    with suppress(InvalidRequestError, UnsupportedError, BadGatewayError):
        version = (await client.ask("GET", "/api/version")).get("version")
    if isinstance(version, str) or _GREETING in greeting:
        return version if isinstance(version, str) and _VERSION.fullmatch(version) else _DEVELOPMENT
    raise UnavailableError("the server there is not Ollama")


def is_older(found: str, wanted: str) -> bool:
    """Whether version `found` is below `wanted`, by their numbers. A local build (0.0.0) counts as new."""
    return not found.startswith(_DEVELOPMENT) and _numbers(found) < _numbers(wanted)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _probe_timeout(options: OllamaOptions, environ: Mapping[str, str]) -> float:
    """Seconds for a probe: ENGINE_PLUGIN_PROBE_TIMEOUT, else the option."""
    text = environ.get("ENGINE_PLUGIN_PROBE_TIMEOUT", "")
    try:
        seconds = float(text) if text else options.probe_timeout
    except ValueError:
        seconds = 0.0
    if 0 < seconds <= 60:
        return seconds
    log.warning(
        "ENGINE_PLUGIN_PROBE_TIMEOUT: %r is not a number of seconds above 0 and up to 60; using %g",
        text,
        options.probe_timeout,
    )
    return options.probe_timeout


def _key_header(address: ServerAddress, options: OllamaOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """The header with the key for a server on another machine: over https, or over http if plugin.yaml allows it."""
    key = entered(environ.get(options.key_variable, "")) if options.key_variable else ""
    if not key or address.is_loopback:
        return {}
    if not is_header_value(key):
        reason = "it has characters that a header must not have"
    elif address.scheme != "https" and not options.allow_plain_http:
        reason = "http is not encrypted. Use https, or set engine.allow_plain_http: true in plugin.yaml"
    else:
        return {"authorization": f"Bearer {key}"}
    log.warning("the key in %s is not sent to %s: %s", options.key_variable, address.url, reason)
    return {}


def _log_of(address: ServerAddress) -> str:
    if not address.is_loopback:
        return f"on {address.host}"
    return on_this_system(
        linux="`journalctl -u ollama`, or the terminal of `ollama serve`",
        macos="~/.ollama/logs/server.log",
        windows=r"%LOCALAPPDATA%\Ollama\server.log",
    )


def _how_to_start(address: ServerAddress) -> str:
    if not address.is_loopback:
        port = "" if address.port == DEFAULT_PORT else f":{address.port}"
        return f"`OLLAMA_HOST=0.0.0.0{port} ollama serve` on {address.host}"
    if address.port != DEFAULT_PORT:  # without OLLAMA_HOST it would listen on the default port
        here = f"`OLLAMA_HOST={address.authority} ollama serve`"
        windows = f"`$env:OLLAMA_HOST='{address.authority}'; ollama serve`"
        return on_this_system(linux=here, macos=here, windows=windows)
    return on_this_system(
        linux="`ollama serve`, or `systemctl start ollama`",
        macos="the Ollama app, or `ollama serve`",
        windows="Ollama from the Start menu, or `ollama serve`",
    )
