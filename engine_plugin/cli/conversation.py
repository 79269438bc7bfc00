"""A conversation with a chat model: builds the requests and parses the events of the answers. Prints nothing."""

from __future__ import annotations

import base64
import mimetypes
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine_plugin.errors import BadGatewayError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from engine_plugin.host import PluginClient
    from engine_plugin.manifest import ServiceSpec

__all__ = ["SERVICE", "ChatParameters", "Conversation", "Picture", "Piece", "piece_of"]

SERVICE = "chat"
"""The service that answers."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of a message: file name and content."""

    name: str
    data: bytes


@dataclass(slots=True)
class ChatParameters:
    """Parameters of the requests; None leaves a parameter to the plugin and its model.

    `think` enables or disables thinking in models that support it.
    """

    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    think: bool | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """The content of one event of an answer. `finish` is the finish reason, "" before the end."""

    thinking: str = ""
    text: str = ""
    finish: str = ""


@dataclass
class Conversation:
    """The messages so far, in the service's flavor of JSON."""

    spec: ServiceSpec
    settings: ChatParameters
    timeout: float | None = None
    """Seconds for an answer; None leaves the deadline to the plugin."""
    _history: list[dict[str, Any]] = field(default_factory=list)

    def request(self, prompt: str, pictures: Sequence[Picture] = ()) -> dict[str, Any]:
        """Return the request for `prompt` as the next message; the conversation itself is unchanged."""
        settings = self.settings
        system = [{"role": "system", "content": settings.system}] if settings.system else []
        request: dict[str, Any] = {"messages": [*system, *self._history, self._message(prompt, pictures)]}
        if settings.model:
            request["model"] = settings.model
        if settings.think is not None:
            # `think` is the engine's option; most chat templates read `enable_thinking`.
            request |= {"think": settings.think, "chat_template_kwargs": {"enable_thinking": settings.think}}
        limits = {
            "num_predict" if self.spec.native else "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        }
        given = {name: value for name, value in limits.items() if value is not None}
        if self.spec.native:
            request |= {"options": given} if given else {}
        else:
            request |= given
        return request

    async def answer(
        self, client: PluginClient, prompt: str, pictures: Sequence[Picture] = ()
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Send the prompt and yield the events of the answer as they arrive.

        The whole answer is one event if the service does not stream. Closing the iterator (`contextlib.aclosing`) or
        cancelling the task stops the engine's work.
        """
        from engine_plugin.host import events

        request = self.request(prompt, pictures)
        if not self.spec.capabilities.support_streaming:
            yield await client.invoke(SERVICE, request, timeout=self.timeout)
            return
        async with client.stream(SERVICE, request | {"stream": True}, timeout=self.timeout) as chunks:
            async for event in events(chunks):
                yield event

    def keep(self, prompt: str, pictures: Sequence[Picture], text: str) -> None:
        """Add a turn: the prompt and the text of the answer, without its thinking."""
        self._history += [self._message(prompt, pictures), {"role": "assistant", "content": text}]

    def clear(self) -> None:
        """Remove all messages; the settings stay."""
        self._history.clear()

    def _message(self, prompt: str, pictures: Sequence[Picture]) -> dict[str, Any]:
        if not pictures:
            return {"role": "user", "content": prompt}
        if self.spec.native:
            return {"role": "user", "content": prompt, "images": [_base64(picture) for picture in pictures]}
        parts = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def piece_of(event: Mapping[str, Any]) -> Piece:
    """Parse an event of either flavor. Raises BadGatewayError for an error event or an invalid one."""
    if error := event.get("error"):
        reason = error.get("message") if isinstance(error, dict) else error
        raise BadGatewayError(f"the answer ended early: {reason or 'the engine gave no reason'}")
    try:
        if "message" in event:
            message, finish = event["message"], event.get("done_reason") if event.get("done") else ""
        else:
            choice = (event.get("choices") or [{}])[0]
            message, finish = choice.get("delta") or choice.get("message") or {}, choice.get("finish_reason")
        thinking = next(
            (message[key] for key in ("thinking", "reasoning_content", "reasoning") if message.get(key)), ""
        )
        return Piece(str(thinking), str(message.get("content") or ""), str(finish or ""))
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise BadGatewayError("the answer contains an invalid event") from error


def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.data).decode()


def _data_url(picture: Picture) -> str:
    kind = mimetypes.guess_type(picture.name)[0] or "image/png"
    return f"data:{kind};base64,{_base64(picture)}"
