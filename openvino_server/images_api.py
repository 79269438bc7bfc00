"""Handler of /v3/images/generations: OpenAI's format, with progress events in a stream."""

from __future__ import annotations

import base64
import json
import re
import time
from typing import TYPE_CHECKING, Any

from engine_plugin.services.pictures import IMAGE_FORMATS
from openvino_server import fields
from openvino_server.errors import bad_request
from openvino_server.requests import REGISTRY, json_answer, read_object
from openvino_server.stream import DONE, EventStream

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["generate"]

_SIZE = re.compile(r"(\d{1,5})[xX*](\d{1,5})")


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /v3/images/generations"""
    body = await read_object(request)
    call = _call(body)
    if fields.text(body, "response_format", "b64_json") != "b64_json":
        raise bad_request("response_format", "only b64_json is supported")
    streamed = fields.flag(body, "stream")
    model = request.app[REGISTRY].find(body.get("model"), "text-to-image")
    async with model.use() as worker:
        if streamed:
            return await _ImageStream(request).run(worker, call)
        result = await worker.ask(call)
    return json_answer(_answer(result))


def _call(body: dict[str, Any]) -> dict[str, Any]:
    width, height = _size(body)
    seed = _seed(body, "rng_seed")
    form = fields.text(body, "output_format", IMAGE_FORMATS[0])
    if form not in IMAGE_FORMATS:
        raise bad_request("output_format", f"must be {' or '.join(IMAGE_FORMATS)}, not {form!r}")
    return {
        "op": "image",
        "prompt": fields.text(body, "prompt"),
        "negative_prompt": fields.text(body, "negative_prompt", ""),
        "width": width,
        "height": height,
        "steps": fields.whole(body, "num_inference_steps", 1),
        "seed": _seed(body, "seed") if seed is None else seed,
        "n": fields.whole(body, "n", 1),
        "guidance": body.get("guidance_scale"),
        "format": form,
    }


def _seed(body: dict[str, Any], field: str) -> int | None:
    """The seed; None for a random one, which -1 requests too."""
    seed = fields.whole(body, field, -1)
    return None if seed == -1 else seed


def _size(body: dict[str, Any]) -> tuple[int | None, int | None]:
    size = fields.text(body, "size", "auto")
    if size == "auto":
        return None, None
    found = _SIZE.fullmatch(size)
    if found is None:
        raise bad_request("size", f"must be WIDTHxHEIGHT, such as 512x512, not {size!r}")
    return int(found[1]), int(found[2])


def _answer(result: dict[str, Any]) -> dict[str, Any]:
    images = [{"b64_json": base64.b64encode(image).decode()} for image in result["images"]]
    return {"created": int(time.time()), "data": images}


class _ImageStream(EventStream):
    """Events of the progress, then one with the pictures."""

    def render(self, events: list[Any]) -> bytes:
        return b"".join(
            b'data: {"type":"image_generation.progress","step":%d,"total":%d}\n\n' % (step, total)
            for step, total in events
        )

    def closing(self, result: dict[str, Any]) -> bytes:
        event = {"type": "image_generation.completed"} | _answer(result)
        return b"data: " + json.dumps(event).encode() + b"\n\n" + DONE
