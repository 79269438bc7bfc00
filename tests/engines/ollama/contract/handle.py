"""Runs a contract server as a process of a test, and controls it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import IO, Any

from tests.patience import patience

__all__ = ["ContractClient", "ContractServer"]

_REPOSITORY = Path(__file__).resolve().parents[4]
_LISTENING = re.compile(rb"Listening on (\S+):(\d+) ")
_SLACK = patience(5.0)


class ContractClient:
    """Direct access of a test to a contract server, without the package under test."""

    def __init__(self, port: int) -> None:
        """A client of the server on this port of 127.0.0.1."""
        self.port = port

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The root of its URLs, without a trailing slash."""
        return f"http://{self.address}"

    def ask(self, method: str, path: str, body: Any = None, seconds: float = _SLACK) -> Any:
        """A JSON answer; None if it is empty. Raises for error statuses. Blocking."""
        data = None if body is None else json.dumps(body).encode()
        head = {"content-type": "application/json"}
        request = urllib.request.Request(self.url + path, data, head, method=method)  # noqa: S310  # our own URL
        with urllib.request.urlopen(request, timeout=seconds) as response:  # noqa: S310
            raw = response.read()
        return json.loads(raw) if raw else None

    def requests(self, path: str = "", **facts: str) -> list[dict[str, Any]]:
        """The requests so far: {method, path, headers, body, status, state}; state is open, done, left or broken.

        `path`, `method` and `state` filter. Blocking.
        """
        return self._entries(facts | ({"path": path} if path else {}))

    async def wait(self, path: str, *, count: int = 1, seconds: float = 10.0, **facts: str) -> dict[str, Any]:
        """Wait for `count` such requests and return the last. Raises TimeoutError."""
        query = facts | {"path": path, "count": str(count), "seconds": str(seconds)}
        found = await asyncio.to_thread(self._entries, query, seconds + _SLACK)
        if len(found) < count:
            raise TimeoutError(f"no {count} × {path} {facts}: {self.requests()}")
        return found[count - 1]

    def bodies(self, path: str) -> list[Any]:
        """The bodies of the requests to `path`. Blocking."""
        return [entry["body"] for entry in self.requests(path)]

    def forget(self) -> None:
        """Clear the journal. Blocking."""
        self.ask("DELETE", "/contract/requests")

    def add(self, name: str, **facts: Any) -> None:
        """Add a model; `facts` are fields of `library.Model`. Blocking."""
        self.ask("POST", "/contract/models", {"name": name} | facts)

    def fail(self, fault: str, *, path: str = "", model: str = "", times: int = 0) -> None:
        """Add a rule; see `faults`. Blocking."""
        self.ask("POST", "/contract/rules", {"fault": fault, "path": path, "model": model, "times": times})

    def mend(self) -> None:
        """Remove all rules. Blocking."""
        self.ask("DELETE", "/contract/rules")

    def be_version(self, version: str) -> None:
        """Report this version from now on. Blocking."""
        self.ask("POST", "/contract/version", {"version": version})

    def open_gate(self) -> None:
        """Release gated answers. Blocking."""
        self.ask("POST", "/contract/open")

    def names(self) -> list[str]:
        """The names of its models. Blocking."""
        return [model["name"] for model in self.ask("GET", "/api/tags")["models"]]

    def _entries(self, query: dict[str, str], seconds: float = _SLACK) -> list[dict[str, Any]]:
        text = "&".join(f"{key}={value}" for key, value in query.items())
        found: list[dict[str, Any]] = self.ask("GET", f"/contract/requests?{text}", seconds=seconds)
        return found


class ContractServer(ContractClient):
    """A server process. It ends with `close`, or with the process of the test."""

    def __init__(self, models: Path, *options: str, environ: dict[str, str] | None = None, port: int = 0) -> None:
        """Start it and wait until it listens. `models` is its OLLAMA_MODELS, `options` are its arguments."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith("OLLAMA_")}
        variables |= {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(models)} | (environ or {})
        argv = [sys.executable, "-m", "tests.engines.ollama.contract", "serve", "--until-stdin-ends", *options]
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE, cwd=_REPOSITORY, env=variables
        )
        said = b""
        for line in _of(self.process.stderr):
            said += line
            if found := _LISTENING.search(line):
                super().__init__(int(found[2]))
                # A full pipe would block the server.
                threading.Thread(target=_of(self.process.stderr).read, daemon=True).start()
                return
        self.close()
        raise RuntimeError(f"the contract server did not start: {said.decode()}")

    def close(self) -> None:
        """Stop the process and wait for its end. Blocking."""
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        try:
            self.process.wait(_SLACK)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stderr is not None:
            self.process.stderr.close()


def _of(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream
