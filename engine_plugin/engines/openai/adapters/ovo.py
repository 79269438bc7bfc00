"""OVO, an engine on Apple's MLX with a partial OpenAI API, which can pull models."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.engines.openai.adapters.base import Probe, Reported, ServerAdapter, ServerInfo
from engine_plugin.errors import PullError, UnsupportedError
from engine_plugin.models.info import ModelDescription, ModelInfo
from engine_plugin.transport.answers import one_line

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from engine_plugin.download.events import PullEvent

__all__ = ["OvoAdapter", "pull_events"]

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
        reported = await probe.fetch("/ovo/models", port=probe.base.port + 1)
        if not reported and not await probe.fetch("/healthz"):
            return None
        listed = reported.objects_of("models" if "models" in reported else "data")
        known = {entry.text("repo_id") or entry.text("id") or entry.text("name"): entry for entry in listed}
        models = [_found(entry, known.get(entry.text("id"), Reported())) for entry in probe.models]
        return ServerInfo(models, services=_SERVICES)

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


def _found(entry: Reported, reported: Reported) -> ModelInfo:
    size = reported.number("size_bytes") or reported.number("size")
    return entry.model(size=size, details=ModelDescription("mlx", quantization_level=reported.text("quantization")))


async def pull_events(
    ask: Callable[[str, bytes | None], Awaitable[Reported]], name: str, repository: str
) -> AsyncGenerator[PullEvent, None]:
    """Have OVO pull a repository and yield its progress, then Success. Raises PullError, and the errors of `ask`.

    `ask(path, body)` sends a POST, or without a body a GET, to OVO's own API. OVO cannot cancel a download: it
    continues after the generator is closed.
    """
    yield StepStarted(f"pulling {name}")
    begun = await ask("/ovo/models/download", json.dumps({"repo_id": repository}).encode())
    ticket = next((begun[key] for key in ("id", "download_id", "task_id") if begun.get(key)), None)
    if ticket is None:
        raise PullError(f"model: OVO returned no download id: {str(begun)[:200]}")
    info, since, misses = None, time.monotonic(), 0
    while True:
        reported = await ask(f"/ovo/download/{quote(str(ticket), safe='')}", None)
        state = (reported.text("status") or reported.text("state")).lower()
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


def _progress(name: str, reported: Reported) -> ChunkProgress:
    """The progress in bytes if OVO reports them, else in thousandths."""
    done = reported.number("downloaded_bytes") or reported.number("completed")
    total = reported.number("total_bytes") or reported.number("total")
    share = reported.get("progress")
    if not total and isinstance(share, int | float) and 0 <= share <= 100:
        return ChunkProgress(name, round(share * (1000 if share <= 1 else 10)), 1000)
    return ChunkProgress(name, done, total)
