"""The state of a running contract server: journal, rules, loaded models."""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from .faults import Rules

if TYPE_CHECKING:
    import os

    from aiohttp import web

    from .library import Library, Model

__all__ = ["FOR_EVER", "Journal", "Loaded", "Memory", "Refusal", "State", "duration", "moment", "now", "queue_limit"]

FOR_EVER = float(100 * 365 * 86_400)
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_RUNNER = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); signal.sigwait([signal.SIGTERM])"


class Refusal(Exception):  # noqa: N818  # not an error of ours
    """An error answer."""

    def __init__(self, status: int, error: str | dict[str, Any]) -> None:
        super().__init__(status, error)
        self.status = status
        self.shape = error if isinstance(error, dict) else {"error": error}


class Journal:
    """All requests except those of the tests themselves, oldest first."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self._changed = asyncio.Condition()

    def begin(self, request: web.Request) -> dict[str, Any]:
        """Add an entry with the state open; it becomes done, or left if the client leaves early."""
        entry = {
            "method": request.method,
            "path": request.path,
            "headers": {key.lower(): value for key, value in request.headers.items()},
            "body": None,
            "status": 0,
            "state": "open",
        }
        self.entries.append(entry)
        return entry

    async def note(self, entry: dict[str, Any], **facts: Any) -> None:
        """Update an entry."""
        entry.update(facts)
        async with self._changed:
            self._changed.notify_all()

    def find(self, **facts: str) -> list[dict[str, Any]]:
        """The entries with these values."""
        return [entry for entry in self.entries if all(entry[key] == value for key, value in facts.items())]

    async def wait(self, count: int, seconds: float, **facts: str) -> list[dict[str, Any]]:
        """Wait for so many entries, up to a time limit, and return them."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(lambda: len(self.find(**facts)) >= count)
        return self.find(**facts)


@dataclass
class Loaded:
    """A loaded model."""

    model: Model
    context: int
    expires: float
    """A time of time.time()."""
    runner: subprocess.Popen[bytes] | None = None
    timer: asyncio.TimerHandle | None = None


class Memory:
    """The loaded models; with `runners` each has a process, which survives a killed server."""

    def __init__(self, *, runners: bool, keep_alive: str, context: int) -> None:
        self._runners = runners
        self._keep = duration(keep_alive) if keep_alive else 300.0
        self._context = context
        self._loaded: dict[str, Loaded] = {}

    def all(self) -> list[Loaded]:
        """The loaded models, latest expiry first."""
        return sorted(self._loaded.values(), key=lambda each: each.expires, reverse=True)

    def load(self, model: Model, keep_alive: Any, num_ctx: int | None) -> bool:
        """Load a model for a time; returns whether it was not loaded."""
        context = min(num_ctx or self._context, model.context)
        if self.crashed(model.name):
            self.unload(model.name)
        loaded = self._loaded.get(model.name)
        if loaded is not None and num_ctx and loaded.context != context:
            self.unload(model.name)
            loaded = None
        new = loaded is None
        if loaded is None:
            argv = [sys.executable, "-IS", "-c", _RUNNER]
            runner = subprocess.Popen(argv, stdin=subprocess.DEVNULL) if self._runners else None
            loaded = self._loaded[model.name] = Loaded(model, context, 0.0, runner)
        seconds = self._keep if keep_alive is None else duration(keep_alive)
        loaded.expires = time.time() + seconds
        if loaded.timer is not None:
            loaded.timer.cancel()
        if seconds < 86_400:
            loaded.timer = asyncio.get_running_loop().call_later(seconds, self.unload, model.name)
        return new

    def crashed(self, name: str) -> bool:
        """Whether the process of a model has died."""
        loaded = self._loaded.get(name)
        return loaded is not None and loaded.runner is not None and loaded.runner.poll() is not None

    def unload(self, name: str) -> None:
        """Unload a model."""
        loaded = self._loaded.pop(name, None)
        if loaded is None:
            return
        if loaded.timer is not None:
            loaded.timer.cancel()
        if loaded.runner is not None:
            loaded.runner.kill()
            loaded.runner.wait()

    def clear(self) -> None:
        """Unload all models."""
        for name in list(self._loaded):
            self.unload(name)


@dataclass
class State:
    """The state of one server."""

    library: Library
    memory: Memory
    version: str
    queue_limit: int
    """The limit of concurrent requests; more are refused."""
    cloud: bool
    journal: Journal = field(default_factory=Journal)
    rules: Rules = field(default_factory=Rules)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0


def duration(value: Any) -> float:
    """Seconds of a keep_alive: a number, or a Go duration; a negative one never expires. Raises Refusal."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        kind = "bool" if isinstance(value, bool) else "map[string]interface {}"
        raise Refusal(400, f"Unsupported type: '{kind}'")
    if isinstance(value, str) and not re.fullmatch(r"-?\d+", value):
        parts = re.findall(r"([0-9.]+)(ns|us|ms|s|m|h)", value)
        if not parts or "".join(number + unit for number, unit in parts) != value.lstrip("-+"):
            raise Refusal(400, f'time: invalid duration "{value}"')
        seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
        return FOR_EVER if value.startswith("-") else seconds
    return FOR_EVER if float(value) < 0 else float(value)


def moment(stamp: float) -> str:
    """A time in Go's format, in nanoseconds."""
    when = datetime.fromtimestamp(0, UTC) + timedelta(seconds=stamp)
    return when.strftime("%Y-%m-%dT%H:%M:%S.%f") + "467Z"


def now() -> str:
    """The current time in Go's format."""
    return moment(time.time())


def queue_limit(environ: dict[str, str] | os._Environ[str]) -> int:
    """The limit from OLLAMA_NUM_PARALLEL and OLLAMA_MAX_QUEUE."""
    return int(environ.get("OLLAMA_MAX_QUEUE") or 512) + int(environ.get("OLLAMA_NUM_PARALLEL") or 4)
