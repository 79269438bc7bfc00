"""Maps the error answers of servers, in all their formats, to exceptions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from engine_plugin import catalogue
from engine_plugin.errors import BadGatewayError, DeadlineError, EnginePluginError, UnavailableError

if TYPE_CHECKING:
    from typing import Self

    from engine_plugin.transport.answers import Complaint

__all__ = [
    "StillLoadingError",
    "is_about_loading",
    "is_about_model",
    "is_about_path",
    "other_error",
]

_CONTEXT_CODES = ("context_length_exceeded", "exceed_context_size_error")
_CONTEXT_WORDS = re.compile(
    r"maximum context length|context (?:size|window|length) (?:is )?exceed|exceeds? the .{0,30}context"
)
_PATH_WORDS = re.compile(
    r"^(?:not found|method not allowed|file not found|404 page not found)$|unexpected endpoint", re.IGNORECASE
)


class StillLoadingError(UnavailableError):
    """The server answers, but is still loading its model."""

    @classmethod
    def of(cls, title: str, complaint: Complaint) -> Self:
        return cls(f"{title} is still loading its model ({complaint.message}). Try again in a moment")


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
    return bool(_PATH_WORDS.search(complaint.message.strip()))


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
