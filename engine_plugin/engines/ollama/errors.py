"""What an Ollama server complains about, as our exceptions that say what to do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from engine_plugin.engines.http.answers import Complaint
from engine_plugin.errors import (
    AuthError,
    EnginePluginError,
    ModelNotFoundError,
    PreconditionError,
    UnavailableError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["complaint_error", "complaint_of_body", "complaint_of_line", "is_cloud_name"]

_SHOWN = 500
_CANCELLED = 499


def is_cloud_name(name: str) -> bool:
    """Whether a model of that name computes at ollama.com: there is nothing to pull."""
    return name.endswith((":cloud", "-cloud"))


def complaint_of_body(status: int, body: bytes) -> Complaint:
    """From an error's answer: `{"error": "…"}`, `{"error": {"message", …}}` of /v1, or whatever it is."""
    try:
        shape = json.loads(body)
    except (ValueError, RecursionError):
        shape = None
    if isinstance(shape, dict) and "error" in shape:
        return _complaint(status, shape)
    return Complaint(status, body[:_SHOWN].decode("utf-8", "replace").strip() or "(nothing)")


def complaint_of_line(line: Mapping[str, Any]) -> Complaint:
    """From a line `{"error": …}` inside a stream, whose HTTP status was 200. Called by who reads streams."""
    code = line.get("status_code")
    return _complaint(code if isinstance(code, int) else 500, line)


def _complaint(status: int, shape: Mapping[str, Any]) -> Complaint:
    error = shape["error"]
    words = error.get("message") if isinstance(error, dict) else error
    return Complaint(status, str(words or json.dumps(error)), shape)


def complaint_error(complaint: Complaint, model: str = "") -> EnginePluginError:
    """The exception for what the server complained about; `model` is the one that the request named.

    Called for answers and for errors inside streams.
    """
    message = complaint.message
    match complaint.status:
        case 401:
            return _sign_in(complaint)
        case 403:
            return AuthError(f"the Ollama server refuses this: {message}")
        case 404 if model:
            return model_missing(model)
        case 499:
            return UnavailableError(f"the Ollama server gave the request up: {message}")
        case 412:
            return PreconditionError(f"the Ollama server says: {message}")
    return complaint.error()


def _sign_in(complaint: Complaint) -> EnginePluginError:
    url = complaint.shape.get("signin_url")
    way = f"Sign in at {url}" if isinstance(url, str) and url else "Sign in with `ollama signin`"
    return AuthError(f"the Ollama server says {complaint.message}. {way}, or give the key in OLLAMA_API_KEY")


def model_missing(name: str) -> ModelNotFoundError:
    """No model of that name is on the server."""
    return ModelNotFoundError(f"model: {name!r} is not here", pull="" if is_cloud_name(name) else name)
