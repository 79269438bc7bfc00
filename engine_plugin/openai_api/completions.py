"""Log probabilities in OpenAI's completions format, which several servers send in the chat format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError
from engine_plugin.transport import sse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

__all__ = ["CompletionLogprobs", "wants_logprobs"]


def wants_logprobs(service: str, request: Mapping[str, Any]) -> bool:
    """Whether a request's answer has log probabilities in the completions format."""
    asked = request.get("logprobs")
    return service == "generate" and isinstance(asked, int) and not isinstance(asked, bool)


class CompletionLogprobs:
    """Converts the log probabilities of one answer, piece by piece.

    `most`: the candidates that the request asks for.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._offsets: dict[int, int] = {}

    def of(self, entries: Sequence[Mapping[str, Any]], index: int = 0) -> dict[str, Any]:
        """The completions format for the next tokens of a choice; `entries` have the chat format."""
        offset = self._offsets.get(index, 0)
        offsets: list[int] = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry["token"])
        self._offsets[index] = offset
        tops = [(entry.get("top_logprobs") or ())[: self._most] for entry in entries]
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in candidates} for candidates in tops],
            "text_offset": offsets,
        }

    def reshape(self, shape: dict[str, Any]) -> dict[str, Any]:
        """Convert the choices of an answer, or of an event, to the completions format. Raises BadGatewayError."""
        try:
            for place, choice in enumerate(shape.get("choices") or ()):
                logprobs = choice.get("logprobs")
                if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
                    choice["logprobs"] = self.of(logprobs["content"], choice.get("index", place))
        except (AttributeError, KeyError, TypeError) as error:
            raise BadGatewayError(f"the engine's log probabilities are not understood: {error!r}") from error
        return shape

    async def stream(self, blocks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """Yield blocks of whole events in the completions format."""
        async for block in blocks:
            events = b"".join(sse.event_of(self.reshape(shape)) for shape in sse.event_data(block))
            yield events + (sse.DONE if sse.after_done(block) >= 0 else b"")
