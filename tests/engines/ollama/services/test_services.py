"""Services in both formats on the contract server, over real sockets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import InvalidRequestError, ModelNotFoundError, UnsupportedError

from .shapes import chat, data_of, facts_of, joined

if TYPE_CHECKING:
    from tests.engines.ollama.contract.handle import ContractServer

    from .conftest import ServiceClient

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
NATIVE = facts_of(native=True)


async def answer(ask: ServiceClient, service: str, request: dict[str, Any], **facts: Any) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads(await ask.call(service, request, facts_of(request["model"], **facts)))
    return shape


async def test_chat(ask: ServiceClient) -> None:
    got = await answer(ask, "chat", chat("hello there"))
    assert got["choices"][0]["message"] == {"role": "assistant", "content": "You said: hello there"}
    assert got["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert got["timings"]["predicted_per_second"] == 100


async def test_streamed_chat(ask: ServiceClient) -> None:
    request = chat("count 5", max_tokens=3, stream_options={"include_usage": True})
    events = await ask.collected("chat", request)
    assert events.endswith(b"\n\ndata: [DONE]\n\n")
    shapes = data_of(events)
    assert len({(shape["id"], shape["created"], shape["model"], shape["object"]) for shape in shapes}) == 1
    assert joined(events) == "1 2 3"
    assert shapes[-2]["choices"][0]["finish_reason"] == "length"
    assert shapes[-1]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert b'"usage"' not in await ask.collected("chat", chat("hello"))


async def test_streamed_native_chat(ask: ServiceClient) -> None:
    events = data_of(await ask.collected("chat", chat("hello there"), NATIVE))
    assert "".join(event["message"]["content"] for event in events) == "You said: hello there"
    assert [event["done"] for event in events] == [False] * 4 + [True]
    assert events[-1]["eval_count"] == 4


async def test_native_chat(ask: ServiceClient) -> None:
    got = await answer(ask, "chat", chat("hello there", temperature=0.5), native=True)
    assert got["message"] == {"role": "assistant", "content": "You said: hello there"}
    assert got["done"] is True
    assert got["eval_count"] == 4
    loaded = await answer(ask, "chat", {"model": "tiny-chat:latest", "messages": []}, native=True)
    assert loaded["done_reason"] == "load"


async def test_thinking_in_both_formats(ask: ServiceClient) -> None:
    thoughts, request = "The user wants words.", chat("hello", "think:8b")
    got = await answer(ask, "chat", request)
    assert got["choices"][0]["message"]["reasoning_content"] == thoughts
    assert joined(await ask.collected("chat", request), "reasoning_content") == thoughts
    native = await answer(ask, "chat", request, native=True)
    assert native["message"]["thinking"] == thoughts
    got = await answer(ask, "chat", request | {"reasoning_effort": "none"})
    assert got["choices"][0]["message"] == {"role": "assistant", "content": "You said: hello"}
    got = await answer(ask, "generate", {"model": "think:8b", "prompt": "hello"})
    assert got["choices"][0]["reasoning_content"] == thoughts
    assert got["choices"][0]["text"] == "You said: hello"


async def test_tools(ask: ServiceClient) -> None:
    request = chat("hello", "tools:7b", tools=[TOOL])
    got = await answer(ask, "chat", request, parameter_size="7.6B")
    [choice] = got["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (call["function"], choice["finish_reason"]) == ({"name": "look", "arguments": "{}"}, "tool_calls")
    conversation = [
        *request["messages"],
        choice["message"],
        {"role": "tool", "tool_call_id": call["id"], "content": "seen"},
    ]
    events = await ask.collected("chat", request | {"messages": conversation})
    assert "seen" in joined(events)
    [first] = [event["choices"][0]["delta"]["tool_calls"] for event in data_of(await ask.collected("chat", request))
               if "tool_calls" in event["choices"][0]["delta"]]  # fmt: skip
    assert first == [{"index": 0} | call]
    with pytest.raises(InvalidRequestError, match="does not support tools"):
        await ask.call("chat", chat("hello", tools=[TOOL]))


async def test_images_json_and_logprobs(ask: ServiceClient) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    got = await answer(ask, "chat", chat([{"type": "text", "text": "see"}, picture], "vision:7b"))
    assert got["choices"][0]["message"]["content"] == "You said: see (1 image)"
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    got = await answer(ask, "chat", chat("hello", response_format=form))
    assert json.loads(got["choices"][0]["message"]["content"]) == {"a": 7}
    request = chat("count 2", logprobs=True, top_logprobs=2)
    got = await answer(ask, "chat", request)
    tokens = got["choices"][0]["logprobs"]["content"]
    assert [(token["token"], len(token["top_logprobs"])) for token in tokens] == [("1", 2), (" 2", 2)]
    streamed = [event["choices"][0]["logprobs"] for event in data_of(await ask.collected("chat", request))]
    assert [token for each in streamed if each for token in each["content"]] == tokens


async def test_several_choices(ask: ServiceClient) -> None:
    request = chat("count 3", n=2, seed=0, stream_options={"include_usage": True})
    got = await answer(ask, "chat", request)
    texts = [choice["message"]["content"] for choice in got["choices"]]
    assert texts == ["1 2 3", "2 3 1"]
    assert got["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    events = await ask.collected("chat", request)
    assert [joined(events, index=index) for index in range(2)] == texts
    assert data_of(events)[-1]["usage"] == got["usage"]
    assert events.count(b"[DONE]") == 1


async def test_generate(ask: ServiceClient) -> None:
    request = {"model": "tiny-chat:latest", "prompt": ["count 2", "say so"], "stop": "never"}
    got = await answer(ask, "generate", request)
    assert [choice["text"] for choice in got["choices"]] == ["1 2", "so"]
    events = await ask.collected("generate", request)
    assert [joined(events, "text", index) for index in range(2)] == ["1 2", "so"]
    request = {"model": "tools:7b", "prompt": "a b", "suffix": "c d"}
    assert (await answer(ask, "generate", request))["choices"][0]["text"] == "b joins c"
    native = await answer(ask, "generate", request, native=True)
    assert native["response"] == "b joins c"
    assert native["context"]
    lines = data_of(await ask.collected("generate", request, facts_of("tools:7b", native=True)))
    assert "".join(each["response"] for each in lines) == "b joins c"


async def test_embed(ask: ServiceClient) -> None:
    request: dict[str, Any] = {"model": "embed:latest", "input": ["a b", ""]}
    got = await answer(ask, "embed", request)
    native = await answer(ask, "embed", request, native=True)
    assert [entry["embedding"] for entry in got["data"]] == native["embeddings"]
    assert got["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    short = await answer(ask, "embed", request | {"input": "a", "dimensions": 8})
    assert len(short["data"][0]["embedding"]) == 8
    with pytest.raises(UnsupportedError, match="does not stream"):
        await ask.collected("embed", request)


async def test_missing_model_is_reported_with_its_pull(ask: ServiceClient) -> None:
    for service, request in (
        ("chat", chat("hello", "missing:latest")),
        ("generate", {"model": "missing:latest", "prompt": "a"}),
        ("embed", {"model": "missing:latest", "input": "a"}),
    ):
        with pytest.raises(ModelNotFoundError) as caught:
            await ask.call(service, request)
        assert caught.value.pull == "missing:latest"


async def test_requests_match_the_contract(ask: ServiceClient, server: ContractServer) -> None:
    facts = facts_of("think:8b", "completion", "thinking", num_ctx=4096)
    await ask.call("chat", chat("unlike any other", "think:8b", think="low", keep_alive="-1", max_tokens=2), facts)
    [body] = [body for body in server.bodies("/api/chat") if "unlike any other" in str(body)]
    assert body == {
        "model": "think:8b",
        "messages": [{"role": "user", "content": "unlike any other"}],
        "stream": True,
        "think": "low",
        "options": {"num_predict": 2, "num_ctx": 4096},
        "keep_alive": -1,
    }
