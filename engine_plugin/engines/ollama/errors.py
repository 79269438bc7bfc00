"""What an Ollama server complains about, as our exceptions that say what to do."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.engines.http.answers import Complaint
from engine_plugin.errors import (
    AuthError,
    EnginePluginError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["complaint_error", "complaint_of_body", "complaint_of_line", "is_cloud_name"]

_SHOWN = 500
_MEMORY = re.compile(r"requires more (?:system )?memory \((.+?)\) than is available \((.+?)\)")
_CONTEXT = ("exceeds the context length", "exceeds maximum context length", "exceeded the context")


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
    return Complaint(status, body[:_SHOWN].decode("utf-8", "replace").strip() or "nothing")


def complaint_of_line(line: Mapping[str, Any]) -> Complaint:
    """From a line `{"error": …}` inside a stream, whose HTTP status was 200. Called by who reads streams."""
    codes = (line.get("status_code"), line.get("status"))
    return _complaint(next((code for code in codes if isinstance(code, int)), 500), line)


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
            return _sign_in(complaint, model)
        case 403 if "cloud" in message:
            return catalogue.CLOUD_OFF.error(
                model=model or "it", server="the Ollama server", said=message, option=_CLOUD_OPTION
            )
        case 403:
            return AuthError(f"the Ollama server refuses this: {message}. Ask whoever runs it")
        case 404:
            return _missing(message, model)
        case 499:
            return UnavailableError(f"the Ollama server gave the request up: {message}. Try again")
        case 503:
            return catalogue.BUSY.error(waiting=message.rstrip("."))
    return _of_words(complaint, model)


_CLOUD_OPTION = "take OLLAMA_NO_CLOUD from its environment, or set engine.no_cloud: false in plugin.yaml for our own"


def _sign_in(complaint: Complaint, model: str) -> AuthError:
    url = complaint.shape.get("signin_url")
    if isinstance(url, str) and url:
        return catalogue.SIGN_IN.error(model=model or "it", server="ollama.com", url=url)
    return AuthError(
        f"the Ollama server answers nobody without a key or a sign-in ({complaint.message}). Run `ollama signin` on "
        "its machine, or set OLLAMA_API_KEY in the environment of the plugin, and start it again"
    )


def _missing(message: str, model: str) -> EnginePluginError:
    if model and "page not found" not in message:
        return catalogue.model_missing(model, pull="" if is_cloud_name(model) else model)
    return UnsupportedError(
        f"the Ollama server does not have this ({message}). Upgrade it: https://ollama.com/download"
    )


def _of_words(complaint: Complaint, model: str) -> EnginePluginError:
    """Statuses say little here: most of what goes wrong is a 500, and inside a stream there is none."""
    message = complaint.message
    if short := _MEMORY.search(message):
        return catalogue.MEMORY.error(model=model or "it", needed=short[1], limit=f"{short[2]} is free")
    if any(mark in message for mark in _CONTEXT):
        return catalogue.CONTEXT.error(said=message)
    if complaint.status == 400 and "model name" in message:
        return InvalidRequestError(f"model: {model!r}: {message}")
    if "newer version of Ollama" in message:
        return PreconditionError(
            f"model: {model or 'it'} needs a newer Ollama than this server is. Upgrade it: "
            "https://ollama.com/download, or engine-plugin engine upgrade for one of our own"
        )
    return complaint.error()
