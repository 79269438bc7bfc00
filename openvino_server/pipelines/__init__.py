"""The pipelines of a worker, one module for each kind of model.

`load` creates a `Server` from a load frame's settings. A language model computes all of its calls together (`llm`);
the pipelines of the other kinds compute one call at a time, with a queue in front (`OneAtATime`).
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import traceback
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from engine_plugin.errors import InvalidRequestError
from engine_plugin.system.files import LARGEST_JSON, read_json
from openvino_server.errors import RequestError
from openvino_server.trimming import trim_openvino

if TYPE_CHECKING:
    from openvino_server.frames import Channel, Frame, Inbox

__all__ = [
    "CANCELLED",
    "Job",
    "OneAtATime",
    "PipelineSettings",
    "json_file",
    "load",
    "reason",
    "refusal",
    "text_file",
    "too_long",
]

_MODULES = {
    "chat": "llm",
    "embed": "embed",
    "rerank": "rerank",
    "text-to-image": "image",
    "speech-to-text": "speech_to_text",
    "text-to-speech": "text_to_speech",
}

CANCELLED: Frame = (499, "cancelled", "the call was cancelled")


class Cancelled(Exception):  # noqa: N818  # not an error
    """The running job was cancelled."""


@dataclass(frozen=True)
class PipelineSettings:
    """The settings in a load frame: the model's folder, device, options, threads and the cache's folder."""

    path: Path
    device: str
    options: dict[str, Any]
    threads: int
    cache_dir: str

    def properties(self) -> dict[str, Any]:
        """OpenVINO's properties: threads and cache, overridden by `plugin_config`. Raises RequestError."""
        found: dict[str, Any] = {}
        if self.threads:
            found["INFERENCE_NUM_THREADS"] = self.threads
        if self.cache_dir:
            found["CACHE_DIR"] = self.cache_dir
        given = self.options.get("plugin_config") or {}
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError as error:
                raise RequestError(f"plugin_config: not JSON: {error}") from error
        if not isinstance(given, dict):
            raise RequestError("plugin_config: must be a JSON object")
        return found | given


class Job:
    """One call on its way through `OneAtATime`."""

    def __init__(self, number: int, request: dict[str, Any], channel: Channel) -> None:
        self.number = number
        self.request = request
        self.queued: Future[None]
        self._channel = channel
        cancelled = threading.Event()
        self.cancel = cancelled.set
        """Request the end of a running job."""
        self.cancelled = cancelled.is_set
        """Whether the call was cancelled; for callbacks of pipelines."""

    def check(self) -> None:
        """Raise Cancelled if the call was cancelled. Called between two parts of the work."""
        if self.cancelled():
            raise Cancelled

    def progress(self, step: int, total: int) -> None:
        """Send the progress: `step` of `total` is done."""
        self._channel.send(("part", [(self.number, [(step, total)])]))


class Server(Protocol):
    """A loaded model."""

    facts: dict[str, Any]
    """Sent to the server process when the model is ready: `capabilities`, and possibly more."""

    def serve(self, inbox: Inbox, channel: Channel) -> None:
        """Answer requests until the frame `quit`."""


class OneAtATime(Server, ABC):
    """A server that runs its jobs one after the other; waiting and running ones can be cancelled."""

    @abstractmethod
    def run(self, job: Job) -> dict[str, Any]:
        """Compute the answer. Raises RequestError, or Cancelled when the job was cancelled."""

    def serve(self, inbox: Inbox, channel: Channel) -> None:
        """See `Server`. Jobs run on another thread; this one reads frames."""
        jobs: dict[int, Job] = {}

        def answer(job: Job) -> None:
            try:
                channel.send(self._answer(job))
            except Exception:  # noqa: BLE001  # nothing reads the executor's future: the call would never end
                traceback.print_exc()
                os._exit(1)
            del jobs[job.number]

        with ThreadPoolExecutor(1, "jobs") as thread:
            while (frame := inbox.get())[0] != "quit":
                verb, number, *rest = frame
                if verb == "do":
                    job = jobs[number] = Job(number, rest[0], channel)
                    job.queued = thread.submit(answer, job)
                elif (known := jobs.get(number)) is not None:
                    if known.queued.cancel():
                        del jobs[number]
                        known.request.clear()  # the executor keeps the job until its turn
                        channel.send(("error", number, *CANCELLED))
                    else:
                        known.cancel()

    def _answer(self, job: Job) -> Frame:
        try:
            return ("done", job.number, self.run(job))
        except Cancelled:
            return ("error", job.number, *CANCELLED)
        except Exception as error:  # noqa: BLE001  # one bad call must not end the others
            return refusal(job.number, error)


def load(settings: dict[str, Any]) -> Server:
    """Load the model of a load frame. Raises any exception of the pipeline; `reason` has its text."""
    kind = settings.pop("kind")
    if kind not in _MODULES:
        raise RequestError(f"kind: {kind!r} is not one of {', '.join(_MODULES)}")
    trim_openvino()
    module = importlib.import_module(f"{__name__}.{_MODULES[kind]}")
    server: Server = module.Served(PipelineSettings(Path(settings.pop("path")), **settings))
    return server


def reason(error: BaseException) -> str:
    """The text of an exception, without the paths of OpenVINO's build machine."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    checks = [
        line.partition("' failed at ")[0].removeprefix("Check '") for line in lines if line.startswith("Check '")
    ]
    text = " ".join(kept) or " ".join(checks) or str(error).strip()
    return f"{type(error).__name__}: {text}" if not isinstance(error, (RuntimeError, RequestError)) else text


def refusal(number: int, error: Exception) -> Frame:
    """The error frame of a call; an error that the request did not cause is also logged to stderr."""
    if isinstance(error, (RequestError, InvalidRequestError)):
        answer = RequestError.of(error)
        return ("error", number, answer.status, answer.kind, answer.message)
    traceback.print_exception(error)
    return ("error", number, 500, "server_error", reason(error))


def text_file(path: Path) -> str | None:
    """A text file of a model's folder; None when missing or not UTF-8. Raises RequestError when it is too large."""
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_JSON + 1)
        text = data.decode()
    except (OSError, ValueError):
        return None
    if len(data) > LARGEST_JSON:
        raise RequestError(
            f"{path.name}: is larger than {LARGEST_JSON >> 20} MiB, more than any model needs; pull the model again"
        )
    return text


def json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model's folder; empty when it is missing or not a JSON object."""
    return read_json(path) or {}


def too_long(what: str, tokens: int, limit: int, *, least: bool = False) -> RequestError:
    """The error for more tokens than the context holds; `least`: `tokens` is a lower bound."""
    return RequestError(
        f"{what}: {'at least ' if least else ''}{tokens} tokens, but the model's context holds {limit}; shorten it",
        kind="exceed_context_size_error",
    )
