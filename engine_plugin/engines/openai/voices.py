"""Speech on servers that do not all have OpenAI's whole form."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from engine_plugin.engines.openai.client import ApiClient
    from engine_plugin.speech.services import Answer

__all__ = ["AudioClient"]


class AudioClient:
    """A client for `Speech` that asks for segments, and for the text alone where the server refuses these.

    `plain` has the models of which that is known; it is added to.
    """

    def __init__(self, client: ApiClient, details: Mapping[str, str], plain: set[str]) -> None:
        self._client = client
        self._details = details
        self._plain = plain

    def post_json(self, path: str, body: bytes) -> AbstractAsyncContextManager[Answer]:
        """Send JSON."""
        return self._client.post_json(path, body)

    @asynccontextmanager
    async def post_form(
        self, path: str, fields: Mapping[str, str], file: bytes, file_name: str
    ) -> AsyncIterator[Answer]:
        """Send a recording. A form that is refused is sent again without its details: nothing was computed."""
        model = fields.get("model", "")
        async with AsyncExitStack() as stack:
            answer = None
            if model not in self._plain:
                whole = {**fields, **self._details}
                try:
                    answer = await stack.enter_async_context(self._client.post_form(path, whole, file, file_name))
                except InvalidRequestError:  # of the details or of something else: a form without them will tell
                    pass
            if answer is None:
                plain = {name: fields[name] for name in fields if not name.startswith("timestamp_granularities")}
                plain["response_format"] = "json"
                answer = await stack.enter_async_context(self._client.post_form(path, plain, file, file_name))
                self._plain.add(model)
            yield answer
