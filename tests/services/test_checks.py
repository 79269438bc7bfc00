"""What each service requires of a request; every error begins with the field."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_plugin.errors import InvalidRequestError
from engine_plugin.manifest import SERVICE_NAMES
from engine_plugin.messages import ConversationMessage
from engine_plugin.services import CONVERSATION_VALIDATORS, VALIDATORS

USER = {"role": "user", "content": "a"}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"messages": [USER]}),
    ("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool"}]}),
    ("chat", {"messages": [USER], "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}}),
    ("chat", {"messages": [USER], "tools": None, "tool_choice": {"type": "function"}, "anything": object()}),
    ("chat", {"messages": [USER], "tools": [{"type": "custom", "custom": {"name": "a"}}], "stop": ["a"]}),
    ("generate", {"prompt": "", "stop": ""}),
    ("generate", {"prompt": "a"}),
    ("generate", {"prompt": ["a", [1, 2]]}),
    ("embed", {"input": "a"}),
    ("embed", {"input": []}),
    ("embed", {"input": ["a", 1, [1, 2]], "dimensions": 3, "encoding_format": "base64"}),
    ("rerank", {"query": "a", "documents": []}),
    ("rerank", {"query": "", "documents": ["a", {"text": "b", "id": 1}], "top_n": 1, "return_documents": True}),
    ("text-to-image", {"prompt": "a cat"}),
    ("text-to-image", {"prompt": "a cat", "size": "512x256", "n": 2, "num_inference_steps": 4, "rng_seed": 0}),
    ("text-to-image", {"prompt": "a", "size": "64*64", "seed": 2**64 - 1, "response_format": "b64_json"}),
    ("text-to-image", {"prompt": "a", "negative_prompt": "", "guidance_scale": 7.5, "size": None, "n": None}),
    ("text-to-image", {"prompt": "a", "guidance_scale": 0, "quality": object()}),
    ("speech-to-text", {"audio": "AAAA"}),
    ("speech-to-text", {"audio": "data:audio/wav;base64,AAAA", "language": "en", "task": "translate"}),
    ("speech-to-text", {"audio": "data:;base64,AAAA", "response_format": "srt", "temperature": 0.2}),
    ("speech-to-text", {"audio": "A", "timestamp_granularities": ["segment", "word"], "temperature": 1}),
    ("text-to-speech", {"text": "Hello"}),
    ("text-to-speech", {"input": "Hello", "voice": "a", "speed": 1, "language": "en", "response_format": "wav"}),
    ("text-to-speech", {"input": "Hello", "text": "Hello", "speed": 0.5}),
]

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {}, "messages: is missing; it must be a list"),
    ("chat", {"messages": "a"}, "messages: must be a list, not a string"),
    ("chat", {"messages": []}, "messages: is empty"),
    ("chat", {"messages": [USER, "a"]}, "messages[1]: must be an object with a role and content"),
    ("chat", {"messages": [{"content": "a"}]}, "messages[0]: must be"),
    ("chat", {"messages": [{"role": 1}]}, "messages[0]: must be"),
    ("chat", {"messages": [USER], "tools": {}}, "tools: must be a list"),
    ("chat", {"messages": [USER], "tools": [None]}, "tools[0]: must be"),
    ("chat", {"messages": [USER], "tools": [{}]}, "tools[0]: must be"),
    ("chat", {"messages": [USER], "tools": [{"type": "function"}]}, "tools[0]: must be"),
    ("chat", {"messages": [USER], "tools": [{"type": "function", "function": {"name": 5}}]}, "tools[0]: must be"),
    ("chat", {"messages": [USER], "stop": 5}, "stop: must be a string or a list"),
    ("chat", {"messages": [USER], "stop": ["a", None]}, "stop[1]: must be a string"),
    ("generate", {"prompt": "a", "stop": [5]}, "stop[0]: must be a string"),
    ("chat", {"messages": [USER], "tool_choice": 1}, "tool_choice: must be a string or an object"),
    ("chat", {"messages": [USER], "response_format": "json"}, "response_format: must be an object"),
    ("generate", {}, "prompt: is missing"),
    ("generate", {"prompt": []}, "prompt: is an empty list"),
    ("generate", {"prompt": 1}, "prompt: must be a string or a list"),
    ("embed", {}, "input: is missing"),
    ("embed", {"input": {}}, "input: must be a string or a list"),
    ("embed", {"input": ["a", None]}, "input[1]: must be a string or tokens"),
    ("embed", {"input": [True]}, "input[0]: must be a string or tokens"),
    ("embed", {"input": "a", "dimensions": "3"}, "dimensions: must be an integer"),
    ("embed", {"input": "a", "dimensions": True}, "dimensions: must be an integer"),
    ("embed", {"input": "a", "encoding_format": 1}, "encoding_format: must be a string"),
    ("rerank", {"documents": []}, "query: is missing"),
    ("rerank", {"query": 1, "documents": []}, "query: must be a string"),
    ("rerank", {"query": "a"}, "documents: is missing"),
    ("rerank", {"query": "a", "documents": "a"}, "documents: must be a list"),
    ("rerank", {"query": "a", "documents": ["a", 1]}, "documents[1]: must be a string, or an object with a text"),
    ("rerank", {"query": "a", "documents": [{"text": 1}]}, "documents[0]: must be"),
    ("rerank", {"query": "a", "documents": [], "top_n": 0}, "top_n: must be at least 1, not 0"),
    ("rerank", {"query": "a", "documents": [], "top_n": "1"}, "top_n: must be an integer"),
    ("rerank", {"query": "a", "documents": [], "return_documents": 1}, "return_documents: must be true or false"),
    ("text-to-image", {}, "prompt: is missing; it must be a string"),
    ("text-to-image", {"prompt": " \n"}, "prompt: is empty"),
    (
        "text-to-image",
        {"prompt": "a", "size": "big"},
        'size: must be a width and a height in pixels, such as "512x512"',
    ),
    ("text-to-image", {"prompt": "a", "size": "64x64x64"}, "size: must be a width"),
    ("text-to-image", {"prompt": "a", "size": "-64x64"}, "size: must be a width"),
    ("text-to-image", {"prompt": "a", "size": "٦٤x٦٤"}, "size: must be a width"),
    ("text-to-image", {"prompt": "a", "size": 512}, "size: must be a string"),
    (
        "text-to-image",
        {"prompt": "a", "size": "0x64"},
        "size: width and height must be from 1 to 16384 pixels, not 0x64",
    ),
    ("text-to-image", {"prompt": "a", "size": "64x20000"}, "size: width and height must be"),
    ("text-to-image", {"prompt": "a", "n": 0}, "n: must be from 1 to 10, not 0"),
    ("text-to-image", {"prompt": "a", "n": 11}, "n: must be from 1 to 10, not 11"),
    ("text-to-image", {"prompt": "a", "n": 1.0}, "n: must be an integer"),
    ("text-to-image", {"prompt": "a", "num_inference_steps": 0}, "num_inference_steps: must be from 1 to"),
    ("text-to-image", {"prompt": "a", "rng_seed": -2}, "rng_seed: must be from -1 to"),
    ("text-to-image", {"prompt": "a", "seed": 2**64}, "seed: must be from -1 to"),
    ("text-to-image", {"prompt": "a", "guidance_scale": "7"}, "guidance_scale: must be a number, not a string"),
    ("text-to-image", {"prompt": "a", "guidance_scale": True}, "guidance_scale: must be a number"),
    ("text-to-image", {"prompt": "a", "guidance_scale": -0.1}, "guidance_scale: must be from 0 to 1000, not -0.1"),
    ("text-to-image", {"prompt": "a", "response_format": "url"}, "response_format: must be b64_json, not 'url'"),
    ("speech-to-text", {}, "audio: is missing"),
    ("speech-to-text", {"audio": ""}, "audio: is empty"),
    ("speech-to-text", {"audio": 1}, "audio: must be a string"),
    ("speech-to-text", {"audio": "ä"}, "audio: is not base64; give a sound file's bytes in base64"),
    ("speech-to-text", {"audio": "data:audio/wav;base64,"}, "audio: holds no sound"),
    ("speech-to-text", {"audio": "data:audio/wav,RIFF"}, "audio: a data: URL must be in base64"),
    ("speech-to-text", {"audio": "data:audio/wav;base64"}, "audio: a data: URL must be in base64"),
    ("speech-to-text", {"audio": "A", "language": 1}, "language: must be a string"),
    ("speech-to-text", {"audio": "A", "task": "sing"}, "task: must be transcribe or translate, not 'sing'"),
    ("speech-to-text", {"audio": "A", "response_format": "xml"}, "response_format: must be json or verbose_json or"),
    ("speech-to-text", {"audio": "A", "temperature": 3}, "temperature: must be from 0 to 2, not 3"),
    ("speech-to-text", {"audio": "A", "timestamp_granularities": "word"}, "timestamp_granularities: must be a list"),
    (
        "speech-to-text",
        {"audio": "A", "timestamp_granularities": ["word", {}]},
        "timestamp_granularities[1]: must be",
    ),
    ("text-to-speech", {}, "text: is missing"),
    ("text-to-speech", {"input": ""}, "input: is empty"),
    ("text-to-speech", {"text": "a", "input": "b"}, "text: differs from input"),
    ("text-to-speech", {"text": "a", "voice": 1}, "voice: must be a string"),
    ("text-to-speech", {"text": "a", "speed": 0}, "speed: must be from 0.1 to 10, not 0"),
    ("text-to-speech", {"text": "a", "response_format": "mp3"}, "response_format: must be wav, not 'mp3'"),
]

GOOD_MESSAGES = [
    ConversationMessage(b"\xff\x00", "binary"),
    ConversationMessage(b"", "binary", {"sample_rate": "16000", "format": "pcm", "model": "m"}),
    ConversationMessage(b"\xff", ""),
    ConversationMessage(b'{"action": "finish-task"}', "text"),
    ConversationMessage(b"{}", "text", {"sample_rate": ""}),
]

BAD_MESSAGES = [
    (ConversationMessage(b"", "text"), "data: is empty"),
    (ConversationMessage(b"finish-task", "text"), "data: is not JSON"),
    (ConversationMessage(b"[]", "text"), "data: must hold a JSON object"),
    (ConversationMessage(b'{"a":"' + b"x" * 65536 + b'"}', "text"), "data: a command has at most 64 KiB"),
    (ConversationMessage(b"", "audio"), "message_type: must be text or binary, not 'audio'"),
    (
        ConversationMessage(b"", "binary", {"sample_rate": "16k"}),
        "metadata.sample_rate: must be 1000 to 384000 samples",
    ),
    (ConversationMessage(b"", "binary", {"sample_rate": "0"}), "metadata.sample_rate: must be"),
    (ConversationMessage(b"", "binary", {"sample_rate": "999"}), "metadata.sample_rate: must be"),
    (ConversationMessage(b"", "binary", {"sample_rate": "-1"}), "metadata.sample_rate: must be"),
    (ConversationMessage(b"", "binary", {"sample_rate": "384001"}), "metadata.sample_rate: must be"),
    (ConversationMessage(b"", "binary", {"sample_rate": "9" * 5000}), "metadata.sample_rate: must be"),
    (ConversationMessage(b"", "binary", {"sample_rate": "²"}), "metadata.sample_rate: must be"),
]


def test_service_is_found_by_its_name() -> None:
    assert sorted([*VALIDATORS, *CONVERSATION_VALIDATORS]) == sorted(SERVICE_NAMES)
    assert all(service.name == name for name, service in VALIDATORS.items())
    assert all(service.name == name for name, service in CONVERSATION_VALIDATORS.items())


@pytest.mark.parametrize(("name", "request_"), GOOD)
def test_valid_requests_are_accepted(name: str, request_: dict[str, Any]) -> None:
    before = dict(request_)
    VALIDATORS[name].check(request_)
    assert request_ == before


@pytest.mark.parametrize(("name", "request_", "message"), BAD)
def test_invalid_requests_are_rejected_by_field(name: str, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        VALIDATORS[name].check(request_)
    assert refused.value.message.startswith(message)


@pytest.mark.parametrize("message", GOOD_MESSAGES)
def test_valid_messages_are_accepted(message: ConversationMessage) -> None:
    CONVERSATION_VALIDATORS["speech-to-text-ws"].check(message.data, message.message_type, message.metadata)


@pytest.mark.parametrize(("message", "complaint"), BAD_MESSAGES)
def test_invalid_messages_are_rejected_by_field(message: ConversationMessage, complaint: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        CONVERSATION_VALIDATORS["speech-to-text-ws"].check(message.data, message.message_type, message.metadata)
    assert refused.value.message.startswith(complaint)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("role", "text", "a")), inner),
    max_leaves=8,
)
FIELDS = (
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "prompt",
    "input",
    "dimensions",
    "query",
    "documents",
    "size",
    "n",
    "num_inference_steps",
    "seed",
    "guidance_scale",
    "audio",
    "language",
    "task",
    "temperature",
    "timestamp_granularities",
    "text",
    "voice",
    "speed",
)


@pytest.mark.promise("P23")
@given(st.sampled_from(sorted(VALIDATORS)), st.dictionaries(st.sampled_from(FIELDS), VALUES))
def test_error_for_any_request_names_one_of_its_fields(name: str, request_: dict[str, Any]) -> None:
    try:
        VALIDATORS[name].check(request_)
        VALIDATORS[name].trivial_answer(request_ | {"model": "m"})
    except InvalidRequestError as error:
        field = error.message.partition(":")[0].partition("[")[0]
        assert field in FIELDS


def test_empty_inputs_are_answered_without_the_engine() -> None:
    embed, rerank = VALIDATORS["embed"], VALIDATORS["rerank"]
    usage = {"prompt_tokens": 0, "total_tokens": 0}
    nothing = {"object": "list", "data": [], "model": "m", "usage": usage}
    assert embed.trivial_answer({"input": [], "model": "m"}) == nothing
    assert rerank.trivial_answer({"query": "a", "documents": [], "model": "m"}) == {"model": "m", "results": []}
    assert embed.trivial_answer({"input": "", "model": "m"}) is None
    assert rerank.trivial_answer({"documents": ["a"], "model": "m"}) is None
    assert VALIDATORS["chat"].trivial_answer({"messages": [], "model": "m"}) is None
    assert VALIDATORS["generate"].trivial_answer({"prompt": "", "model": "m"}) is None
