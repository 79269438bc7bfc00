"""A conversation between a host and an engine: messages checked, kept for a replay, and failures seen early.

`Plugin.converse` uses these to pull a missing model before the host sees an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine_plugin.errors import EnginePluginError
from engine_plugin.services import CONVERSATION_VALIDATORS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence

    from engine_plugin.messages import ConversationMessage

__all__ = ["MOST_KEPT", "Replayable", "checked", "opening", "resumed"]

MOST_KEPT = 64
"""Messages that are kept for a replay; a longer conversation cannot be replayed."""


async def checked(
    service_name: str, messages: AsyncIterator[ConversationMessage]
) -> AsyncGenerator[ConversationMessage, None]:
    """Yield the messages. Raises InvalidRequestError at the first that no engine could understand."""
    validator = CONVERSATION_VALIDATORS.get(service_name)
    async for message in messages:
        if validator is not None:
            validator.check(message.data, message.message_type, message.metadata)
        yield message


class Replayable:
    """Messages that an engine can be given a second time until `forget` is called."""

    def __init__(self, messages: AsyncIterator[ConversationMessage]) -> None:
        self._messages = messages
        self._kept: list[ConversationMessage] | None = []
        """None when there were too many to keep."""
        self._replay: Iterator[ConversationMessage] = iter(())

    def __aiter__(self) -> AsyncIterator[ConversationMessage]:
        return self

    async def __anext__(self) -> ConversationMessage:
        if (message := next(self._replay, None)) is not None:
            return message
        message = await anext(self._messages)
        if self._kept is not None:
            self._kept = [*self._kept, message] if len(self._kept) < MOST_KEPT else None
        return message

    def rewind(self) -> bool:
        """Start again at the first message; False when there were too many to keep."""
        self._replay = iter(self._kept or ())
        return self._kept is not None

    def forget(self) -> None:
        """Keep no further messages, and drop those that are kept."""
        self._kept = None


async def opening(
    service_name: str, answers: AsyncIterator[ConversationMessage]
) -> tuple[list[ConversationMessage], EnginePluginError | None]:
    """Return the engine's first answers, and the error if they end in one.

    An answer that only announces a failure is not the last one of the opening: the error follows it.
    """
    validator = CONVERSATION_VALIDATORS.get(service_name)
    first: list[ConversationMessage] = []
    try:
        async for answer in answers:
            first.append(answer)
            if validator is None or not validator.tells_failure(answer.data):
                break
    except EnginePluginError as error:
        return first, error
    return first, None


async def resumed(
    first: Sequence[ConversationMessage],
    failure: EnginePluginError | None,
    answers: AsyncIterator[ConversationMessage],
) -> AsyncGenerator[ConversationMessage, None]:
    """Yield what `opening` took, then its error or the rest of the answers."""
    for answer in first:
        yield answer
    if failure is not None:
        raise failure
    async for answer in answers:
        yield answer
