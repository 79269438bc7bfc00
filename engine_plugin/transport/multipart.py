"""Forms with a file (multipart/form-data, RFC 7578), the upload format for recordings."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["form_with_file"]


def form_with_file(fields: Mapping[str, str], file: bytes, file_name: str) -> tuple[str, bytes]:
    """The content type and body of a form with the file in its field `file`. Names must need no escapes."""
    boundary = secrets.token_hex(16)  # no value contains 128 random bits
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{file_name}"\r\n'
    parts += [head.encode(), b"Content-Type: application/octet-stream\r\n\r\n", file, b"\r\n"]
    return f"multipart/form-data; boundary={boundary}", b"".join([*parts, f"--{boundary}--\r\n".encode()])
