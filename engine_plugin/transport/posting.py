"""POST requests of JSON and of forms with a file. Subclasses send the request and read the answer."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.transport.http1 import HttpResponse

__all__ = ["PostingClient"]


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
        return self._posted(path, body, "application/json")

    def post_form(
        self, path: str, fields: Mapping[str, str], file: bytes, file_name: str
    ) -> AbstractAsyncContextManager[HttpResponse]:
        """Send a form (multipart/form-data, RFC 7578) with a file in its field `file`. Names must need no escapes."""
        boundary = os.urandom(16).hex()  # no value contains 128 random bits
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
            for name, value in fields.items()
        ]
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{file_name}"\r\n'
        parts += [head.encode(), b"Content-Type: application/octet-stream\r\n\r\n", file, b"\r\n"]
        body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
        return self._posted(path, body, f"multipart/form-data; boundary={boundary}")
