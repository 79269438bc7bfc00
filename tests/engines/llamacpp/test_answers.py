"""The plugin's answers equal those of llama.cpp."""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.errors import (
    EnginePluginError,
    InvalidRequestError,
    ModelNotFoundError,
    ServiceNotFoundError,
    UnsupportedError,
)
from engine_plugin.host import events as events_of

from .running import HELLO

if TYPE_CHECKING:
    from .running import RunningPlugin

pytestmark = pytest.mark.asyncio(loop_scope="module")

STEADY: dict[str, Any] = {"temperature": 0, "seed": 1, "cache_prompt": False}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "the weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without the fields that differ between calls."""
    for key in ("id", "created", "timings"):
        assert answer.pop(key)
    for choice in answer["choices"]:
        for call in choice.get("message", {}).get("tool_calls", ()):
            assert call.pop("id")
    return answer


def asking(**fields: Any) -> dict[str, Any]:
    return HELLO | STEADY | fields


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(asking(), id="plain"),
        pytest.param(asking(tools=[WEATHER]), id="tools"),
        pytest.param(asking(tools=[WEATHER, TIME], parallel_tool_calls=True), id="two tools"),
        pytest.param(asking(logprobs=True, top_logprobs=2, max_tokens=5), id="logprobs"),
        pytest.param(asking(stop=["tiny"]), id="stop"),
        pytest.param(asking(max_tokens=3), id="max_tokens"),
        pytest.param(asking(ignore_eos=True, max_tokens=40), id="ignore_eos"),
        pytest.param(asking(logit_bias=[["Hello", False]], max_tokens=20), id="logit_bias"),
        pytest.param(
            asking(
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, max_tokens=60
            ),
            id="json_schema",
        ),
        pytest.param(asking(grammar='root ::= "yes" | "no"'), id="grammar"),
        pytest.param(asking(stream=True), id="a unary call that says stream"),
        pytest.param(asking(stream_options={"include_usage": False}), id="stream_options"),
    ],
)
async def test_chat_answer_equals_the_engines(shared: RunningPlugin, request_: dict[str, Any]) -> None:
    ours = await shared.client.invoke("chat", request_)
    asked = {key: value for key, value in request_.items() if key != "stream_options"} | {"stream": False}
    theirs = await shared.direct("tiny-chat-gguf", "/v1/chat/completions", asked)
    assert comparable(ours) == comparable(theirs)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"prompt": "Once"}, id="plain"),
        pytest.param({"prompt": [1, 2, 3]}, id="tokens"),
        pytest.param({"prompt": ["a", 5]}, id="text and tokens"),
        pytest.param({"prompt": "Once", "stop": "e"}, id="stop"),
        pytest.param({"prompt": ["Once"]}, id="a list of one"),
        pytest.param({"prompt": ""}, id="empty"),
    ],
)
async def test_completion_answer_equals_the_engines(shared: RunningPlugin, fields: dict[str, Any]) -> None:
    body = STEADY | {"max_tokens": 6} | fields
    ours = await shared.client.invoke("generate", body)
    theirs = await shared.direct("tiny-chat-gguf", "/v1/completions", body | {"stream": False})
    assert comparable(ours) == comparable(theirs)


async def test_unknown_fields_reach_the_engine(shared: RunningPlugin) -> None:
    """Without them the model would stop after 8 tokens, not 40."""
    answer = await shared.client.invoke("chat", asking(ignore_eos=True, max_tokens=40, n_probs=0))
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_choices_share_their_prompt(shared: RunningPlugin) -> None:
    """llama.cpp's own usage counts only the first choice."""
    one = await shared.client.invoke("chat", asking(max_tokens=5))
    two = await shared.client.invoke("chat", asking(max_tokens=5, n=2))
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert {choice["message"]["content"] for choice in two["choices"]} == {one["choices"][0]["message"]["content"]}
    prompt = one["usage"]["prompt_tokens"]
    usage = two["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (prompt, 10, prompt + 10)


async def test_usage_counts_all_prompts(shared: RunningPlugin) -> None:
    prompts = ["Once", "upon a time", "there"]
    alone = [await shared.client.invoke("generate", STEADY | {"prompt": text, "max_tokens": 4}) for text in prompts]
    together = await shared.client.invoke("generate", STEADY | {"prompt": prompts, "max_tokens": 4})
    assert [choice["text"] for choice in together["choices"]] == [one["choices"][0]["text"] for one in alone]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][count] == sum(one["usage"][count] for one in alone)
    twice = await shared.client.invoke("generate", STEADY | {"prompt": prompts[:2], "max_tokens": 4, "n": 2})
    assert len(twice["choices"]) == 4
    assert twice["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in alone[:2])
    assert twice["usage"]["completion_tokens"] == 16


async def test_more_choices_than_slots_are_rejected(shared: RunningPlugin) -> None:
    with pytest.raises(InvalidRequestError, match="request_data: the engine refuses it"):
        await shared.client.invoke("chat", asking(n=50))


async def test_the_tiny_model_calls_tools(shared: RunningPlugin) -> None:
    answer = await shared.client.invoke("chat", asking(tools=[WEATHER]))
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    assert "city" in json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])


async def test_tool_choice_none_hides_the_tools(shared: RunningPlugin) -> None:
    """llama.cpp would still render them into the prompt."""
    without = await shared.client.invoke("chat", asking())
    answer = await shared.client.invoke("chat", asking(tools=[WEATHER], tool_choice="none"))
    assert comparable(answer) == comparable(without)


async def test_tool_choice_names_a_tool(shared: RunningPlugin) -> None:
    named = {"type": "function", "function": {"name": "get_time"}}
    answer = await shared.client.invoke("chat", asking(tools=[WEATHER, TIME], tool_choice=named))
    calls = answer["choices"][0]["message"]["tool_calls"]
    assert {call["function"]["name"] for call in calls} == {"get_time"}


@pytest.mark.parametrize("tools", [[WEATHER], [], None])
async def test_tool_choice_of_an_unknown_tool_is_rejected(shared: RunningPlugin, tools: Any) -> None:
    named = {"type": "function", "function": {"name": "nope"}}
    with pytest.raises(InvalidRequestError, match=r"^tool_choice: .*'nope'"):
        await shared.client.invoke("chat", asking(tools=tools, tool_choice=named))


async def test_embeddings_equal_the_engines(shared: RunningPlugin) -> None:
    answer = await shared.client.invoke("embed", {"input": ["one", "two"]})
    theirs = await shared.direct("tiny-embed-gguf", "/v1/embeddings", {"input": ["one", "two"]})
    assert answer["data"] == theirs["data"]
    assert [len(item["embedding"]) for item in answer["data"]] == [64, 64]
    assert sum(x * x for x in answer["data"][0]["embedding"]) == pytest.approx(1, abs=1e-3)
    plain = await shared.client.invoke("embed", {"input": "one", "dimensions": 64})
    assert plain["data"][0]["embedding"] == pytest.approx(answer["data"][0]["embedding"], abs=1e-5)
    packed = await shared.client.invoke("embed", {"input": "one", "encoding_format": "base64"})
    numbers = struct.unpack("<64f", base64.b64decode(packed["data"][0]["embedding"]))
    assert numbers == pytest.approx(plain["data"][0]["embedding"], abs=1e-6)


@pytest.mark.parametrize("encoding", ["float", "base64"])
async def test_unsupported_dimensions_are_rejected(shared: RunningPlugin, encoding: str) -> None:
    """llama.cpp ignores the field, so the vectors would not fit the caller's index."""
    with pytest.raises(InvalidRequestError, match=r"^dimensions: this model has 64"):
        await shared.client.invoke("embed", {"input": "a", "dimensions": 32, "encoding_format": encoding})


async def test_text_as_long_as_the_context_is_embedded(shared: RunningPlugin) -> None:
    """With llama.cpp's defaults it exceeds a physical batch and fails with 500."""
    answer = await shared.client.invoke("embed", {"input": "a " * 250})
    assert answer["usage"]["prompt_tokens"] > 200
    with pytest.raises(InvalidRequestError, match=r"request_data: .*too large to process"):
        await shared.client.invoke("embed", {"input": "a " * 3000})


async def test_rerank_sorts_documents(shared: RunningPlugin) -> None:
    documents = ["a cat", {"text": "a dog"}, "a house"]
    whole = await shared.client.invoke("rerank", {"query": "cat", "documents": documents})
    scores = [result["relevance_score"] for result in whole["results"]]
    assert sorted(result["index"] for result in whole["results"]) == [0, 1, 2]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 1 for score in scores)
    assert all("document" not in result for result in whole["results"])
    best = await shared.client.invoke(
        "rerank", {"query": "cat", "documents": documents, "top_n": 1, "return_documents": True}
    )
    [first] = best["results"]
    assert first["index"] == whole["results"][0]["index"]
    text = documents[first["index"]]
    assert first["document"] == {"text": text["text"] if isinstance(text, dict) else text}


async def test_empty_lists_need_no_engine(shared: RunningPlugin) -> None:
    assert (await shared.client.invoke("embed", {"input": []}))["data"] == []
    assert (await shared.client.invoke("rerank", {"query": "a", "documents": []}))["results"] == []


@pytest.mark.parametrize(
    ("service", "request_", "error", "message"),
    [
        (
            "embed",
            HELLO | {"input": "a", "model": "tiny-chat-gguf"},
            InvalidRequestError,
            r"^model: tiny-chat-gguf is a model",
        ),
        (
            "chat",
            HELLO | {"model": "tiny-embed-gguf"},
            InvalidRequestError,
            "^model: tiny-embed-gguf is a model for embed",
        ),
        (
            "generate",
            {"prompt": "a", "model": "tiny-rerank-gguf"},
            InvalidRequestError,
            "^model: tiny-rerank-gguf is a model",
        ),
        ("rerank", {"query": "a", "documents": ["b"], "model": "tiny-embed-gguf"}, InvalidRequestError, "^model: "),
        ("chat", HELLO | {"model": "tiny-chap"}, ModelNotFoundError, "Did you mean tiny-chat-gguf"),
        ("chat", HELLO | {"model": "../../etc/passwd"}, ModelNotFoundError, "^model: "),
        ("chat", HELLO | {"model": 5}, InvalidRequestError, "^model: must be a string"),
        ("chat", HELLO | {"temperature": "hot"}, InvalidRequestError, "^request_data: the engine refuses it"),
        ("generate", {"prompt": "word " * 9000}, InvalidRequestError, "engine.context_length"),
        ("nope", HELLO, ServiceNotFoundError, "nope"),
    ],
)
async def test_unanswerable_request_is_rejected_with_the_reason(
    shared: RunningPlugin, service: str, request_: dict[str, Any], error: type[EnginePluginError], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        await shared.client.invoke(service, request_)
    assert raised.type is error


async def test_embeddings_do_not_stream(shared: RunningPlugin) -> None:
    with pytest.raises(UnsupportedError, match=r"^service_name: embed does not stream"):
        async with shared.client.stream("embed", {"input": "a"}) as chunks:
            await anext(chunks)


@pytest.mark.promise("S13")
async def test_log_probabilities_of_a_completion_have_its_format(shared: RunningPlugin) -> None:
    for asked, most in ((2, 2), (0, 0)):
        request = {"prompt": "one two", "max_tokens": 3, "logprobs": asked} | STEADY
        (choice,) = (await shared.client.invoke("generate", request))["choices"]
        told = choice["logprobs"]
        assert told.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
        assert "".join(told["tokens"]) == choice["text"]
        assert [len(top) for top in told["top_logprobs"]] == [most] * 3
    async with shared.client.stream("generate", request | {"logprobs": 1}) as chunks:
        events = [event async for event in events_of(chunks)]
    streamed = [event["choices"][0]["logprobs"] for event in events if event["choices"][0].get("logprobs")]
    assert [text for part in streamed for text in part["tokens"]] == told["tokens"]
    assert [place for part in streamed for place in part["text_offset"]] == told["text_offset"]


@pytest.mark.promise("S13")
@pytest.mark.parametrize("ignored", [{"suffix": "x"}, {"echo": True}, {"best_of": 2}])
async def test_completion_fields_that_llama_cpp_ignores_are_rejected(
    shared: RunningPlugin, ignored: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{next(iter(ignored))}: "):
        await shared.client.invoke("generate", {"prompt": "a", "max_tokens": 1} | ignored)
    nothing = {"suffix": "", "echo": False, "best_of": 1}
    await shared.client.invoke("generate", {"prompt": "a", "max_tokens": 1} | nothing)


@pytest.mark.promise("S11")
@pytest.mark.parametrize(
    ("service", "body"),
    [
        ("chat", b'{"messages":[{"role":"user","content":"%b"}],"max_tokens":1}'),
        ("generate", b'{"prompt":["%b","a"],"max_tokens":1}'),
        ("embed", b'{"input":["%b"]}'),
        ("rerank", b'{"query":"%b","documents":["%b"]}'),
    ],
)
async def test_unpaired_surrogate_becomes_the_replacement_character(
    shared: RunningPlugin, service: str, body: bytes
) -> None:
    """JSON can escape half a surrogate pair, which UTF-8 cannot encode."""
    await shared.client.invoke(service, body.replace(b"%b", rb"a\ud83d"))
