"""How a model gets to an Ollama server: the server pulls or copies it, or is handed a file of this machine."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.download.events import ChunkProgress, Status, Success
from engine_plugin.engines.ollama.blobs import require_gguf, sha256_of, upload
from engine_plugin.engines.ollama.entries import number_of
from engine_plugin.engines.ollama.errors import complains, complaint_error, complaint_of_line
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
from engine_plugin.system.files import in_thread
from engine_plugin.transport.answers import one_line
from engine_plugin.transport.ndjson import line_objects, whole_lines

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from engine_plugin.download.events import PullEvent
    from engine_plugin.engines.ollama.connection import OllamaClient
    from engine_plugin.engines.ollama.models import ServerModels
    from engine_plugin.models.request import PullRequest
    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["Pulls"]

_SILENCE = 900.0
"""Seconds without a line after which a pull is given up: a large layer is verified in silence."""
_COPY = "model:"
_HUGGING_FACE = ("hf.co/", "huggingface.co/")
_SHOWN = 200
_SUCCESS = "success"
_NO_HOST = ("no such host", "connection refused", "i/o timeout", "network is unreachable", "dial tcp")
_FORMS = (
    "Give the name of a model at ollama.com (llama3.2, qwen3:8b) or of a GGUF repository (hf.co/OWNER/NAME), the "
    "path of a .gguf file with a name to keep it under, or model:NAME to copy one that is here"
)

_NO_CREDENTIALS = (
    "an Ollama server takes none with a pull. Leave it out, and sign the server in: run `ollama signin` on its "
    "machine (for Hugging Face: add the key in ~/.ollama/id_ed25519.pub there to your account)"
)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a pull does. Two pulls of one name with equal plans are one."""

    client: OllamaClient = field(compare=False)
    name: str
    source: str
    """"" to have the server pull it, `model:OLD` to copy one, else the path of a file."""
    sha256: str
    insecure: bool


class Pulls:
    """The pulls that run. Owned by the engine, used from one event loop."""

    def __init__(self, models: ServerModels) -> None:
        self._models = models
        self._flights: PullFlights[_Plan] = PullFlights(self._run, full_name)

    def pull(self, client: OllamaClient, request: PullRequest) -> AsyncGenerator[PullEvent, None]:
        """Pull a model to the server and yield the events; ends after Success or raises.

        Concurrent pulls of one model are one; closing the iterator leaves it, and the last to leave ends it: the
        server keeps what arrived. Raises InvalidRequestError, ModelNotFoundError, PullError and what the server's
        refusals mean.
        """

        async def refer(done: Success) -> None:
            if not request.source:
                await self._models.refer(request.model, await self._models.get(client, done.model))

        return self._flights.pull(lambda: in_thread(_plan, client, request), refer)

    async def aclose(self) -> None:
        """End the pulls that run."""
        await self._flights.aclose()

    async def _run(self, plan: _Plan, publish: Callable[[PullEvent], None]) -> Success:
        client = plan.client
        try:
            if plan.source.startswith(_COPY):
                await self._copy(client, plan, publish)
            elif plan.source:
                await _create(client, plan, publish)
            else:
                shape = {"model": plan.name, "insecure": plan.insecure, "stream": True}
                await _watched(client, "/api/pull", shape, plan.name, publish)
        finally:
            self._models.forget()
        model = await self._models.get(client, plan.name)
        if plan.sha256 and not plan.source and model.digest.removeprefix("sha256:") != plan.sha256:
            raise catalogue.CHECKSUM_MISMATCH.error(
                place=model.name,
                found=model.digest,
                wanted=f"sha256:{plan.sha256}",
                fix=f"Correct sha256, or delete it: DeleteModel {model.name}",
            )
        return Success(model.name, model.size, model.digest)

    async def _copy(self, client: OllamaClient, plan: _Plan, publish: Callable[[PullEvent], None]) -> None:
        old = await self._models.get(client, plan.source.removeprefix(_COPY))
        publish(Status(f"copying {old.name}"))
        shape = {"source": old.name, "destination": plan.name}
        await client.ask("POST", "/api/copy", shape, model=old.name, within=_SILENCE)


def _plan(client: OllamaClient, request: PullRequest) -> _Plan:
    """What a request means. Stats a local file: call it in a thread."""
    kind_of_type(request.model_type)  # the server knows what a model is for; a wrong word is still wrong
    text, where, digest = read_request(request)
    name = request.model
    if request.username:
        raise InvalidRequestError.at("username", f"{_NO_CREDENTIALS}")
    if text.startswith(_COPY) and request.source:
        if len(text) == len(_COPY):
            raise InvalidRequestError.at(where, f"model: must be followed by the name of a model. {_FORMS}.")
        return _Plan(client, name, text, digest, insecure=False)
    if text.lower().endswith(".gguf") and not text.startswith(("http://", "https://", "hf.co/")):
        path = local_path(text, where).expanduser().absolute()
        if not path.is_file():
            raise ModelNotFoundError(f"{where}: there is no file {str(path)!r}.")
        _refuse_part(path.name, where)
        return _Plan(client, name if request.source else path.stem, str(path), digest, insecure=False)
    if request.source or "://" in text:
        raise InvalidRequestError.at(where, f"{redacted(text)[:128]!r} is no source that Ollama can pull. {_FORMS}.")
    if name.startswith(_HUGGING_FACE):
        refuse_offline(os.environ, f"https://{name}")
    return _Plan(client, name, "", digest, request.insecure)


def _refuse_part(name: str, where: str) -> None:
    """Raise InvalidRequestError for a file that is one of several parts of a model: the server takes whole ones."""
    whole = whole_name(name)
    if whole:
        raise InvalidRequestError.at(
            where,
            f"{name} is one part of a model, and an Ollama server takes whole files. Join the parts by "
            f"`llama-gguf-split --merge FIRST-PART {whole}`, then pull {whole}.",
        )


async def _create(client: OllamaClient, plan: _Plan, publish: Callable[[PullEvent], None]) -> None:
    """Hand the server a file: its bytes unless it has them, then what to make of them."""
    path = Path(plan.source)
    await require_gguf(path)
    publish(Status(f"reading {path.name}"))
    digest = await sha256_of(path)
    if plan.sha256 and plan.sha256 != digest:
        raise catalogue.CHECKSUM_MISMATCH.error(
            place=path, found=f"sha256:{digest}", wanted=f"sha256:{plan.sha256}", fix="Correct sha256, or the file"
        )
    await upload(client, path, digest, publish)
    shape = {"model": plan.name, "files": {path.name: f"sha256:{digest}"}, "stream": True}
    await _watched(client, "/api/create", shape, plan.name, publish)


async def _watched(
    client: OllamaClient, path: str, shape: dict[str, Any], model: str, publish: Callable[[PullEvent], None]
) -> None:
    """Ask for something that tells of itself line by line, up to its `success`."""
    said = ""
    try:
        async with client.request("POST", path, json.dumps(shape).encode(), model=model) as response:
            async for line in _lines(response):
                if complains(line):
                    raise complaint_error(complaint_of_line(line), model)
                said = _told(line, said, publish)
                if said == _SUCCESS:
                    return
    except BadGatewayError as error:
        raise _failure(error.reason, model) from error
    raise PullError(
        f"model: the server stopped pulling {model} without saying why. Pull it again; it keeps what came"
    )


def _told(line: dict[str, Any], said: str, publish: Callable[[PullEvent], None]) -> str:
    """Tell of a line, but not twice in a row of one step; returns the step."""
    status, digest, total = _words(line.get("status")), _words(line.get("digest")), number_of(line.get("total"))
    if digest and total:
        publish(ChunkProgress(digest, min(number_of(line.get("completed")), total), total))
        return status
    if status not in ("", said, _SUCCESS):
        publish(Status(status))
    return status or said


def _words(said: object) -> str:
    """What a person can be shown of it."""
    return one_line(said[:_SHOWN]) if isinstance(said, str) else ""


async def _lines(response: HttpResponse) -> AsyncGenerator[dict[str, Any], None]:
    blocks = aiter(whole_lines(response))
    while True:
        try:
            async with asyncio.timeout(_SILENCE):
                block = await anext(blocks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise PullError(
                f"model: the server said nothing for {_SILENCE:g} s. Pull again; it keeps what came"
            ) from None
        for line in line_objects(block):
            yield line


def _failure(said: str, model: str) -> EnginePluginError:
    """What the server's words for a failure mean, told inside the stream or not, or the end of the connection."""
    if "file does not exist" in said:
        return ModelNotFoundError(
            f"model: neither ollama.com nor a host in its name has {model!r} ({said}). Look for its name at "
            "https://ollama.com/search"
        )
    if any(mark in said for mark in _NO_HOST):
        return catalogue.HUB_UNREACHABLE.error(
            source=model, reason=said, settings="the network and HTTPS_PROXY of the Ollama server"
        )
    if "no space left" in said:
        return PullError(f"model: the disk of the Ollama server is full ({said}). Delete models: DeleteModel NAME")
    if "unauthorized" in said or "access denied" in said:
        return PullError(
            f"model: the Ollama server may not have {model} ({said}). Look for its name at "
            "https://ollama.com/search; for a model of your own, sign the server in: ollama signin"
        )
    if "digest mismatch" in said:
        return PullError(f"model: what came of {model} is not what was asked for ({said}). Pull it again")
    return PullError(f"model: {model} did not come: {said}. Pull it again; the server keeps what came")
