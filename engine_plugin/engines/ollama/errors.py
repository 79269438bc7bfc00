"""Maps the errors of Ollama servers to exceptions of this package, each with the next step."""

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

__all__ = ["body_complaint", "checked_line", "exception_for", "line_complaint"]

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
    (re.compile(r"^(illegal base64 data at .+)"), "images", r"not valid base64 (\1)"),
    (re.compile(r"^(time: invalid duration .+)"), "keep_alive", r"\1"),
    (re.compile(r"^(invalid think value: .+)"), "think", r"\1"),
)
"""Messages about invalid requests, some of them with status 500, and the field that each one means."""
_CONTEXT = ("exceeds the context length", "exceeds maximum context length", "exceeded the context")


def body_complaint(status: int, body: bytes) -> Complaint:
    """Parse the body of an error: `{"error": "…"}`, `{"error": {"message", …}}` from /v1, or any other text."""
    shape = json_object(body)
    if shape is not None and _has_error(shape):
        return _complaint(status, shape)
    return Complaint(status, body[:_SHOWN].decode("utf-8", "replace").strip() or "no message")


def line_complaint(line: Mapping[str, Any]) -> Complaint:
    """Parse an error line `{"error": …}` of a stream, whose HTTP status was 200."""
    codes = (line.get("status_code"), line.get("status"))
    return _complaint(next((code for code in codes if _is_failure(code)), 500), line)


def checked_line(line: dict[str, Any], model: str) -> dict[str, Any]:
    """The line of a stream; an error line raises its exception. `model` is the model that the request names."""
    if _has_error(line):
        raise exception_for(line_complaint(line), model)
    return line


def _has_error(shape: Mapping[str, Any]) -> bool:
    """Whether an answer is an error. As in Ollama's own client, an empty error does not count."""
    return shape.get("error") not in (None, "")


def _is_failure(code: object) -> TypeGuard[int]:
    return isinstance(code, int) and 400 <= code <= 599


def _complaint(status: int, shape: Mapping[str, Any]) -> Complaint:
    error = shape["error"]
    if isinstance(error, str) and error.startswith('{"error":'):  # passed on from the server's runner
        error = (json_object(error) or shape)["error"]
    if isinstance(error, dict):
        code = error.get("code")
        status = code if _is_failure(code) else status
        error = error.get("message")
    message = error[:_SHOWN] if isinstance(error, str) else ""
    return Complaint(status, message or "an error without a message", shape)


def exception_for(complaint: Complaint, model: str = "") -> EnginePluginError:
    """The exception for an error in an answer or a stream; `model` is the model that the request names."""
    message = complaint.message
    match complaint.status:
        case 301 | 302 | 303 | 307 | 308:
            return BadGatewayError(
                f"the Ollama server redirects (status {complaint.status}), and redirects are not followed: set "
                "engine.address in plugin.yaml to the target of the redirect"
            )
        case 401:
            return _sign_in(complaint, model)
        case 403 if "cloud" in message:
            return catalogue.CLOUD_DISABLED.error(
                model=model or "it", server="the Ollama server", said=message, option=_CLOUD_OPTION
            )
        case 403:
            return AuthError(f"the Ollama server denied the request: {message}. Ask its administrator for access")
        case 404:
            return _missing(message, model)
        case 499:
            return UnavailableError(f"the Ollama server dropped the request: {message}. Try again")
        case 503:
            return catalogue.QUEUE_FULL.error(waiting=message.rstrip("."))
    return _from_message(complaint, model)


_CLOUD_OPTION = (
    "remove OLLAMA_NO_CLOUD from its environment, or set engine.no_cloud: false in plugin.yaml for a managed server"
)


def _sign_in(complaint: Complaint, model: str) -> AuthError:
    url = complaint.shape.get("signin_url")
    if isinstance(url, str) and url.startswith("https://") and url.isascii() and url.isprintable():
        return catalogue.SIGN_IN_REQUIRED.error(model=model or "it", server="ollama.com", url=url)
    return AuthError(
        f"the Ollama server requires a key or a sign-in ({complaint.message}). Run `ollama signin` on its machine, "
        "or set OLLAMA_API_KEY in the environment of the plugin and restart the plugin"
    )


def _missing(message: str, model: str) -> EnginePluginError:
    if model and "page not found" not in message:
        return catalogue.model_missing(model, pull="" if is_cloud_name(model) else model)
    return UnsupportedError(
        f"the Ollama server does not support this request ({message}). Upgrade it: https://ollama.com/download"
    )


def _from_message(complaint: Complaint, model: str) -> EnginePluginError:
    """Map by the message: the status is 500 for most errors, and missing inside a stream."""
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
            f"model: {model or 'it'} needs a newer Ollama. Upgrade the server: https://ollama.com/download, or call "
            "UpgradeEngine if this plugin installed it"
        )
    return complaint.error()
