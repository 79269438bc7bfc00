"""What particular hosts need beyond the contract of docs/protocol.md. No other module knows a host's habits.

`host_of` chooses once, when the plugin is built; `server.servicer` asks the result.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from engine_plugin.errors import (
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelUnusableError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.services import CONVERSATION_VALIDATORS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from engine_plugin.models.info import ModelInfo

__all__ = ["AogHost", "Host", "host_of"]


class Host:
    """A host that needs nothing beyond the contract. Used by every call, from one event loop."""

    name: ClassVar[str] = "the host"
    tolerated: ClassVar[Mapping[str, tuple[type[BaseException], ...]]] = {}
    """By rpc: the errors that get code 0 and a log line, because the host cannot handle a failure there."""
    last_pause: ClassVar[float] = 0.0
    """Seconds between the last data of a pull and the end of its stream."""
    silence: ClassVar[float | None] = None
    """Seconds without a message after which a conversation ends; None: only the host ends it."""

    def tolerates(self, rpc: str, error: BaseException) -> bool:
        """Whether the host must get this failure of an rpc as a success."""
        return isinstance(error, self.tolerated.get(rpc, ()))

    def answer(self, service: str, data: bytes) -> bytes:  # noqa: ARG002  # for hosts that convert answers
        """The JSON of a unary answer in the form that this host accepts."""
        return data

    def events(self, service: str, block: bytes) -> bytes:  # noqa: ARG002  # for hosts that convert events
        """A block of whole events in the form that this host accepts; b"" when it accepts none of them."""
        return block

    def takes(self, service: str, event: bytes) -> bool:  # noqa: ARG002  # for hosts that send events of their own
        """Whether this host passes this event of a conversation on to its clients correctly."""
        return True

    def listed(self, models: Sequence[ModelInfo]) -> Sequence[ModelInfo]:
        """The entries of ListModels."""
        return models


class AogHost(Host):
    """AOG (AIPC Open Gateway) 0.7, which sets AOG_VERSION for its plugins. docs/protocol.md has the facts."""

    name: ClassVar[str] = "AOG"
    tolerated: ClassVar[Mapping[str, tuple[type[BaseException], ...]]] = {
        # Its queue stops for ever after a failed load; the call that needs the model reports the error instead.
        "LoadModel": (Exception, asyncio.CancelledError),
        # Its cleaner repeats the call every minute until it succeeds, also for a model that is not in memory.
        "UnloadModel": (
            ModelNotLoadedError,
            ModelNotFoundError,
            ModelUnusableError,
            UnavailableError,
            UnsupportedError,
        ),
    }
    # It reads data and the stream's end from two channels: only a pause keeps them in order.
    last_pause: ClassVar[float] = 0.25
    # It keeps a conversation open after its client has left, so its model could never be deleted.
    silence: ClassVar[float | None] = 600.0

    def __init__(self) -> None:
        self._number, self._text = b'"created":0,', b'"created":"1970-01-01T00:00:00Z",'
        """The latest `created` value: before and after the conversion."""

    def answer(self, service: str, data: bytes) -> bytes:
        """Convert `created` to ISO 8601 text: AOG's OpenAI routes reject a number."""
        return _CREATED.sub(_as_text, data) if service in _CONVERTED else data

    def events(self, service: str, block: bytes) -> bytes:
        """The same for events, reduced to `data: ` lines that end in LF: AOG parses everything else as JSON."""
        if service not in _CONVERTED:
            return block
        if b"\r" in block:  # inside JSON it is escaped
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not _is_data_alone(block):
            block = _only_data(block)
        return self._dated(block)

    def _dated(self, block: bytes) -> bytes:
        """Convert the times of a block. Nearly all events have the same second as the event before."""
        times = block.count(b'"created"')
        if times == block.count(self._number):
            return block.replace(self._number, self._text) if times else block
        if found := _CREATED.search(block):
            self._number, self._text = found[0] + b",", _as_text(found) + b","
        return _CREATED.sub(_as_text, block)

    def takes(self, service: str, event: bytes) -> bool:
        """AOG sends its own task-started event; a second one breaks its client."""
        conversation = CONVERSATION_VALIDATORS.get(service)
        return conversation is None or not conversation.tells_start(event)

    def listed(self, models: Sequence[ModelInfo]) -> Sequence[ModelInfo]:
        """AOG looks up a model by the reference that it pulled, so each reference gets its own entry."""
        pulled = [(model, () if model.bundled else model.references) for model in models]
        return [
            entry
            for model, references in pulled
            for entry in (model, *(replace(model, name=name, references=()) for name in references))
        ]


def host_of(environ: Mapping[str, str]) -> Host:
    """The host that started this process, from its environment."""
    return AogHost() if environ.get("AOG_VERSION") else Host()


_CONVERTED = ("chat", "generate")
"""The services whose `created` AOG converts."""

# Quotes inside JSON strings are escaped, so only a key can match.
_CREATED = re.compile(rb'("created"\s*:\s*)(null|-?\d[\d.eE+-]*)')
_LATEST = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


def _as_text(found: re.Match[bytes]) -> bytes:
    return found[1] + _iso(found[2])


@lru_cache(maxsize=256)
def _iso(number: bytes) -> bytes:
    """Seconds since the epoch as a JSON string; an invalid time becomes the epoch."""
    try:
        seconds = min(max(0.0, float(number)), _LATEST)
    except ValueError:
        seconds = 0.0
    return datetime.fromtimestamp(seconds, UTC).strftime('"%Y-%m-%dT%H:%M:%SZ"').encode()


def _is_data_alone(block: bytes) -> bool:
    """Whether every event is a single line that begins with `data: `."""
    return (
        block.startswith(b"data: ")
        and block.endswith(b"\n\n")
        and block.count(b"\n") == 2 * block.count(b"\n\ndata: ") + 2
    )


def _only_data(block: bytes) -> bytes:
    """The events' data lines, without comments, names and ids."""
    lines = (line.removeprefix(b"data:").lstrip(b" ") for line in block.split(b"\n") if line.startswith(b"data:"))
    return b"".join(b"data: " + line + b"\n\n" for line in lines)
