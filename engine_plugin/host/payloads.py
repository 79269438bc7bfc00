"""Encodes and decodes the `bytes *_json` fields of the wire."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from engine_plugin.errors import BadGatewayError
from engine_plugin.jsontext import answer_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from engine_plugin.protocol.shapes import ModelEntry, PullProgress

__all__ = ["dump", "invocation", "models", "parse_object", "progress"]


def dump(**fields: Any) -> bytes:
    """Return the fields as a JSON object."""
    return json.dumps(fields).encode()


def invocation(service: str, request: Mapping[str, Any] | bytes, auth: str) -> dict[str, Any]:
    """Return the fields of an InvokeServiceRequest; bytes are sent unchanged."""
    data = request if isinstance(request, bytes) else dump(**request)
    return {"service_name": service, "request_data": data, "auth_info": auth}


def parse_object(data: bytes, of: str) -> dict[str, Any]:
    """Parse a JSON object in the answer to `of`. Raises BadGatewayError."""
    return answer_object(data, f"the plugin's answer to {of}")


def models(data: bytes, of: str) -> list[ModelEntry]:
    """Return the models of a ListModelsResponse. Raises BadGatewayError."""
    found = parse_object(data, of).get("models") or []
    if not isinstance(found, list):
        raise BadGatewayError(f"the plugin's answer to {of} has no list of models: {data[:200]!r}")
    return cast("list[ModelEntry]", found)


def progress(data: bytes) -> PullProgress:
    """Parse a ProgressResponse. Raises BadGatewayError."""
    return cast("PullProgress", parse_object(data, "PullModel"))
