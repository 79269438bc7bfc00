"""POST requests of JSON and of forms with a file. Subclasses send the request and read the answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from engine_plugin.transport.multipart import form_with_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["PostingClient"]

_JSON = "application/json"


class PostingClient(ABC):
    """A client of one server. Each method is a context with a successful answer whose head has arrived; leaving it
    before the answer was read to its end closes the connection, which stops the server's work.

    Errors of the server raise one of `errors`.
    """

    @abstractmethod
    def _posted(self, path: str, body: bytes, content_type: str) -> AbstractAsyncContextManager[HttpResponse]:
        """Send a body."""

    def post_json(self, path: str, body: bytes) -> AbstractAsyncContextManager[HttpResponse]:
        """Send JSON."""
        return self._posted(path, body, _JSON)

    def post_form(
        self, path: str, fields: Mapping[str, str], file: bytes, file_name: str
    ) -> AbstractAsyncContextManager[HttpResponse]:
        """Send a form with a file in its field `file`."""
        content_type, body = form_with_file(fields, file, file_name)
        return self._posted(path, body, content_type)
