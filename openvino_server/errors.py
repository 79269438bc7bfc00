"""What the embedded server refuses, and how it says so: `{"error": {"message", "type", "code"}}`."""

from __future__ import annotations

from typing import Any

from engine_plugin.jsontext import write_json

__all__ = ["ApiError", "bad_request", "error_body"]

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_LONGEST = 2000
"""Characters of a message: most quote what was sent."""


class ApiError(Exception):
    """An answer that is an error: HTTP status, a word for its type, and what to do about it."""

    def __init__(self, status: int, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        self.kind = kind or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> bytes:
        """The error as JSON, for an answer and for an event of a stream alike."""
        return error_body(self.status, self.message, self.kind)


def bad_request(field: str, complaint: str) -> ApiError:
    """A 400 that names the field and how to fix it."""
    return ApiError(400, f"{field}: {complaint}")


def error_body(status: int, message: str, kind: str) -> bytes:
    """See `ApiError.body`."""
    error: dict[str, Any] = {"message": message, "type": kind, "code": status}
    return write_json({"error": error})
