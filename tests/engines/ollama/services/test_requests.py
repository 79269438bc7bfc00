"""Conversion of OpenAI's requests, and completion of native ones."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.ollama.requests import single_requests, upstream_request
from engine_plugin.errors import InvalidRequestError

from .shapes import chat, facts_of

if TYPE_CHECKING:
    from engine_plugin.engines.ollama.models import ModelFacts


def sent(service: str, request: dict[str, Any], facts: ModelFacts | None = None) -> dict[str, Any]:
    """The body for the server, without the fields that all have."""
    path, data = upstream_request(service, request, facts or facts_of())
    assert path == f"/api/{service}"
    body: dict[str, Any] = json.loads(data)
    assert body.pop("model") == (facts or facts_of()).name
    assert body.pop("stream", None) is (None if service == "embed" else True)
    return body


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"max_tokens": 5}, {"num_predict": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 7}, {"num_predict": 7}),
        ({"temperature": 0, "top_p": 0.5, "top_k": 40, "min_p": 0.1}, None),
        ({"seed": 7.0}, {"seed": 7}),
        ({"stop": "END"}, {"stop": ["END"]}),
        ({"stop": ["a", "b"]}, None),
        ({"repetition_penalty": 1.1}, {"repeat_penalty": 1.1}),
        ({"frequency_penalty": 0.5, "presence_penalty": -0.5, "repeat_penalty": 1.2}, None),
        ({"temperature": 1, "options": {"temperature": 0.5, "mirostat": 1}}, {"temperature": 0.5, "mirostat": 1}),
        ({"temperature": None, "options": None}, {}),
        ({"num_ctx": 4096}, None),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_top_level_options_move_into_options(
    given: dict[str, Any], wanted: dict[str, Any] | None, native: bool
) -> None:
    body = sent("chat", chat(**given), facts_of(native=native))
    assert body.get("options", {}) == (given if wanted is None else wanted)
    assert set(body) - {"messages", "options"} == set()


@pytest.mark.promise("P23")
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "hot"}, "temperature: must be a number"),
        ({"temperature": True}, "temperature: must be a number"),
        ({"seed": 1.5}, "seed: must be a whole number"),
        ({"max_tokens": "many"}, "max_tokens: must be a whole number"),
        ({"stop": [1]}, r"stop\[0\]: must be a string"),
        ({"options": []}, "options: must be an object"),
        ({"response_format": {"type": "xml"}}, "response_format.type: must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema: is missing"),
        ({"reasoning_effort": "much"}, "reasoning_effort: must be one of none, "),
        ({"reasoning": {"effort": 5}}, r"reasoning\.effort: must be one of"),
        ({"think": 5}, "think: must be true, false"),
    ],
)
def test_invalid_field_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        sent("chat", chat(**given))


def test_num_ctx_of_the_request_overrides_the_facts() -> None:
    facts = facts_of(num_ctx=8192)
    assert sent("chat", chat(), facts)["options"] == {"num_ctx": 8192}
    assert sent("chat", chat(options={"num_ctx": 100}), facts)["options"] == {"num_ctx": 100}
    assert "options" not in sent("chat", chat(), facts_of())


def test_threads_become_num_thread() -> None:
    facts = facts_of(num_thread=3)
    assert sent("chat", chat(), facts)["options"] == {"num_thread": 3}
    assert sent("chat", chat(options={"num_thread": 1}), facts)["options"] == {"num_thread": 1}


@pytest.mark.parametrize(
    ("request_has", "options_have", "wanted"),
    [
        (None, "", None),
        (None, "5m", "5m"),
        (None, "-1", -1),
        (None, "0", 0),
        ("1h", "5m", "1h"),
        (0, "5m", 0),
        ("300", "", 300),
        (2.5, "", 2.5),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_keep_alive(request_has: Any, options_have: str, wanted: Any, native: bool) -> None:
    body = sent("chat", chat(keep_alive=request_has), facts_of(native=native, keep_alive=options_have))
    assert body.get("keep_alive") == wanted


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json"),
        ({"type": "json_object", "schema": SCHEMA}, SCHEMA),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, SCHEMA),
    ],
)
def test_response_format_becomes_format(given: dict[str, Any], wanted: Any) -> None:
    assert sent("chat", chat(response_format=given)).get("format") == wanted
    assert sent("generate", {"prompt": "a", "response_format": given}).get("format") == wanted
    assert sent("chat", chat(format="json"))["format"] == "json"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, None),
        ({"think": True}, True),
        ({"think": False}, False),
        ({"think": "high"}, "high"),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning_effort": "xhigh"}, "max"),
        ({"reasoning": {"effort": "medium"}}, "medium"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"think": True, "reasoning_effort": "none"}, True),
    ],
)
def test_think_for_a_model_with_thinking(given: dict[str, Any], wanted: Any) -> None:
    for facts in (facts_of("think:8b", "completion", "thinking"), facts_of("unknown:latest")):
        assert sent("chat", chat(**given), facts).get("think") == wanted


def test_think_for_a_model_without_thinking() -> None:
    facts = facts_of("tiny-chat:latest", "completion")
    assert "think" not in sent("chat", chat(think=False), facts)
    assert "think" not in sent("chat", chat(reasoning_effort="none"), facts)
    with pytest.raises(InvalidRequestError, match="reasoning_effort: tiny-chat:latest does not support thinking"):
        sent("chat", chat(reasoning_effort="high"), facts)


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def test_tool_choice_filters_tools(caplog: pytest.LogCaptureFixture) -> None:
    tools = [tool("a"), tool("b")]
    assert sent("chat", chat(tools=tools))["tools"] == tools
    assert sent("chat", chat(tools=tools, tool_choice="auto"))["tools"] == tools
    assert "tools" not in sent("chat", chat(tools=tools, tool_choice="none"))
    assert "tools" not in sent("chat", chat(tools=[]))
    assert "tool_choice" not in sent("chat", chat(tools=tools, tool_choice="auto"), facts_of(native=True))
    assert caplog.records == []
    chosen = {"type": "function", "function": {"name": "b"}}
    assert sent("chat", chat(tools=tools, tool_choice=chosen), facts_of("forced:7b"))["tools"] == [tool("b")]
    assert ["cannot be forced to call" in record.message for record in caplog.records] == [True]
    with pytest.raises(InvalidRequestError, match="tool_choice: the function 'c' is not in tools"):
        sent("chat", chat(tools=tools, tool_choice={"type": "function", "function": {"name": "c"}}))


def test_tools_for_a_small_model_warn_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for size in ("7B", "70.6B", ""):
        sent("chat", chat(tools=[tool("a")]), facts_of(f"large{size}", parameter_size=size))
    assert caplog.records == []
    for _ in range(2):
        sent("chat", chat(tools=[tool("a")]), facts_of("small:latest", parameter_size="494.03M"))
    assert ["494.03M" in record.message for record in caplog.records] == [True]


def test_logprobs() -> None:
    body = sent("chat", chat(logprobs=True, top_logprobs=3))
    assert (body["logprobs"], body["top_logprobs"]) == (True, 3)
    body = sent("generate", {"prompt": "a", "logprobs": 2})
    assert (body["logprobs"], body["top_logprobs"]) == (True, 2)
    assert "logprobs" not in sent("chat", chat(logprobs=False))
    body = sent("generate", {"prompt": "a", "logprobs": 0})  # without alternatives
    assert (body["logprobs"], body.get("top_logprobs")) == (True, None)


def test_completion_fields() -> None:
    request = {"prompt": "def f(", "suffix": "return", "system": "be brief", "raw": None, "user": "me"}
    assert sent("generate", request) == {"prompt": "def f(", "suffix": "return", "system": "be brief"}
    images = ["data:image/png;base64,aGk="]
    assert sent("generate", {"prompt": "a", "images": images})["images"] == ["aGk="]


def test_embed_fields() -> None:
    request = {"input": "a", "dimensions": 3, "encoding_format": "base64", "user": "me"}
    assert sent("embed", request) == {"input": ["a"], "dimensions": 3}
    assert sent("embed", {"input": ["a", ""]}) == {"input": ["a", ""]}
    for tokens in ([1, 2], [[1, 2]]):
        with pytest.raises(InvalidRequestError, match=r"input\[0\]: must be a text"):
            sent("embed", {"input": tokens})


def test_native_requests_keep_all_fields() -> None:
    native = facts_of(native=True)
    request = chat(think=None, logprobs=True, shift=False, new_field={"a": 1}, stream=False, temperature=0.5)
    assert sent("chat", request, native) == {
        "messages": request["messages"],
        "logprobs": True,
        "shift": False,
        "new_field": {"a": 1},
        "options": {"temperature": 0.5},
    }
    assert sent("chat", {"messages": []}, native) == {"messages": []}
    assert sent("embed", {"input": "a", "truncate": False}, native) == {"input": "a", "truncate": False}
    assert sent("generate", {"context": [1], "options": {"seed": 1}}, native) == {
        "context": [1],
        "options": {"seed": 1},
    }


def test_each_choice_is_a_request() -> None:
    several = single_requests("chat", chat(n=3, seed=5), native=False)
    assert [single["seed"] for single in several] == [5, 6, 7]
    several = single_requests("generate", {"prompt": ["a", "b"], "n": 2}, native=False)
    assert [single["prompt"] for single in several] == ["a", "a", "b", "b"]
    [single] = single_requests("generate", {"prompt": ["a"]}, native=False)
    assert single["prompt"] == "a"
    request = {"prompt": "a", "n": 5}
    assert single_requests("generate", request, native=True) == [request]


@pytest.mark.parametrize(
    ("request_has", "message"),
    [
        ({"n": 0}, "n: must be from 1 to 128, not 0"),
        ({"n": "2"}, "n: must be"),
        ({"n": True}, "n: must be"),
        ({"n": 129}, "n: must be"),
        ({"best_of": 3}, "best_of: Ollama does not support"),
        ({"echo": True}, "echo: Ollama does not support repeating the prompt"),
        ({"logit_bias": {"1": 2}}, "logit_bias: Ollama does not support token biases"),
        ({"prompt": [1, 2]}, r"prompt\[0\]: must be a text"),
        ({"prompt": ["a", [1]]}, r"prompt\[1\]: must be a text"),
    ],
)
def test_unsupported_completion_fields_are_rejected(request_has: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        single_requests("generate", {"prompt": "a"} | request_has, native=False)


def test_deeply_nested_request_is_rejected() -> None:
    nested: Any = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        upstream_request("chat", chat(tools=[nested]), facts_of())
