"""Maps the error answers of servers, in all their formats, to exceptions."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from engine_plugin import catalogue
from engine_plugin.errors import BadGatewayError, DeadlineError, EnginePluginError, UnavailableError
from engine_plugin.transport.answers import Complaint

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

__all__ = [
    "StillLoadingError",
    "complaint_of_body",
    "is_about_loading",
    "is_about_model",
    "is_about_path",
    "other_error",
]

_SHOWN = 500
_CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error")
_CONTEXT_WORDS = re.compile(
    r"maximum context length|context (?:size|window|length) (?:is )?exceed|exceeds? the .{0,30}context"
)
_PATH_WORDS = re.compile(
    r"^(?:not found|method not allowed|file not found|404 page not found)$|unexpected endpoint", re.IGNORECASE
)
_HTML = re.compile(rb"\s*<(?:!doctype|html)", re.IGNORECASE)


class StillLoadingError(UnavailableError):
    """The server answers, but is still loading its model."""

    @classmethod
    def of(cls, title: str, complaint: Complaint) -> Self:
        return cls(f"{title} is still loading its model ({complaint.message}). Try again in a moment")


def complaint_of_body(status: int, body: bytes) -> Complaint:
    """Parse an error answer: `{"error": {"message"}}`, `{"error": "…"}`, `{"detail": …}`, `{"message"}` or text.

    Of an error object only the message is shown, because some servers include a stack trace.
    """
    try:
        shape = json.loads(body)
    except (ValueError, RecursionError):
        page = "" if _HTML.match(body) else body[:_SHOWN].decode("utf-8", "replace").strip()
        return Complaint(status, page or "(nothing)")
    if not isinstance(shape, dict):
        return Complaint(status, str(shape)[:_SHOWN])
    error = shape.get("error", shape)
    if not isinstance(error, dict):
        return Complaint(status, str(error)[:_SHOWN] or "(nothing)", shape)
    return Complaint(status, _words(error) or "(nothing)", error)


def _words(error: Mapping[str, Any]) -> str:
    for name in ("message", "detail", "error", "type"):
        value = error.get(name)
        if isinstance(value, list):  # FastAPI lists the invalid fields
            value = "; ".join(_field_words(item) for item in value[:5])
        if value:
            return str(value)[:_SHOWN]
    return ""


def _field_words(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)[:_SHOWN]
    place = ".".join(str(step) for step in item.get("loc") or () if step != "body")
    return f"{place}: {item.get('msg', 'is wrong')}" if place else str(item.get("msg", "is wrong"))


def _is_about_context(complaint: Complaint) -> bool:
    """Whether the request exceeds the context length of the model."""
    named = (complaint.shape.get("code"), complaint.shape.get("type"))
    return any(code in _CONTEXT_CODES for code in named) or bool(_CONTEXT_WORDS.search(complaint.message.lower()))


def is_about_model(complaint: Complaint, model: str) -> bool:
    """Whether the error is a missing model."""
    if complaint.shape.get("code") == "model_not_found":
        return True
    words = complaint.message.lower()
    return complaint.status == 404 and bool(model) and ("model" in words or model.lower() in words)


def is_about_path(complaint: Complaint) -> bool:
    """Whether the error is a missing endpoint."""
    if complaint.status in (405, 501):
        return True
    plain = complaint.status == 404 and complaint.message in ("(nothing)", "Not Found")
    return plain or bool(_PATH_WORDS.search(complaint.message.strip()))


def is_about_loading(complaint: Complaint) -> bool:
    """Whether the error is that the server is loading its model."""
    return complaint.status == 503 and "loading" in complaint.message.lower()


def other_error(complaint: Complaint) -> EnginePluginError:
    """The exception for an error that depends on neither the server nor the request."""
    if _is_about_context(complaint):
        return catalogue.CONTEXT_EXCEEDED.error(said=complaint.message)
    if 300 <= complaint.status < 400:
        return BadGatewayError(
            f"the server answers {complaint.status}, a redirection, which is not followed, to protect the key. "
            "Set its real address: engine_host under provider in plugin.yaml"
        )
    if complaint.status in (408, 504):
        return DeadlineError(f"the server reported a timeout: {complaint.message}")
    if complaint.status == 429:
        return UnavailableError(f"the server limits requests: {complaint.message}. Try again later")
    return complaint.error()
