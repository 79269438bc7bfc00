"""What a chat or a completion asks for, whatever the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["choices_wanted", "slots_needed"]


def choices_wanted(request: Mapping[str, Any]) -> int:
    """The number of choices that a chat or completion returns for each prompt."""
    count = request.get("n")
    return count if isinstance(count, int) and count > 0 else 1


def slots_needed(service: str, request: Mapping[str, Any]) -> int:
    """The number of a model's slots that the request takes: one for each prompt and choice."""
    if service not in ("chat", "generate"):
        return 1
    prompts = request.get("prompt") if service == "generate" else None
    texts = [prompt for prompt in prompts if not isinstance(prompt, int)] if isinstance(prompts, list) else ()
    return max(1, len(texts)) * choices_wanted(request)
