"""The messages of a conversation, as the plugin's parts pass them on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ConversationMessage"]


@dataclass(frozen=True, slots=True)
class ConversationMessage:
    """One message of a conversation. `message_type` is "text" or "binary"."""

    data: bytes
    message_type: str = "text"
    metadata: Mapping[str, str] = field(default_factory=dict)
