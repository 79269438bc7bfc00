"""OVO, an engine on Apple's MLX with a partial OpenAI API, which can pull models."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from urllib.parse import quote

from engine_plugin.download.events import ChunkProgress, Status, Success
from engine_plugin.engines.openai.adapters.base import (
    Probe,
    ServerAdapter,
    ServerInfo,
    ServerModel,
    number_of,
    text_of,
)
from engine_plugin.errors import PullError, UnsupportedError
from engine_plugin.transport.answers import one_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from engine_plugin.download.events import PullEvent

__all__ = ["NativeApi", "OvoAdapter", "pull_events"]

log = logging.getLogger(__name__)

_PORT = 11436
_IGNORED = ("tool_choice", "stop", "seed")
_SERVICES = frozenset({"chat", "generate", "embed"})
_GOOD = ("completed", "complete", "success", "succeeded", "done", "finished", "ready")
_BAD = ("failed", "failure", "error", "cancelled", "canceled")
_POLL = 0.5
_STALL = 900.0
_MISSES = 5
_SHOWN = 300


class OvoAdapter(ServerAdapter):
    """Tools work only without a stream; such answers are converted to streams."""

    name: ClassVar[str] = "ovo"
    title: ClassVar[str] = "OVO"
    start: ClassVar[str] = "open the OVO app and switch its server on"
    pulls: ClassVar[bool] = True

    def matches(self, probe: Probe) -> bool:
        return probe.base.port == _PORT

    async def inspect(self, probe: Probe) -> ServerInfo | None:
        reported = await probe.fetch_json("/ovo/models", port=probe.base.port + 1)
        if reported is None and await probe.fetch_json("/healthz") is None:
            return None
        known = _models(reported)
        return ServerInfo(
            tuple(_found(entry, known.get(text_of(entry, "id"), {})) for entry in probe.models), services=_SERVICES
        )

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:
        if service not in ("chat", "generate"):
            return stream
        form = body.get("response_format")
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            raise UnsupportedError(
                "response_format: OVO does not support it. Ask for JSON in the messages, or use another engine"
            )
        for name in _IGNORED:
            if body.get(name) not in (None, "auto"):
                log.warning("%s: OVO ignores this field", name)
                body.pop(name)
        return stream and not body.get("tools")


def _models(reported: Any) -> dict[str, Mapping[str, Any]]:
    entries = reported.get("models", reported.get("data")) if isinstance(reported, dict) else reported
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {text_of(entry, "repo_id") or text_of(entry, "id") or text_of(entry, "name"): entry for entry in found}


def _found(entry: Mapping[str, Any], reported: Mapping[str, Any]) -> ServerModel:
    size = number_of(reported, "size_bytes") or number_of(reported, "size")
    return ServerModel.of(entry, size=size, format="mlx", quantization=text_of(reported, "quantization"))


class NativeApi(Protocol):
    """Calls OVO's own API."""

    async def __call__(self, method: str, path: str, body: bytes | None = None) -> Any:
        """Send a request; return the JSON of the answer. Raises EnginePluginError."""


async def pull_events(native: NativeApi, name: str, body: bytes) -> AsyncGenerator[PullEvent, None]:
    """Have OVO pull a repository and yield its progress, then Success. Raises PullError.

    OVO cannot cancel a download: it continues after the generator is closed.
    """
    yield Status(f"pulling {name}")
    begun = await native("POST", "/ovo/models/download", body)
    ticket = next((begun[key] for key in ("id", "download_id", "task_id") if begun.get(key)), None)
    if ticket is None:
        raise PullError(f"model: OVO returned no download id: {str(begun)[:200]}")
    info, since, misses = None, time.monotonic(), 0
    while True:
        reported = await native("GET", f"/ovo/download/{quote(str(ticket), safe='')}")
        state = (text_of(reported, "status") or text_of(reported, "state")).lower()
        if state in _BAD:
            why = reported.get("error") or reported.get("message") or state
            why = one_line(str(why)[:_SHOWN])
            raise PullError(f"model: OVO cannot pull {name}: {why}. Check that Hugging Face has it")
        progress = _progress(name, reported)
        if state in _GOOD:
            yield Success(name, progress.total, "")
            return
        misses = 0 if state else misses + 1
        if progress != info:
            info, since = progress, time.monotonic()
            yield progress
        elif misses >= _MISSES or time.monotonic() - since > _STALL:
            raise PullError(f"model: OVO reports no progress with {name} ({str(reported)[:200]})")
        await asyncio.sleep(_POLL)


def _progress(name: str, reported: Mapping[str, Any]) -> ChunkProgress:
    """The progress in bytes if OVO reports them, else in thousandths."""
    done = number_of(reported, "downloaded_bytes") or number_of(reported, "completed")
    total = number_of(reported, "total_bytes") or number_of(reported, "total")
    share = reported.get("progress")
    if not total and isinstance(share, int | float) and 0 <= share <= 100:
        return ChunkProgress(name, round(share * (1000 if share <= 1 else 10)), 1000)
    return ChunkProgress(name, done, total)
