"""What such servers complain about, in the shapes that they have, as our exceptions that say what to do."""

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
    """The server is there, and will answer when its model is in memory."""

    @classmethod
    def of(cls, title: str, complaint: Complaint) -> Self:
        """For what it says to that."""
        return cls(f"{title} is still loading its model ({complaint.message}). Try again in a moment")


def complaint_of_body(status: int, body: bytes) -> Complaint:
    """From an error's answer: `{"error": {"message"}}`, `{"error": "…"}`, `{"detail": …}`, `{"message"}`, or a text.

    Of an error's object only the message is told: some servers send the trace of their program along.
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
        if isinstance(value, list):  # FastAPI tells of each field
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
    """Whether the request has more tokens than the model takes."""
    named = (complaint.shape.get("code"), complaint.shape.get("type"))
    return any(code in _CONTEXT_CODES for code in named) or bool(_CONTEXT_WORDS.search(complaint.message.lower()))


def is_about_model(complaint: Complaint, model: str) -> bool:
    """Whether a complaint says that there is no such model."""
    if complaint.shape.get("code") == "model_not_found":
        return True
    words = complaint.message.lower()
    return complaint.status == 404 and bool(model) and ("model" in words or model.lower() in words)


def is_about_path(complaint: Complaint) -> bool:
    """Whether a complaint says that the server has no such call at all."""
    if complaint.status in (405, 501):
        return True
    plain = complaint.status == 404 and complaint.message in ("(nothing)", "Not Found")
    return plain or bool(_PATH_WORDS.search(complaint.message.strip()))


def is_about_loading(complaint: Complaint) -> bool:
    """Whether a server says that it is there, but not ready yet."""
    return complaint.status == 503 and "loading" in complaint.message.lower()


def other_error(complaint: Complaint) -> EnginePluginError:
    """The exception for what needs to know neither the server nor the request."""
    if _is_about_context(complaint):
        return catalogue.CONTEXT_EXCEEDED.error(said=complaint.message)
    if 300 <= complaint.status < 400:
        return BadGatewayError(
            f"the server answers {complaint.status}, a redirection, which is not followed: the key is for it alone. "
            "Name the address where it is: engine_host under provider in plugin.yaml"
        )
    if complaint.status in (408, 504):
        return DeadlineError(f"the server gave up: {complaint.message}")
    if complaint.status == 429:
        return UnavailableError(f"the server has had too many requests: {complaint.message}. Try again later")
    return complaint.error()
