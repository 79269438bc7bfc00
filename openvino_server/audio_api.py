"""/v3/audio/transcriptions, /v3/audio/translations and /v3/audio/speech."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiohttp import BodyPartReader, web

from openvino_server import fields, wav
from openvino_server.errors import RequestError, bad_request
from openvino_server.requests import BODY_LIMIT, REGISTRY, json_answer, read_object

if TYPE_CHECKING:
    from openvino_server.registry import Registry

__all__ = ["speech", "transcription", "translation"]

_FIELD_LIMIT = 64 * 1024
_FIELDS_LIMIT = 64
_FORMATS = {"wav": "audio/wav", "pcm": "audio/pcm"}


async def translation(request: web.Request) -> web.Response:
    """POST /v3/audio/translations: a transcription in English"""
    return await transcription(request, "translate")


async def transcription(request: web.Request, task: str = "transcribe") -> web.Response:
    """POST /v3/audio/transcriptions"""
    form, file = await _form(request)
    granularities = [
        value for name in ("timestamp_granularities[]", "timestamp_granularities") for value in form.get(name, [])
    ]
    for value in granularities:
        if value not in ("segment", "word"):
            raise bad_request("timestamp_granularities", f"must be segment or word, not {value!r}")
    options: dict[str, Any] = {"task": task} | {name: values[-1] for name, values in form.items()}
    if file is None:
        raise bad_request("file", "is missing")
    temperature = options.get("temperature")
    if temperature is not None:
        try:
            options["temperature"] = float(temperature)
        except ValueError:
            raise bad_request("temperature", f"must be a number, not {temperature!r}") from None
    return json_answer(
        await _transcribe(request.app[REGISTRY], options.get("model"), file, options, "word" in granularities)
    )


async def _transcribe(
    registry: Registry, name: object, data: bytes, options: dict[str, Any], words: bool = False
) -> dict[str, Any]:
    """The transcription of a WAV file as OpenAI's verbose JSON. Raises RequestError."""
    model = registry.find(name, "speech-to-text")
    samples = await asyncio.to_thread(wav.read_mono, data)
    call = {
        "op": "transcribe",
        "audio": samples,
        "language": options.get("language") or None,
        "task": options.get("task") or "transcribe",
        "temperature": options.get("temperature"),
        "words": words,
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
    if words:
        answer["words"] = [{"word": word, "start": start, "end": end} for start, end, word in result.get("words", [])]
    return answer


async def speech(request: web.Request) -> web.Response:
    """POST /v3/audio/speech"""
    body = await read_object(request)
    form = fields.text(body, "response_format", "wav")
    if form not in _FORMATS:
        raise bad_request("response_format", f"must be {' or '.join(_FORMATS)}, not {form!r}")
    data = await _say(request.app[REGISTRY], body.get("model"), fields.text(body, "input"), body, form)
    return web.Response(body=data, content_type=_FORMATS[form])


async def _say(registry: Registry, name: object, text: str, options: dict[str, Any], form: str = "wav") -> bytes:
    """Speech as a WAV file, or as bare 16-bit samples. Raises RequestError."""
    if not text.strip():
        raise bad_request("input", "must contain text")
    model = registry.find(name, "text-to-speech")
    call = {
        "op": "speak",
        "text": text,
        "voice": options.get("voice") or None,
        "speed": options.get("speed"),
        "language": options.get("language") or None,
    }
    async with model.use() as worker:
        result = await worker.ask(call)
    return await asyncio.to_thread(wav.write, result["pcm"], result["rate"], form == "wav")


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
