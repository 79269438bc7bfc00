"""Adds models to an Ollama server: the server pulls or copies them, or receives a GGUF file of this machine."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.download.events import ChunkProgress, StepStarted, Success
from engine_plugin.engines.ollama.entries import positive_int
from engine_plugin.engines.ollama.errors import body_complaint, checked_line, exception_for
from engine_plugin.engines.ollama.models import full_name
from engine_plugin.errors import (
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    PullError,
)
from engine_plugin.models.flights import PullFlights
from engine_plugin.models.gguf import whole_name
from engine_plugin.models.hubs import refuse_offline
from engine_plugin.models.info import kind_of_type
from engine_plugin.models.request import local_path, read_request
from engine_plugin.redaction import redacted
from engine_plugin.system.files import LFS_POINTER, in_thread, opened, sha256_of
from engine_plugin.transport.answers import one_line
from engine_plugin.transport.ndjson import line_objects, whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    import httpx

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.ollama.client import OllamaClient
    from engine_plugin.engines.ollama.models import ServerModels
    from engine_plugin.models.request import PullRequest

__all__ = ["PIECE", "Pulls"]

_SILENCE = 900.0
"""Seconds without a line after which a pull fails. While the server verifies a large layer, it sends nothing."""
_COPY = "model:"
_HUGGING_FACE = ("hf.co/", "huggingface.co/")
_MAX_STATUS = 200
PIECE = 4 * 1024 * 1024
"""Bytes of a file that are read and sent at once."""
_STALL = 120.0
_ABSENT = 404
_MAGIC = (b"GGUF", b"FUGG")
"""The first bytes of GGUF files, in both byte orders."""
_ERROR_LIMIT = 4096
_MAX_REASON = 300
_SUCCESS = "success"
_NO_HOST = ("no such host", "connection refused", "i/o timeout", "network is unreachable", "dial tcp")
_FORMS = (
    "Give the name of a model at ollama.com (llama3.2, qwen3:8b) or of a GGUF repository (hf.co/OWNER/NAME), the "
    "path of a .gguf file, or model:NAME to copy a pulled model"
)

_NO_CREDENTIALS = (
    "Ollama has no credentials for a single pull. Leave it out, and sign the server in: run `ollama signin` on its "
    "machine (for Hugging Face: add the key in ~/.ollama/id_ed25519.pub there to your account)"
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a pull does. Concurrent pulls of one name with equal plans are shared."""

    client: OllamaClient = field(compare=False)
    name: str
    source: str
    """"" for a pull by the server, `model:OLD` for a copy, else the path of a file."""
    sha256: str
    insecure: bool


class Pulls:
    """The running pulls. Owned by the engine, used from one event loop."""

    def __init__(self, models: ServerModels) -> None:
        self._models = models
        self._flights: PullFlights[_Plan] = PullFlights(self._run, full_name)

    def pull(self, client: OllamaClient, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        """Add a model to the server and yield its events, the last of which is Success.

        Concurrent pulls of one model share the work, which ends when all their iterators are closed; the server keeps
        the downloaded parts. Raises InvalidRequestError, ModelNotFoundError, PullError and the errors of the server.
        """

        async def add_reference(done: Success) -> None:
            if not request.source:
                await self._models.add_reference(request.model, await self._models.get(client, done.model))

        return self._flights.pull(lambda: in_thread(_plan, client, request), add_reference)

    async def aclose(self) -> None:
        """Cancel the running pulls."""
        await self._flights.aclose()

    async def _run(self, plan: _Plan, publish: Callable[[PullEvent], None]) -> Success:
        client = plan.client
        try:
            if plan.source.startswith(_COPY):
                await self._copy(client, plan, publish)
            elif plan.source:
                await _create(client, plan, publish)
            else:
                await _post_and_watch(client, "/api/pull", {"model": plan.name, "insecure": plan.insecure}, publish)
        finally:
            self._models.invalidate()
        model = await self._models.get(client, plan.name)
        if plan.sha256 and not plan.source and model.digest.removeprefix("sha256:") != plan.sha256:
            raise catalogue.CHECKSUM_MISMATCH.error(
                place=model.name,
                found=model.digest,
                wanted=f"sha256:{plan.sha256}",
                fix=f"Correct sha256, or delete the model: DeleteModel {model.name}",
            )
        return Success(model.name, model.size, model.digest)

    async def _copy(self, client: OllamaClient, plan: _Plan, publish: Callable[[PullEvent], None]) -> None:
        old = await self._models.get(client, plan.source.removeprefix(_COPY))
        publish(StepStarted(f"copying {old.name}"))
        shape = {"source": old.name, "destination": plan.name}
        await client.ask("POST", "/api/copy", shape, model=old.name, within=_SILENCE)


def _plan(client: OllamaClient, request: PullRequest) -> _Plan:
    """The plan of a request. Blocking: it stats a local file. Raises InvalidRequestError and ModelNotFoundError."""
    kind_of_type(request.model_type)  # checked only: the server determines the kind itself
    text, where, digest = read_request(request)
    name = request.model
    if request.username:
        raise InvalidRequestError.at("username", _NO_CREDENTIALS)
    if text.startswith(_COPY) and request.source:
        if len(text) == len(_COPY):
            raise InvalidRequestError.at(where, f"model: must be followed by the name of a model. {_FORMS}.")
        return _Plan(client, name, text, digest, insecure=False)
    if text.lower().endswith(".gguf") and not text.startswith(("http://", "https://", "hf.co/")):
        path = local_path(text, where).expanduser().absolute()
        if not path.is_file():
            raise ModelNotFoundError(f"{where}: the file {str(path)!r} does not exist.")
        if whole := whole_name(path.name):
            raise InvalidRequestError.at(
                where,
                f"{path.name} is one part of a split model, and Ollama accepts whole files only. Join the parts by "
                f"`llama-gguf-split --merge FIRST-PART {whole}`, then pull {whole}.",
            )
        return _Plan(client, name if request.source else path.stem, str(path), digest, insecure=False)
    if request.source or "://" in text:
        raise InvalidRequestError.at(
            where, f"{redacted(text)[:128]!r} is not a source that Ollama can pull. {_FORMS}."
        )
    if name.startswith(_HUGGING_FACE):
        refuse_offline(os.environ, f"https://{name}")
    return _Plan(client, name, "", digest, request.insecure)


async def _create(client: OllamaClient, plan: _Plan, publish: Callable[[PullEvent], None]) -> None:
    """Upload a file unless the server has it, and create a model of it."""
    path = Path(plan.source)
    publish(StepStarted(f"reading {path.name}"))
    try:
        async with opened(path) as file:
            _require_gguf(path, await in_thread(file.read, len(LFS_POINTER)))
        digest = await sha256_of(path)
        wanted = f"sha256:{plan.sha256}"
        if plan.sha256 and wanted != digest:
            raise catalogue.CHECKSUM_MISMATCH.error(
                place=path, found=digest, wanted=wanted, fix="Correct sha256 or the file"
            )
        await _upload(client, path, digest, publish)
    except OSError as error:
        raise PullError(f"model: {path} cannot be read: {error.strerror or error}") from error
    await _post_and_watch(client, "/api/create", {"model": plan.name, "files": {path.name: digest}}, publish)


async def _post_and_watch(
    client: OllamaClient, path: str, shape: dict[str, Any], publish: Callable[[PullEvent], None]
) -> None:
    """Send a request whose answer is a stream of progress lines, and publish them up to `success`."""
    loop, model, status = asyncio.get_running_loop(), shape["model"], ""
    body = json.dumps({**shape, "stream": True}).encode()
    try:
        async with asyncio.timeout(_SILENCE) as silence, client.request("POST", path, body, model=model) as response:
            async for lines in whole_lines(response):
                silence.reschedule(loop.time() + _SILENCE)
                for line in line_objects(lines):
                    status = _publish_line(checked_line(line, model), status, publish)
                    if status == _SUCCESS:
                        return
    except TimeoutError:
        raise PullError(f"model: the server sent nothing for {_SILENCE:g} s. Pull again to resume") from None
    except BadGatewayError as error:
        raise _failure(error.reason, model) from error
    raise PullError(f"model: the server stopped pulling {model} without an error. Pull it again to resume")


def _publish_line(line: dict[str, Any], before: str, publish: Callable[[PullEvent], None]) -> str:
    """Publish a line unless it repeats the status `before`, and return its status."""
    status, digest, total = _text(line.get("status")), _text(line.get("digest")), positive_int(line.get("total"))
    if digest and total:
        publish(ChunkProgress(digest, min(positive_int(line.get("completed")), total), total))
        return status
    if status not in ("", before, _SUCCESS):
        publish(StepStarted(status))
    return status or before


def _text(status: object) -> str:
    return one_line(status[:_MAX_STATUS]) if isinstance(status, str) else ""


def _failure(message: str, model: str) -> EnginePluginError:
    """The error for a failure that the server reports, inside the stream or not, or for a broken connection."""
    if "file does not exist" in message:
        return ModelNotFoundError(
            f"model: {model!r} does not exist ({message}). Search for its name at https://ollama.com/search"
        )
    if any(mark in message for mark in _NO_HOST):
        return catalogue.HUB_UNREACHABLE.error(
            source=model, reason=message, settings="the network and HTTPS_PROXY of the Ollama server"
        )
    if "no space left" in message:
        return PullError(f"model: the disk of the Ollama server is full ({message}). Delete models: DeleteModel NAME")
    if "unauthorized" in message or "access denied" in message:
        return PullError(
            f"model: the Ollama server has no access to {model} ({message}). Search for its name at "
            "https://ollama.com/search; for a private model, sign the server in: ollama signin"
        )
    if "digest mismatch" in message:
        return PullError(f"model: the download of {model} is corrupt ({message}). Pull it again")
    return PullError(f"model: the pull of {model} failed: {message}. Pull it again to resume")


# Files


def _require_gguf(path: Path, head: bytes) -> None:
    """Raise InvalidRequestError unless the file is GGUF, which the server would report only after the upload."""
    if head.startswith(LFS_POINTER):
        raise InvalidRequestError.at(
            "model", f"{path} is a Git LFS pointer, not a model: run `git lfs pull` in its clone, or download it"
        )
    if not head.startswith(_MAGIC):
        raise InvalidRequestError.at(
            "model", f"{path} is not a GGUF file: it begins with {head[:4]!r}. Use another one, or convert it to GGUF"
        )


async def _upload(client: OllamaClient, path: Path, digest: str, publish: Callable[[PullEvent], None]) -> None:
    """Send a file to the server unless it has it. Raises OSError, PullError and the errors of the server."""
    import httpx  # Http1Client would hold the whole body in memory

    url = f"{client.url}/api/blobs/{digest}"
    size = (await in_thread(path.stat)).st_size

    async def content() -> AsyncGenerator[bytes, None]:
        sent = 0
        async with opened(path) as file:
            while piece := await in_thread(file.read, PIECE):
                yield piece
                sent += len(piece)
                publish(ChunkProgress(digest, sent, size))

    head = {**client.headers, "accept-encoding": "identity"}
    tls = await in_thread(ssl.create_default_context) if url.startswith("https:") else False
    try:
        async with (
            httpx.AsyncClient(timeout=_STALL, trust_env=False, headers=head, verify=tls) as http,
            aclosing(content()) as body,  # which holds the file open
        ):
            status, answer = await _exchange(http, "HEAD", url)
            if status == _ABSENT:
                publish(StepStarted(f"sending {path.name}"))
                status, answer = await _exchange(
                    http, "POST", url, content=body, headers={"content-length": str(size)}
                )
    except httpx.HTTPError as error:
        reason = one_line(str(error))[:_MAX_REASON] or type(error).__name__
        raise PullError(f"model: {path.name} could not be sent to the Ollama server: {reason}") from error
    if not 200 <= status < 300:
        raise exception_for(body_complaint(status, answer))


async def _exchange(http: httpx.AsyncClient, method: str, url: str, **more: Any) -> tuple[int, bytes]:
    """The status, and the first bytes of an error's body, which may be endless."""
    body = b""
    async with http.stream(method, url, **more) as answer:
        if not answer.is_success:
            async for piece in answer.aiter_raw():
                body += piece
                if len(body) >= _ERROR_LIMIT:
                    break
    return answer.status_code, body
