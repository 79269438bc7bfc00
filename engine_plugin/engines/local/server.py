"""An engine process that is an HTTP server: its address, its key, its health and the reasons of its failures.

A driver adds what to run and what proves that the server can serve.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from engine_plugin import catalogue
from engine_plugin.errors import EnginePluginError, EngineStartError, UnavailableError
from engine_plugin.process import ports
from engine_plugin.process.engine_process import Command, EngineProcess, ProcessState
from engine_plugin.system.files import in_thread, private_folder
from engine_plugin.transport.answers import ERROR_LIMIT
from engine_plugin.transport.http1 import Http1Client

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from engine_plugin.engines.local.options import ServerOptions
    from engine_plugin.install.software import Backend
    from engine_plugin.process.records import ProcessRecords

__all__ = ["HEALTH_TIMEOUT", "Place", "ServerProcess", "socket_name"]

HEALTH_TIMEOUT = 2.0
"""Seconds that the answer to a health check may take. Tests set it."""

_PORT_ATTEMPTS = 3
_OTHER_PORT = "Start again, which takes another port, or end that process"
_ADDRESS = re.compile(r'"address": "http://127\.0\.0\.1:(\d+)')


def socket_name() -> str:
    """A name for a server's socket, always of the same length; servers of both kinds know a socket by its ending."""
    return f"{secrets.token_hex(4)}.sock"


class Place(NamedTuple):
    """Where a server runs: its records, the environment that it inherits, and `folder`, a private directory for its
    socket; None: it serves on a loopback port."""

    records: ProcessRecords
    environ: Mapping[str, str]
    folder: Path | None


class ServerProcess(EngineProcess):
    """One server. Owned by a driver, used from one event loop; closed once, then thrown away."""

    health_path: ClassVar[str]
    """The path of its health check."""

    error_marks: ClassVar[tuple[str, ...]]
    """Lines of its output with one of them explain a failure."""

    ports_needed: ClassVar[int] = 1
    """Ports that a server which is not ours needs; it gets requests on the first."""

    def __init__(
        self, name: str, backend: Backend, options: ServerOptions, place: Place, *, serves: str = "", needs: int = 0
    ) -> None:
        """`serves` replaces `name` in complaints about its health. `needs` are the bytes of its model's files.

        One that `is_ours` stops when its stdin ends, and chooses a port by itself: it writes a line
        `{"address": "http://127.0.0.1:PORT"}`.
        """
        self.backend = backend
        """The software that it runs."""
        self.is_ours = not backend.executable
        """Whether it is a program of this project, on Python packages."""
        self._options = options
        self._environ = place.environ
        super().__init__(
            name,
            place.records.ticket(),
            options,
            error_marks=self.error_marks,
            stop_by_stdin=self.is_ours,
            needs=needs,
        )
        self.socket = None if place.folder is None else place.folder / socket_name()
        """The socket that it serves on; None: it serves on a loopback port."""
        self.ports: tuple[int, ...] = ()
        """The loopback ports of this run; empty for one that has a socket, or chooses its port."""
        self.key = ""
        """The bearer token that each request of this run must have."""
        self._serves = serves or name
        self._key_folder = place.folder or place.records.folder
        self._key_file: Path | None = None
        self._own_port = 0
        """The port of this run, once the process was seen to listen there."""
        self._client: Http1Client | None = None

    # The steps that a driver adds

    @abstractmethod
    def launch(self) -> Command:
        """What to run, with the `key`, `socket` and `ports` of this run."""

    @abstractmethod
    async def prove(self) -> None:
        """Send a healthy server a real request, if need be. Raises EnginePluginError when it cannot serve."""

    # For the driver and the pool

    async def ensure_ready(self) -> None:
        """Start the server, sharing a start that is under way. Raises EngineStartError with the server's reason."""
        for attempt in range(_PORT_ATTEMPTS):
            try:
                await super().ensure_ready()
                return
            except EngineStartError as error:
                # Another process may take a port between the choice and the bind; the next run has other ports.
                port, rival = await self._rival()
                if not rival:
                    raise
                if attempt == _PORT_ATTEMPTS - 1:
                    taken = catalogue.PORT_TAKEN.error(port=port, holder=rival, fix=_OTHER_PORT)
                    raise EngineStartError.from_error(taken, f"{taken}. {error}") from error

    @property
    def dead(self) -> bool:
        """Whether there is no process, and none will be started without a call."""
        return self.ended.is_set()

    @property
    def failed(self) -> bool:
        """Whether it died too often, or could not be started, and is restarted only on request."""
        return self.state is ProcessState.FAILED

    @property
    def broken(self) -> bool:
        """Whether it failed and does not serve, though it may be restarting."""
        return not self.ready and (self.crashed or bool(self.latest_run and self.latest_run.failure))

    @property
    def crashed(self) -> bool:
        """Whether it served and died, and has not served for a stable time since."""
        return self.restarts > 0

    @property
    def ready(self) -> bool:
        """Whether it serves."""
        return self.state in (ProcessState.READY, ProcessState.DEGRADED)

    async def complaint(self) -> str:
        """Make a health check; what is wrong with it, "" when nothing is."""
        await self.check()
        match self.state:
            case ProcessState.DEGRADED:
                return f"{self._serves} does not answer: it is busy, or hangs"
            case ProcessState.STOPPING | ProcessState.RECOVERING if self.latest_run and self.latest_run.failure:
                return f"{self._serves} is being restarted: {self.latest_run.failure}"
            case ProcessState.FAILED:
                return self.failure
        return ""

    def clean_up(self) -> None:
        """Remove what a process that has ended leaves: idle connections to it, its socket and its key file."""
        client, self._client = self._client, None
        if client is not None:
            client.close()
        for path in filter(None, (self.socket, self._key_file)):
            path.unlink(missing_ok=True)

    # The steps of a run

    def command(self) -> Command:
        """What to run, with a new key and, where it needs some, new ports."""
        self.clean_up()
        self.key = secrets.token_urlsafe(24)
        self._own_port = 0
        if self.socket is not None:
            self._connect_to(str(self.socket))
        elif not self.is_ours:
            self.ports = ports.free_ports(self.ports_needed)
            self._connect_to(("127.0.0.1", self.ports[0]))
        return self.launch()

    async def can_serve(self) -> bool:
        """Whether it answers a health check and then a real request: some servers are healthy before they compute."""
        if self._client is None or (self.socket is not None and not self.socket.exists()):
            return False
        if self.ports and not await self._listens(self.ports[0]):
            return False
        if not await self.is_healthy():
            return False
        await self.prove()
        if self._key_file is not None:
            self._key_file.unlink(missing_ok=True)
        return True

    async def is_healthy(self) -> bool:
        """Whether the server answers its health path with 200 within HEALTH_TIMEOUT."""
        try:
            async with (
                asyncio.timeout(HEALTH_TIMEOUT),
                self.http().request("GET", self.health_path) as response,
            ):
                await response.read(ERROR_LIMIT)
                return response.status == 200
        except (EnginePluginError, TimeoutError):
            return False

    def has_answered(self) -> bool:
        client = self._client
        answered = client is not None and client.heard
        if client is not None:
            client.heard = False
        return answered

    def unusable(self) -> str:
        """The reason why its socket cannot be reached, "" when it can."""
        gone = self.socket is not None and not self.socket.exists()
        return f"its socket {self.socket} was removed; is there a cleaner of temporary files?" if gone else ""

    def on_output(self, line: str) -> None:
        """Connect to the port that a server with a port of its choice has written."""
        found = _ADDRESS.search(line)
        if found and self._client is None:
            self._connect_to(("127.0.0.1", int(found[1])))

    # Its address, its key and its connections

    def http(self) -> Http1Client:
        """The client of the latest run. Raises UnavailableError when it is not up."""
        if self._client is None:
            raise UnavailableError(f"{self.name} is not up yet")
        return self._client

    def _connect_to(self, address: str | tuple[str, int]) -> None:
        self._client = Http1Client(address, {"authorization": f"Bearer {self.key}"})

    def _write_key_file(self) -> Path:
        """A file with the key, for a server that reads it from one; removed when the server is ready."""
        if self._key_file is None:
            private_folder(self._key_folder)
            self._key_file = self._key_folder / f"{secrets.token_hex(4)}.key"
        self._key_file.touch(mode=0o600)
        self._key_file.write_text(self.key + "\n")
        return self._key_file

    async def _listens(self, port: int) -> bool:
        """Whether the process that was started holds its port. Checked before a request, and with it the key, goes
        there. Raises UnavailableError when another process holds it."""
        pid = self.pid
        if port == self._own_port or (pid is not None and await in_thread(ports.listens, pid, port)):
            self._own_port = port
            return True
        rival = await in_thread(ports.holder, port)
        if not rival or (pid is not None and await in_thread(ports.listens, pid, port)):
            return False  # no process, or the server itself, which bound the port between the two looks
        raise catalogue.PORT_TAKEN.error(port=port, holder=rival, fix=_OTHER_PORT)

    async def _rival(self) -> tuple[int, str]:
        """One of its ports that another process holds, and the holder; (0, "") when there is none."""
        for port in self.ports:
            if rival := await in_thread(ports.holder, port):
                return port, rival
        return 0, ""
