"""OVO: an engine on Apple's MLX, whose OpenAI face leaves out a few things, and which can fetch models."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from urllib.parse import quote

from engine_plugin.download.events import ChunkProgress, Status, Success
from engine_plugin.engines.openai.servers.base import Found, Glance, Seen, Server, number_of, text_of
from engine_plugin.errors import PullError, UnsupportedError
from engine_plugin.transport.answers import one_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from engine_plugin.download.events import PullEvent

__all__ = ["NativeApi", "Ovo", "pulled"]

log = logging.getLogger(__name__)

_PORT = 11436
_IGNORED = ("tool_choice", "stop", "seed")
_ABLE = frozenset({"chat", "generate", "embed"})
_GOOD = ("completed", "complete", "success", "succeeded", "done", "finished", "ready")
_BAD = ("failed", "failure", "error", "cancelled", "canceled")
_POLL = 0.5
_STALL = 900.0
_MISSES = 5
_SHOWN = 300


class Ovo(Server):
    """Tools work only without a stream, so it is asked without one and what it says is told as one."""

    name: ClassVar[str] = "ovo"
    title: ClassVar[str] = "OVO"
    start: ClassVar[str] = "open the OVO app and switch its server on"
    pulls: ClassVar[bool] = True

    def may_be(self, glance: Glance) -> bool:
        return glance.base.port == _PORT

    async def look(self, glance: Glance) -> Seen | None:
        told = await glance.ask("/ovo/models", port=glance.base.port + 1)
        if told is None and await glance.ask("/healthz") is None:
            return None
        known = _models(told)
        return Seen(tuple(_found(entry, known.get(text_of(entry, "id"), {})) for entry in glance.models), able=_ABLE)

    def adapt(self, service: str, body: dict[str, Any], *, stream: bool) -> bool:
        if service not in ("chat", "generate"):
            return stream
        form = body.get("response_format")
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            raise UnsupportedError(
                "response_format: OVO does not keep to one, so that its answer may be anything. Ask for JSON in the "
                "messages, or take another engine"
            )
        for name in _IGNORED:
            if body.get(name) not in (None, "auto"):
                log.warning("%s: OVO ignores this field", name)
                body.pop(name)
        return stream and not body.get("tools")


def _models(told: Any) -> dict[str, Mapping[str, Any]]:
    entries = told.get("models", told.get("data")) if isinstance(told, dict) else told
    found = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {text_of(entry, "repo_id") or text_of(entry, "id") or text_of(entry, "name"): entry for entry in found}


def _found(entry: Mapping[str, Any], told: Mapping[str, Any]) -> Found:
    size = number_of(told, "size_bytes") or number_of(told, "size")
    return Found.of(entry, size=size, format="mlx", quantization=text_of(told, "quantization"))


class NativeApi(Protocol):
    """OVO's own interface."""

    async def __call__(self, method: str, path: str, body: bytes | None = None) -> Any:
        """The JSON of an answer. Raises EnginePluginError."""


async def pulled(native: NativeApi, name: str, body: bytes) -> AsyncGenerator[PullEvent, None]:
    """Have OVO fetch a repository, and tell how far it is; ends after Success, raises PullError.

    Closing it leaves the download to OVO, which has no way to end one.
    """
    yield Status(f"pulling {name}")
    begun = await native("POST", "/ovo/models/download", body)
    ticket = next((begun[key] for key in ("id", "download_id", "task_id") if begun.get(key)), None)
    if ticket is None:
        raise PullError(f"model: OVO says {str(begun)[:200]} in the place of a download's id")
    seen, since, misses = None, time.monotonic(), 0
    while True:
        told = await native("GET", f"/ovo/download/{quote(str(ticket), safe='')}")
        state = (text_of(told, "status") or text_of(told, "state")).lower()
        if state in _BAD:
            why = told.get("error") or told.get("message") or state
            why = one_line(str(why)[:_SHOWN])
            raise PullError(f"model: OVO could not fetch {name}: {why}. Look whether Hugging Face has it")
        progress = _progress(name, told)
        if state in _GOOD:
            yield Success(name, progress.total, "")
            return
        misses = 0 if state else misses + 1
        if progress != seen:
            seen, since = progress, time.monotonic()
            yield progress
        elif misses >= _MISSES or time.monotonic() - since > _STALL:
            raise PullError(f"model: OVO tells of no progress with {name} ({str(told)[:200]})")
        await asyncio.sleep(_POLL)


def _progress(name: str, told: Mapping[str, Any]) -> ChunkProgress:
    """Bytes where OVO tells them, else thousandths."""
    done = number_of(told, "downloaded_bytes") or number_of(told, "completed")
    total = number_of(told, "total_bytes") or number_of(told, "total")
    share = told.get("progress")
    if not total and isinstance(share, int | float) and 0 <= share <= 100:
        return ChunkProgress(name, round(share * (1000 if share <= 1 else 10)), 1000)
    return ChunkProgress(name, done, total)
