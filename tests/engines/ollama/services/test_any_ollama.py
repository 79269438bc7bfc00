"""Services on the contract server and on a real Ollama (OLLAMA_TEST_HOST, OLLAMA_TEST_MODEL)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio

from engine_plugin.engines.ollama.address import ServerAddress
from engine_plugin.errors import ModelNotFoundError

from .conftest import ServiceClient
from .shapes import chat, data_of, facts_of, joined

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.engines.ollama.conftest import Ollama

SHORT = {"max_tokens": 8, "seed": 1, "temperature": 0}


@pytest_asyncio.fixture
async def there(any_ollama: Ollama) -> AsyncIterator[tuple[ServiceClient, str]]:
    """Service calls on a server, and its chat model."""
    address = ServerAddress.parse(any_ollama.url)
    asker = ServiceClient((address.host, address.port))
    yield asker, any_ollama.model
    asker.http.close()


async def test_chat_is_the_same_streamed_or_not(there: tuple[ServiceClient, str]) -> None:
    ask, model = there
    request = chat("Say hello.", model, stream_options={"include_usage": True}, **SHORT)
    whole = json.loads(await ask.call("chat", request))
    [choice] = whole["choices"]
    assert choice["message"]["content"]
    assert choice["finish_reason"] in ("stop", "length")
    assert whole["usage"]["prompt_tokens"] > 0
    assert 0 < whole["usage"]["completion_tokens"] <= 8
    assert whole["timings"]["predicted_per_second"] > 0
    events = await ask.collected("chat", request)
    assert joined(events) == choice["message"]["content"]
    assert data_of(events)[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert events.endswith(b"data: [DONE]\n\n")


async def test_native_chat_and_generate(there: tuple[ServiceClient, str]) -> None:
    ask, model = there
    native, request = facts_of(model, native=True), chat("Say hello.", model, options={"num_predict": 8, "seed": 1})
    whole = json.loads(await ask.call("chat", request, native))
    assert whole["done"] is True
    lines = data_of(await ask.collected("chat", request, native))
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1]["eval_count"] <= 8
    generated = json.loads(await ask.call("generate", {"model": model, "prompt": "One", "num_predict": 4}, native))
    assert generated["response"]


async def test_completion_and_json_format(there: tuple[ServiceClient, str]) -> None:
    ask, model = there
    request: dict[str, Any] = {"model": model, "prompt": ["One two", "Three"], **SHORT}
    whole = json.loads(await ask.call("generate", request))
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert all(choice["text"] for choice in whole["choices"])
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    whole = json.loads(await ask.call("chat", chat("A number as a", model, response_format=form, seed=1)))
    assert isinstance(json.loads(whole["choices"][0]["message"]["content"])["a"], int)


async def test_missing_model_is_reported(there: tuple[ServiceClient, str]) -> None:
    ask, _ = there
    with pytest.raises(ModelNotFoundError):
        await ask.call("chat", chat("hello", "nobody-has-this:1b"))
