"""Conversion of chat messages."""

from __future__ import annotations

from typing import Any

import pytest

from engine_plugin.engines.ollama.requests import native_messages
from engine_plugin.errors import InvalidRequestError

from .shapes import facts_of

PIXEL = "iVBORw0KGgo="
SEES = facts_of("vision:7b", "completion", "vision")


def one(message: dict[str, Any], **facts: Any) -> dict[str, Any]:
    [native] = native_messages([message], facts_of(**facts))
    return native


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": url}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"role": "user", "content": "a"}, {"role": "user", "content": "a"}),
        ({"role": "developer", "content": "a"}, {"role": "system", "content": "a"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b", "refusal": None},
            {"role": "assistant", "content": "a", "thinking": "b"},
        ),
        (user(text("a"), text("b")), {"role": "user", "content": "a\nb"}),
        (user(), {"role": "user", "content": ""}),
    ],
)
def test_content_becomes_one_text(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert one(given) == wanted


@pytest.mark.parametrize("url", [f"data:image/png;base64,{PIXEL}", {"url": f"data:;base64,{PIXEL}"}, PIXEL])
def test_image_urls_become_bare_base64(url: Any) -> None:
    [native] = native_messages([user(text("see"), image(url), image(url))], SEES)
    assert native == {"role": "user", "content": "see", "images": [PIXEL, PIXEL]}


def test_native_images_lose_the_data_url_prefix() -> None:
    message = {"role": "user", "content": "see", "images": [f"data:image/png;base64,{PIXEL}", PIXEL]}
    assert one(message)["images"] == [PIXEL, PIXEL]


def test_audio_parts_are_sent_as_images() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
    assert one(user(text("what is said?"), sound))["images"] == ["UklGRg=="]
    with pytest.raises(InvalidRequestError, match=r"content\[0\]\.input_audio: vision:7b cannot hear"):
        native_messages([user(sound)], SEES)


@pytest.mark.promise("P23")
@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (user(image("https://x/y.png")), r"messages\[0\]\.content\[0\]\.image_url: Ollama does not fetch images"),
        (user(text("a"), image("data:image/png,abc")), r"content\[1\]\.image_url: a data: URL must be in base64"),
        (user(image("data:image/png;base64,")), r"image_url: is empty"),
        (user(image({})), r"image_url: must be an image; use a data: URL"),
        (user({"type": "video"}), r"messages\[0\]\.content\[0\]: must be a part of type"),
        (user("a"), "must be a part of type"),
        (user({"type": "text", "text": 5}), "must be a part of type"),
        (user({"type": "input_audio"}), r"content\[0\]\.input_audio\.data: must be an audio file"),
        ({"role": "user", "content": 5}, r"messages\[0\]\.content: must be a text or a list of parts"),
        ({"role": "user", "images": "x"}, r"messages\[0\]\.images: must be a list of images"),
        ({"role": "assistant", "tool_calls": 5}, r"messages\[0\]\.tool_calls: must be a list"),
        ({"role": "assistant", "tool_calls": [{}]}, r"tool_calls\[0\]\.function: must be an object"),
    ],
)
def test_unsupported_content_is_rejected(message: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequestError, match=complaint):
        native_messages([message], facts_of())


def test_image_for_model_without_vision_is_rejected_unless_features_are_unknown() -> None:
    message = user(image(PIXEL))
    with pytest.raises(InvalidRequestError, match=r"content\[0\]\.image_url: blind:7b cannot see images; .*models"):
        native_messages([message], facts_of("blind:7b", "completion"))
    assert native_messages([message], facts_of("unknown:7b"))


def call(arguments: Any, name: str = "look", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [('{"a": [1]}', {"a": [1]}), ("{}", {}), ("", {}), (None, {}), ({"a": 1}, {"a": 1})],
)
def test_tool_arguments_become_objects(given: Any, wanted: dict[str, Any]) -> None:
    native = one({"role": "assistant", "tool_calls": [call(given, id="x"), call("{}", "wait")]})
    assert native["tool_calls"] == [
        {"id": "x", "function": {"index": 0, "name": "look", "arguments": wanted}},
        {"function": {"index": 1, "name": "wait", "arguments": {}}},
    ]


@pytest.mark.parametrize("given", ["{", "[1]", "5", 5, "[" * 100_000])
def test_invalid_tool_arguments_are_rejected(given: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.tool_calls\[0\]\.function\.arguments: "):
        one({"role": "assistant", "tool_calls": [call(given)]})


def test_tool_message_gets_its_name_from_the_call() -> None:
    given = [
        {"role": "assistant", "content": "", "tool_calls": [call("{}", id="x"), call("{}", "wait", id="y")]},
        {"role": "tool", "tool_call_id": "y", "content": "waited"},
        {"role": "tool", "tool_call_id": "z", "name": "own", "content": "a"},
        {"role": "tool", "content": "b"},
        {"role": "function", "name": "old", "content": "c"},
    ]
    _, *answers = native_messages(given, facts_of())
    assert answers == [
        {"role": "tool", "content": "waited", "tool_name": "wait", "tool_call_id": "y"},
        {"role": "tool", "content": "a", "tool_name": "own", "tool_call_id": "z"},
        {"role": "tool", "content": "b"},
        {"role": "tool", "content": "c", "tool_name": "old"},
    ]


def test_native_messages_keep_all_fields() -> None:
    message = {
        "role": "assistant",
        "content": "a",
        "thinking": "b",
        "tool_calls": [{"id": "x", "function": {"index": 0, "name": "look", "arguments": {"a": 1}}}],
        "new_field": 5,
    }
    assert one(message, native=True) == message
    answer = {"role": "tool", "content": "c", "tool_name": "look", "tool_call_id": "x"}
    assert one(answer, native=True) == answer
