"""Error answers of the embedded server: `{"error": {"message", "type", "code"}}`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.jsontext import write_json

if TYPE_CHECKING:
    from engine_plugin.errors import InvalidRequestError

__all__ = ["RequestError"]

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
_LONGEST = 2000
"""Characters of a message; many messages quote the request."""


class RequestError(Exception):
    """A request that cannot be answered: message, HTTP status, and type (by default one for the status).

    Raised by both processes, as InvalidRequestError is; a worker sends either in a frame. The message of a 400 begins
    with the field.
    """

    def __init__(self, message: str, status: int = 400, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        self.kind = kind or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> bytes:
        """The error as JSON, for an answer and for an event of a stream alike."""
        return write_json({"error": {"message": self.message, "type": self.kind, "code": self.status}})

    @classmethod
    def of(cls, error: InvalidRequestError | RequestError) -> RequestError:
        """The answer for either kind of error."""
        return error if isinstance(error, RequestError) else cls(str(error))
