"""OpenAI messages converted for each engine."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from engine_plugin.engines.llamacpp.requests import upstream_request
from engine_plugin.engines.ollama.requests import native_messages
from engine_plugin.engines.openai.requests import request_body as openai_body
from engine_plugin.engines.openvino.requests import upstream_body as openvino_body
from engine_plugin.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

Messages = list[dict[str, Any]]


def llamacpp(messages: Messages) -> Messages:
    found: Messages = upstream_request("chat", {"messages": messages}, stream=True)["messages"]
    return found


def openvino(messages: Messages) -> Messages:
    body = openvino_body("chat", {"messages": messages}, stream=True)
    found: Messages = json.loads(body)["messages"]
    return found


def openai(messages: Messages) -> Messages:
    found: Messages = openai_body("chat", {"messages": messages})["messages"]
    return found


def ollama(messages: Messages) -> Messages:
    facts: Any = SimpleNamespace(features=("completion",), name="m", native=False)
    return native_messages(messages, facts)


every_engine = pytest.mark.parametrize("plain", [llamacpp, openvino, openai, ollama])


def called(arguments: Any) -> Messages:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call, call]}]


@every_engine
@pytest.mark.promise("S3")
def test_developer_messages_become_system_messages(plain: Callable[[Messages], Messages]) -> None:
    given = [{"role": "developer", "content": "x"}, {"role": "user", "content": "y"}]
    assert [message["role"] for message in plain(given)] == ["system", "user"]
    assert given[0]["role"] == "developer"


@every_engine
def test_text_parts_are_joined_by_newlines(plain: Callable[[Messages], Messages]) -> None:
    parts = [{"type": "text", "text": text} for text in ("one", "", "two")]
    assert plain([{"role": "user", "content": parts}])[0]["content"] == "one\n\ntwo"


@every_engine
@pytest.mark.promise("S6")
@pytest.mark.parametrize("arguments", ["", " \n", None, "{}", {}])
def test_missing_arguments_of_a_past_call_become_an_empty_object(
    plain: Callable[[Messages], Messages], arguments: Any
) -> None:
    (_, message) = plain(called(arguments))
    for call in message["tool_calls"]:
        found = call["function"]["arguments"]
        assert (json.loads(found) if isinstance(found, str) else found) == {}


@every_engine
@pytest.mark.parametrize("arguments", ['{"a": [1, "é"]}', {"a": [1, "é"]}])
def test_arguments_of_a_past_call_are_kept(plain: Callable[[Messages], Messages], arguments: Any) -> None:
    call = plain(called(arguments))[1]["tool_calls"][1]
    found = call["function"]["arguments"]
    assert (json.loads(found) if isinstance(found, str) else found) == {"a": [1, "é"]}
    assert call["function"]["name"] == "add"


@every_engine
@pytest.mark.promise("S6")
@pytest.mark.parametrize(
    "arguments", ['{"a": ', "get it", '{"a": 1e999}', '{"a": NaN}', "[1]", "5", '"x"', [1], 5, "[" * 100_000]
)
def test_arguments_that_are_not_an_object_are_rejected_by_field(
    plain: Callable[[Messages], Messages], arguments: Any
) -> None:
    messages = called("{}")
    messages[1]["tool_calls"][1] = {"id": "2", "function": {"name": "add", "arguments": arguments}}
    with pytest.raises(InvalidRequestError, match=r"^messages\[1\]\.tool_calls\[1\]\.function\.arguments: must be "):
        plain(messages)


@pytest.mark.parametrize("plain", [llamacpp, openvino, openai])
@pytest.mark.promise("S6")
def test_reasoning_of_a_past_answer_must_be_text(plain: Callable[[Messages], Messages]) -> None:
    messages: Messages = [{"role": "assistant", "content": "x", "reasoning_content": 5}]
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.reasoning_content: must be a string"):
        plain(messages)


@every_engine
@pytest.mark.promise("S11")
def test_lone_surrogate_in_arguments_of_a_past_call_is_replaced(
    plain: Callable[[Messages], Messages],
) -> None:
    found = plain(called('{"a": "\\ud83d", "b": "\\ud83e\\udd8a"}'))[1]["tool_calls"][1]["function"]["arguments"]
    assert (json.loads(found) if isinstance(found, str) else found) == {"a": "\ufffd", "b": "\U0001f98a"}


@every_engine
@pytest.mark.promise("S6")
@pytest.mark.parametrize("function", [None, "add", {}, {"arguments": "{}"}, {"name": 5, "arguments": "{}"}])
def test_past_call_without_a_function_name_is_rejected_by_field(
    plain: Callable[[Messages], Messages], function: Any
) -> None:
    messages = called("{}")
    messages[1]["tool_calls"][1] = {"id": "2", "function": function}
    with pytest.raises(InvalidRequestError, match=r"^messages\[1\]\.tool_calls\[1\]\.function: must be "):
        plain(messages)


@every_engine
@pytest.mark.parametrize("text", [None, 5, ["a"]])
def test_text_part_without_text_is_rejected_by_field(plain: Callable[[Messages], Messages], text: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.content\[0\]"):
        plain([{"role": "user", "content": [{"type": "text", "text": text}]}])


def blind(messages: Messages) -> Messages:
    found: Messages = openai_body("chat", {"messages": messages}, ("tools",))["messages"]
    return found


@pytest.mark.parametrize("plain", [llamacpp, ollama, blind])
@pytest.mark.promise("S6")
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ],
)
def test_part_that_the_model_does_not_support_is_rejected_by_field(
    plain: Callable[[Messages], Messages], part: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, part]}]
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.content\[1\].*: .*cannot (see|hear)"):
        plain(messages)


@pytest.mark.parametrize("plain", [llamacpp, ollama])
@pytest.mark.promise("S6")
@pytest.mark.parametrize("part", [{"type": "video_url", "video_url": {"url": "x"}}, {"type": 5}, {}, "x", None])
def test_part_of_an_unknown_type_is_rejected_by_field(plain: Callable[[Messages], Messages], part: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^messages\[0\]\.content\[0\]: "):
        plain([{"role": "user", "content": [part]}])


def test_parts_with_more_than_text_are_sent_unchanged_to_other_servers() -> None:
    parts = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "y"}]
    assert openai([{"role": "user", "content": parts}])[0]["content"] == parts
