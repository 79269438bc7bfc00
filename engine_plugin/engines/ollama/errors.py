"""What an Ollama server complains about, as our exceptions that say what to do."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, TypeGuard

from engine_plugin import catalogue
from engine_plugin.errors import (
    AuthError,
    BadGatewayError,
    EnginePluginError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
    UnsupportedError,
)
from engine_plugin.jsontext import json_object
from engine_plugin.models.names import is_cloud_name
from engine_plugin.transport.answers import Complaint

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["complains", "complaint_error", "complaint_of_body", "complaint_of_line"]

_SHOWN = 500
_MEMORY = re.compile(r"requires more (?:system )?memory \((.+?)\) than is available \((.+?)\)")
_FIELDS = (
    (re.compile(r'^option "(\w+)" (must be of .+)'), r"options.\1", r"\2"),
    (
        re.compile(r"^json: cannot unmarshal (\w+) into Go struct field \w+\.([\w.]+) of type .+"),
        r"\2",
        r"cannot be a \1",
    ),
    (re.compile(r"^(invalid format: .+)"), "format", r"\1"),
    (re.compile(r"^(template: .+)"), "template", r"\1"),
    (re.compile(r"^(illegal base64 data at .+)"), "images", r"one is not base64 (\1)"),
    (re.compile(r"^(time: invalid duration .+)"), "keep_alive", r"\1"),
    (re.compile(r"^(invalid think value: .+)"), "think", r"\1"),
)
"""What a server says of a request that it does not understand, some of it as a failure of its own, and of which field
that is."""
_CONTEXT = ("exceeds the context length", "exceeds maximum context length", "exceeded the context")


def complaint_of_body(status: int, body: bytes) -> Complaint:
    """From an error's answer: `{"error": "…"}`, `{"error": {"message", …}}` of /v1, or whatever it is."""
    shape = json_object(body)
    if shape is not None and complains(shape):
        return _complaint(status, shape)
    return Complaint(status, body[:_SHOWN].decode("utf-8", "replace").strip() or "nothing")


def complaint_of_line(line: Mapping[str, Any]) -> Complaint:
    """From a line `{"error": …}` inside a stream, whose HTTP status was 200. Called by who reads streams."""
    codes = (line.get("status_code"), line.get("status"))
    return _complaint(next((code for code in codes if _is_failure(code)), 500), line)


def complains(shape: Mapping[str, Any]) -> bool:
    """Whether an answer, or a line of a stream, is an error; an empty one is none, as for Ollama's own client."""
    return shape.get("error") not in (None, "")


def _is_failure(code: object) -> TypeGuard[int]:
    return isinstance(code, int) and 400 <= code <= 599


def _complaint(status: int, shape: Mapping[str, Any]) -> Complaint:
    error = shape["error"]
    if isinstance(error, str) and error.startswith('{"error":'):  # what computes for the server said it
        error = (json_object(error) or shape)["error"]
    if isinstance(error, dict):
        code = error.get("code")
        status = code if _is_failure(code) else status
        error = error.get("message")
    words = error[:_SHOWN] if isinstance(error, str) else ""
    return Complaint(status, words or "an error without words", shape)


def complaint_error(complaint: Complaint, model: str = "") -> EnginePluginError:
    """The exception for what the server complained about; `model` is the one that the request named.

    Called for answers and for errors inside streams.
    """
    message = complaint.message
    match complaint.status:
        case 301 | 302 | 303 | 307 | 308:
            return BadGatewayError(
                f"the Ollama server answers {complaint.status}, a redirection, which is not followed: give the "
                "address that it leads to (engine.address in plugin.yaml)"
            )
        case 401:
            return _sign_in(complaint, model)
        case 403 if "cloud" in message:
            return catalogue.CLOUD_DISABLED.error(
                model=model or "it", server="the Ollama server", said=message, option=_CLOUD_OPTION
            )
        case 403:
            return AuthError(f"the Ollama server refuses this: {message}. Ask whoever runs it")
        case 404:
            return _missing(message, model)
        case 499:
            return UnavailableError(f"the Ollama server gave the request up: {message}. Try again")
        case 503:
            return catalogue.QUEUE_FULL.error(waiting=message.rstrip("."))
    return _of_words(complaint, model)


_CLOUD_OPTION = "take OLLAMA_NO_CLOUD from its environment, or set engine.no_cloud: false in plugin.yaml for our own"


def _sign_in(complaint: Complaint, model: str) -> AuthError:
    url = complaint.shape.get("signin_url")
    if isinstance(url, str) and url.startswith("https://") and url.isascii() and url.isprintable():
        return catalogue.SIGN_IN_REQUIRED.error(model=model or "it", server="ollama.com", url=url)
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
        return catalogue.MEMORY_INSUFFICIENT.error(model=model or "it", needed=short[1], limit=f"{short[2]} is free")
    if any(mark in message for mark in _CONTEXT):
        return catalogue.CONTEXT_EXCEEDED.error(said=message)
    for said, field, what in _FIELDS:
        if found := said.search(message):
            return InvalidRequestError.at(found.expand(field), found.expand(what))
    if complaint.status == 400 and "model name" in message:
        return InvalidRequestError.at("model", f"{model!r}: {message}")
    if "newer version of Ollama" in message:
        return PreconditionError(
            f"model: {model or 'it'} needs a newer Ollama than this server is. Upgrade it: "
            "https://ollama.com/download, or call UpgradeEngine for one that this plugin installed"
        )
    return complaint.error()
