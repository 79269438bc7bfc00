"""Converts a service's request to the server's; only the fields that differ are touched."""

from __future__ import annotations

import json
from typing import Any

from engine_plugin.errors import BadGatewayError, InvalidRequestError
from engine_plugin.jsontext import write_request
from engine_plugin.openai_api.conversation import make_plain
from engine_plugin.openai_api.ranking import document_texts
from engine_plugin.services.pictures import picture_size
from engine_plugin.transport.sse import DONE, event_of

__all__ = ["API", "PATHS", "STREAMED", "completed_event", "upstream_body"]

API = "/v3"
"""The path of the API of both servers."""

PATHS = {
    "chat": f"{API}/chat/completions",
    "generate": f"{API}/completions",
    "embed": f"{API}/embeddings",
    "rerank": f"{API}/rerank",
    "text-to-image": f"{API}/images/generations",
}
"""The routes of the services whose request and answer are the server's, except for a few fields."""

STREAMED = frozenset({"chat", "generate", "text-to-image"})

_MAX_RESOLUTION = "4096x4096"
_MULTIPLE = 8


def upstream_body(service: str, request: dict[str, Any], largest: str = "", *, stream: bool) -> bytes:
    """The JSON to send. `largest` is the most a picture may have, as 512x512; "": the server's default.

    Raises InvalidRequestError, naming the field, for an unsupported size or field.
    """
    body = {name: value for name, value in request.items() if value is not None}
    body.pop("stream", None)
    if stream:
        body["stream"] = True
    else:
        body.pop("stream_options", None)
    if service in ("chat", "generate"):
        _generation(body)
    if service == "chat":
        make_plain(body, {})
    elif service == "rerank":
        body["documents"] = document_texts(request)
    elif service == "text-to-image":
        _picture(body, largest or _MAX_RESOLUTION)
    return write_request(body)


def _generation(body: dict[str, Any]) -> None:
    """Refuse fields that an `ovms` would ignore, and omit `max_tokens: -1` (no limit), which it would refuse."""
    for name in ("logit_bias", "suffix"):
        if body.get(name):
            raise InvalidRequestError.at(name, "OpenVINO does not support it; leave it out")
    for name in ("max_tokens", "max_completion_tokens"):
        if body.get(name) == -1:
            del body[name]


def _picture(body: dict[str, Any], largest: str) -> None:
    """Write the size as WIDTHxHEIGHT and the seed as rng_seed."""
    if "size" in body:
        body["size"] = _size(body["size"], largest)
    if "seed" in body:
        seed = body.pop("seed")
        body.setdefault("rng_seed", seed)


def _size(size: str, largest: str) -> str:
    """The size as WIDTHxHEIGHT. Raises InvalidRequestError for an unsupported one."""
    width, height = picture_size(size)
    if width % _MULTIPLE or height % _MULTIPLE or not width or not height:
        near = "x".join(str(max(_MULTIPLE, round(side / _MULTIPLE) * _MULTIPLE)) for side in (width, height))
        raise InvalidRequestError.at(
            "size", f"width and height must be multiples of {_MULTIPLE}, as in {near}, not {size}"
        )
    most = [int(side) for side in largest.split("x")]
    if width > most[0] or height > most[1]:
        raise InvalidRequestError.at(
            "size",
            f"{width}x{height} is more than {largest}, which engine.image.max_resolution in plugin.yaml allows",
        )
    return f"{width}x{height}"


def completed_event(answer: bytes) -> bytes:
    """The only event, and the end, of a stream of pictures from a server that does not stream them."""
    try:
        shape = json.loads(answer)
        event = {"type": "image_generation.completed", "created": shape["created"], "data": shape["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise BadGatewayError(f"the engine's pictures are not understood: {answer[:200]!r}") from error
    return event_of(event) + DONE
