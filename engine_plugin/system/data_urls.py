"""Sound and pictures in JSON: bare base64, or a data: URL."""

from __future__ import annotations

__all__ = ["base64_start"]

_MAX_HEAD = 200


def base64_start(source: str) -> int:
    """The index at which the base64 begins: 0, or after the head of a data: URL.

    Raises ValueError for a data: URL in another encoding, with a message for people.
    """
    if not source.startswith("data:"):
        return 0
    head, comma, _ = source[:_MAX_HEAD].partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data: URL must be in base64, as in data:audio/wav;base64,…")
    return len(head) + 1
