"""Handler of /v3/images/generations: OpenAI's format, with progress events in a stream."""

from __future__ import annotations

import base64
import time
from typing import TYPE_CHECKING, Any

from engine_plugin.services import VALIDATORS
from engine_plugin.services.base import optional
from engine_plugin.services.pictures import IMAGE_FORMATS, picture_size
from engine_plugin.transport.sse import DONE, event_of
from openvino_server.requests import REGISTRY, json_answer, read_object
from openvino_server.stream import EventStream

if TYPE_CHECKING:
    from aiohttp import web

__all__ = ["generate"]


async def generate(request: web.Request) -> web.StreamResponse:
    """POST /v3/images/generations"""
    body = await read_object(request)
    VALIDATORS["text-to-image"].check(body)
    call = _call(body)
    streamed = optional(body, "stream", bool)
    model = request.app[REGISTRY].find(body.get("model"), "text-to-image")
    async with model.use() as worker:
        if streamed:
            return await EventStream(request, _progress, _completed).run(worker, call)
        result = await worker.ask(call)
    return json_answer(_answer(result))


def _call(body: dict[str, Any]) -> dict[str, Any]:
    size = body.get("size") or "auto"
    width, height = (None, None) if size == "auto" else picture_size(size)
    seed = next((body[field] for field in ("rng_seed", "seed") if body.get(field) not in (None, -1)), None)
    return {
        "op": "image",
        "prompt": body["prompt"],
        "negative_prompt": body.get("negative_prompt") or "",
        "width": width,
        "height": height,
        "steps": body.get("num_inference_steps"),
        "seed": seed,
        "n": body.get("n"),
        "guidance": body.get("guidance_scale"),
        "format": body.get("output_format") or IMAGE_FORMATS[0],
    }


def _answer(result: dict[str, Any]) -> dict[str, Any]:
    images = [{"b64_json": base64.b64encode(image).decode()} for image in result["images"]]
    return {"created": int(time.time()), "data": images}


def _progress(steps: list[tuple[int, int]]) -> bytes:
    return b"".join(
        b'data: {"type":"image_generation.progress","step":%d,"total":%d}\n\n' % (step, total)
        for step, total in steps
    )


def _completed(result: dict[str, Any]) -> bytes:
    return event_of({"type": "image_generation.completed"} | _answer(result)) + DONE
