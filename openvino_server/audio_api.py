"""/v3/audio/transcriptions, /v3/audio/translations and /v3/audio/speech."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import BodyPartReader, web

from engine_plugin.errors import InvalidRequestError
from engine_plugin.services.base import choice, optional, words
from openvino_server import wav
from openvino_server.errors import RequestError
from openvino_server.requests import BODY_LIMIT, REGISTRY, json_answer, read_object

__all__ = ["speech", "transcription", "translation"]

_FIELD_LIMIT = 64 * 1024
_FIELDS_LIMIT = 64
_FORMATS = {"wav": "audio/wav", "pcm": "audio/pcm"}


async def translation(request: web.Request) -> web.Response:
    """POST /v3/audio/translations: a transcription in English"""
    return await transcription(request, "translate")


async def transcription(request: web.Request, task: str = "transcribe") -> web.Response:
    """POST /v3/audio/transcriptions: OpenAI's verbose JSON"""
    form, file = await _form(request)
    options = {"task": task} | {name: values[-1] for name, values in form.items()}
    granularities = [*form.get("timestamp_granularities[]", ()), *form.get("timestamp_granularities", ())]
    for value in granularities:
        choice({"timestamp_granularities": value}, "timestamp_granularities", ("segment", "word"))
    with_words = "word" in granularities
    if file is None:
        raise InvalidRequestError.at("file", "is missing")
    try:
        temperature = float(options["temperature"]) if "temperature" in options else None
    except ValueError:
        raise InvalidRequestError.at("temperature", f"must be a number, not {options['temperature']!r}") from None
    model = request.app[REGISTRY].find(options.get("model"), "speech-to-text")
    samples = await asyncio.to_thread(wav.read_mono, file)
    call = {
        "op": "transcribe",
        "audio": samples,
        "language": options.get("language") or None,
        "task": options["task"] or "transcribe",
        "temperature": temperature,
        "words": with_words,
    }
    async with model.use() as worker:
        result = await worker.ask(call)
    answer: dict[str, Any] = {"text": result["text"], "duration": len(samples) / (4 * wav.RATE)}
    if result.get("language"):
        answer["language"] = result["language"]
    answer["segments"] = [
        {"id": number, "start": start, "end": end, "text": text}
        for number, (start, end, text) in enumerate(result["segments"])
    ]
    if with_words:
        answer["words"] = [{"word": word, "start": start, "end": end} for start, end, word in result.get("words", [])]
    return json_answer(answer)


async def speech(request: web.Request) -> web.Response:
    """POST /v3/audio/speech"""
    body = await read_object(request)
    form = choice(body, "response_format", tuple(_FORMATS)) or "wav"
    call = {
        "op": "speak",
        "text": words(body, "input"),
        "voice": optional(body, "voice", str) or None,
        "speed": body.get("speed"),
        "language": optional(body, "language", str) or None,
    }
    model = request.app[REGISTRY].find(body.get("model"), "text-to-speech")
    async with model.use() as worker:
        result = await worker.ask(call)
    data = await asyncio.to_thread(wav.write, result["pcm"], result["rate"], form == "wav")
    return web.Response(body=data, content_type=_FORMATS[form])


async def _form(request: web.Request) -> tuple[dict[str, list[str]], bytes | None]:
    """The fields of a multipart form, and the content of its `file`."""
    if request.content_type != "multipart/form-data":
        raise RequestError(f"the body must be multipart/form-data, not {request.content_type}")
    form: dict[str, list[str]] = {}
    file: bytes | None = None
    try:
        parts = await request.multipart()
        count = 0
        async for part in parts:
            count += 1
            if not isinstance(part, BodyPartReader) or part.name is None:
                raise RequestError("the form has a part without a name")
            if part.name == "file":
                file = await _content(part, BODY_LIMIT)
            elif count <= _FIELDS_LIMIT:
                text = (await _content(part, _FIELD_LIMIT)).decode("utf-8", "replace")
                form.setdefault(part.name, []).append(text)
            else:
                raise RequestError("the form has too many fields")
    except ValueError as error:
        raise RequestError(f"the form cannot be read: {error}") from None
    return form, file


async def _content(part: BodyPartReader, limit: int) -> bytes:
    data = bytearray()
    while piece := await part.read_chunk(256 * 1024):
        data += piece
        if len(data) > limit:
            raise RequestError(f"{part.name}: more than {limit} bytes", 413)
    return bytes(data)
