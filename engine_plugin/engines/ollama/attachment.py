"""A server that somebody else runs: looked for when it is needed, never started, never stopped."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.catalogue import on_this_system
from engine_plugin.download.partial import is_header_value
from engine_plugin.engines.local.single_flight import SharedWork
from engine_plugin.engines.ollama.address import DEFAULT_PORT
from engine_plugin.engines.ollama.connection import OllamaClient
from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.redaction import entered
from engine_plugin.system.files import in_thread
from engine_plugin.transport.http1 import BrokenOffError, Http1Client

if TYPE_CHECKING:
    import ssl
    from collections.abc import Mapping

    from engine_plugin.engines.ollama.address import ServerAddress
    from engine_plugin.engines.ollama.options import OllamaOptions

__all__ = ["Attachment", "is_older"]

log = logging.getLogger(__name__)

_HOLDS = 300.0
"""Seconds for which a server that was seen is taken to be there, unless a connection fails."""
_GREETING = b"Ollama is running"
_GREETING_LIMIT = 64 * 1024
_VERSION = re.compile(r"[0-9A-Za-z.+_-]{1,64}")
_DEVELOPMENT = "0.0.0"
"""What an Ollama that somebody built himself says its version is."""


class Attachment:
    """The server at `address`, when there is one. Owned by the engine, used from one event loop."""

    def __init__(self, address: ServerAddress, options: OllamaOptions, environ: Mapping[str, str]) -> None:
        """No I/O."""
        self.address = address
        self.version = ""
        """The version of the server that was seen last."""
        self.absence = "nobody has looked yet"
        """Why none was found, in words."""
        self._options = options
        self._patience = _patience(options, environ)
        self.headers = _key(address, options, environ)
        self._http: Http1Client | None = None
        self._client: OllamaClient | None = None
        self._good_until = 0.0
        self._looking: SharedWork[OllamaClient | None] = SharedWork("looking for an Ollama server")

    @property
    def seen(self) -> bool:
        """Whether the last look found a server, and nothing has failed since. Asks nobody."""
        return self._client is not None and time.monotonic() < self._good_until

    async def find(self, *, anew: bool = False) -> OllamaClient | None:
        """The client of the server; None when there is none. Waits no longer than `probe_timeout`.

        It is looked for `anew`, or when nothing was heard of it for five minutes, or a connection has failed.
        Raises PreconditionError for a server that is too old, AuthError for one that wants a key.
        """
        client = self._client if self.seen and not anew else await self._looking.run(self._look)
        if client is not None and is_older(self.version, self._options.minimum_version):
            raise catalogue.SOFTWARE_TOO_OLD.error(
                software=f"the Ollama at {self.address.url}",
                found=self.version,
                wanted=self._options.minimum_version,
                upgrade="Upgrade it: https://ollama.com/download, or set engine.server: manage in plugin.yaml "
                "to have one of our own",
            )
        return client

    async def detach(self) -> None:
        """Let the server go: what is under way there breaks off, and the server itself goes on."""
        await self._looking.cancel()
        self._close()

    def _close(self) -> None:
        client, self._client, self._http = self._client, None, None
        self._good_until = 0.0
        if client is not None:
            client.close()

    def down(self, otherwise: str = "") -> UnavailableError:
        """The error for who needs a server and finds none. `otherwise` is what else would help."""
        return catalogue.SERVER_UNREACHABLE.error(
            server="Ollama server",
            address=self.address.url,
            reason="; ".join(filter(None, (self.absence, self.address.passed_over))),
            start=_how_to_start(self.address),
            otherwise=otherwise
            or f"correct its address ({self.address.source}): engine.address in plugin.yaml, or OLLAMA_HOST",
        )

    async def _look(self) -> OllamaClient | None:
        http = self._http or await self._connection()
        try:
            async with asyncio.timeout(self._patience):
                version = await _hello(OllamaClient(http, self.address.url))
        except (EnginePluginError, TimeoutError) as error:
            late = f"no answer in {self._patience:g} s"
            self.absence = error.reason if isinstance(error, EnginePluginError) else late
            http.close()
            self._good_until = 0.0  # what is under way there goes on: the server may only be slow to say hello
            if isinstance(error, AuthError):
                raise
            return None
        if self._client is None or version != self.version:
            log.info("found Ollama %s at %s (%s)", version, self.address.url, self.address.source)
        if self._client is None:
            self._http, self._client = http, OllamaClient(http, self.address.url, self._lost, self.headers)
        self.version, self._good_until = version, time.monotonic() + _HOLDS
        return self._client

    async def _lost(self, error: EnginePluginError) -> EnginePluginError:
        """A connection failed or broke: the next one who needs the server looks for it."""
        self._good_until = 0.0
        if isinstance(error, BrokenOffError):
            its_log = _where_its_log_is(self.address)
            return BadGatewayError(
                f"the Ollama at {self.address.url} {error.did}. Its log says why ({its_log}); try again"
            )
        if not isinstance(error, UnavailableError):
            return error
        self.absence = error.reason
        return self.down()

    async def _connection(self) -> Http1Client:
        tls = await in_thread(_tls) if self.address.scheme == "https" else None
        return Http1Client((self.address.host, self.address.port), self.headers, tls=tls, resend=False)


def _tls() -> ssl.SSLContext:
    import ssl

    return ssl.create_default_context()


async def _hello(client: OllamaClient) -> str:
    """The version of the server. Raises UnavailableError when what answers is no Ollama."""
    greeting = b""
    with suppress(InvalidRequestError, UnsupportedError):  # behind a proxy of its own the root may be something else
        async with client.request("GET", "/") as response:
            greeting = await response.read(_GREETING_LIMIT)
    version: object = None
    with suppress(InvalidRequestError, UnsupportedError, BadGatewayError):
        version = (await client.ask("GET", "/api/version")).get("version")
    if isinstance(version, str) or _GREETING in greeting:
        return version if isinstance(version, str) and _VERSION.fullmatch(version) else _DEVELOPMENT
    raise UnavailableError("what answers there is not Ollama")


def is_older(found: str, wanted: str) -> bool:
    """Whether a version is below another one, by its numbers; a build of somebody's own is not."""
    return not found.startswith(_DEVELOPMENT) and _numbers(found) < _numbers(wanted)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"v?(\d+(?:\.\d+)*)", version)
    numbers = [int(part) for part in found[1].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _patience(options: OllamaOptions, environ: Mapping[str, str]) -> float:
    text = environ.get("ENGINE_PLUGIN_PROBE_TIMEOUT", "")
    try:
        patience = float(text) if text else options.probe_timeout
    except ValueError:
        patience = 0.0
    if 0 < patience <= 60:
        return patience
    log.warning("ENGINE_PLUGIN_PROBE_TIMEOUT is %r, not seconds from 0 to 60: using %g", text, options.probe_timeout)
    return options.probe_timeout


def _key(address: ServerAddress, options: OllamaOptions, environ: Mapping[str, str]) -> dict[str, str]:
    """The header with the key, for a server on another machine, and where nobody on the way can read it."""
    key = entered(environ.get(options.key_variable, "")) if options.key_variable else ""
    if not key or address.is_loopback:
        return {}
    if not is_header_value(key):
        log.warning("the key in %s is not sent: it holds characters that no header may have", options.key_variable)
        return {}
    if address.scheme != "https" and not options.allow_plain_http:
        log.warning(
            "the key in %s is not sent to %s: anybody on the way could read it. Use https, or set "
            "engine.allow_plain_http: true in plugin.yaml",
            options.key_variable,
            address.url,
        )
        return {}
    return {"authorization": f"Bearer {key}"}


def _where_its_log_is(address: ServerAddress) -> str:
    if not address.is_loopback:
        return f"on {address.host}"
    return on_this_system(
        linux="`journalctl -u ollama`, or where `ollama serve` runs",
        macos="~/.ollama/logs/server.log",
        windows=r"%LOCALAPPDATA%\Ollama\server.log",
    )


def _how_to_start(address: ServerAddress) -> str:
    if not address.is_loopback:
        port = "" if address.port == DEFAULT_PORT else f":{address.port}"
        return f"`OLLAMA_HOST=0.0.0.0{port} ollama serve` on {address.host}"
    if address.port != DEFAULT_PORT:  # it would not listen there without being told
        place = f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"
        here = f"`OLLAMA_HOST={place} ollama serve`"
        return on_this_system(linux=here, macos=here, windows=f"`$env:OLLAMA_HOST='{place}'; ollama serve`")
    return on_this_system(
        linux="`ollama serve`, or `systemctl start ollama`",
        macos="the Ollama app, or `ollama serve`",
        windows="Ollama from the Start menu, or `ollama serve`",
    )
