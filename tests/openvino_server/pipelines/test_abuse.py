"""Malformed and hostile calls are rejected with the field's name, and the worker continues."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from openvino_server.errors import RequestError
from openvino_server.pipelines.vision import pictures

from .running import CallFailed, RunningWorker, worker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")

DEEP = "[" * 5000 + "]" * 5000
GROUPS = "(" * 100_000 + "a" + ")" * 100_000
COUNTED = "one two three four five six seven eight nine ten"


async def refused(running: RunningWorker, op: str, **request: Any) -> str:
    with pytest.raises(CallFailed) as caught:
        await running.do(op, **request)
    assert caught.value.status == 400, caught.value.message
    return caught.value.message


@pytest.mark.parametrize("prompt", [[351], [1, 10**6], [1 << 31], [1 << 63], [1 << 70], [-1], [[3], [352]]])
async def test_tokens_outside_the_vocabulary_are_rejected(llm: RunningWorker, prompt: Any) -> None:
    assert (await refused(llm, "complete", prompt=prompt)).startswith("prompt: the model's tokens are from 0 to 350")


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"tool_calls": 5}, "messages[0].tool_calls: must be a list"),
        ({"tool_calls": {"a": 1}}, "messages[0].tool_calls: must be a list"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
            "messages[0].tool_calls[0].function.arguments: ",
        ),
    ],
)
async def test_malformed_past_tool_calls_are_rejected(llm: RunningWorker, message: Any, field: str) -> None:
    messages = [{"role": "assistant", "content": "x", **message}]
    assert (await refused(llm, "chat", messages=messages)).startswith(field)


@pytest.mark.parametrize("parameters", [5, "x", [1]])
async def test_tool_parameters_must_be_a_schema(llm: RunningWorker, parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    told = await refused(llm, "chat", messages=[{"role": "user", "content": "x"}], tools=tools)
    assert told.startswith("tools[0].function.parameters: ")


async def test_tool_with_an_unusual_schema_can_be_called(model: Callable[..., Path]) -> None:
    called = "<tool_call><function=f><parameter=a>1</parameter></function></tool_call>"
    tool = {"function": {"name": "f", "parameters": {"properties": [1]}}}
    async with worker("chat", model("tiny-chat"), tool_parser="qwen3coder") as running:
        other = running.begin("chat", messages=[{"role": "user", "content": "count"}], params={"ignore_eos": True})
        call = await running.chat("x", tools=[tool], guided_choice=[called])
        (told,) = (part[1]["tool_calls"][0]["function"] for part in call.parts if isinstance(part[1], dict))
        assert told == {"name": "f", "arguments": '{"a": 1}'}
        await other.done()
        assert other.text().startswith(COUNTED)


@pytest.mark.parametrize(
    "params",
    [{"guided_regex": "\0"}, {"guided_regex": GROUPS}, {"guided_json": {"type": "string", "pattern": GROUPS}}],
    ids=["zero", "regex", "schema"],
)
async def test_grammar_that_crashes_the_compiler_is_rejected(llm: RunningWorker, params: dict[str, Any]) -> None:
    told = await refused(llm, "complete", prompt="a", params=params | {"max_tokens": 1})
    assert told.startswith(f"{next(iter(params))}: ")
    assert (await llm.chat("count")).text() == COUNTED


async def test_other_calls_continue_during_a_slow_grammar_check(llm: RunningWorker) -> None:
    endless = llm.begin("complete", prompt="a", params={"guided_regex": "(.*a.{20})"})
    cancelled = llm.begin("complete", prompt="a", params={"guided_regex": "(.*a.{21})"})
    assert (await llm.chat("count")).text() == COUNTED
    llm.cancel(cancelled)
    with pytest.raises(CallFailed, match="cancelled"):
        await cancelled.done()
    assert not endless.result.done()
    with pytest.raises(CallFailed, match="guided_regex: cannot be applied: the compiler ended"):
        await endless.done()


async def test_voice_must_be_a_string(model: Callable[..., Path]) -> None:
    folder = model("tiny-speak")
    (folder / "v.bin").write_bytes(bytes(4 * 512))
    async with worker("text-to-speech", folder, voices=[{"name": "v", "path": "v.bin"}]) as running:
        assert (await refused(running, "speak", text="a", voice=["v"])).startswith("voice: ")


@pytest.mark.parametrize("source", ["é", "data:image/png;base64,é", "AAAA", "data:,iVBORw0KGgo="])
async def test_invalid_picture_is_rejected(source: str) -> None:
    with pytest.raises(RequestError, match=r"image_url\[0\]: not a picture"):
        pictures([source])


def picture(form: str = "PNG", size: tuple[int, int] = (8, 8)) -> str:
    file = io.BytesIO()
    Image.new("1" if form == "PNG" else "RGB", size).save(file, form)
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.promise("X6")
async def test_picture_in_an_unlisted_format_is_rejected() -> None:
    """Pillow would start Ghostscript for an EPS file."""
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        assert len(pictures([picture(form)])) == 1
    for form in ("EPS", "TIFF", "PPM", "ICO", "PCX"):
        with pytest.raises(RequestError, match=r"image_url\[0\]: not a picture"):
            pictures([picture(form, (16, 16))])


@pytest.mark.promise("X6")
async def test_number_and_total_size_of_pictures_are_limited() -> None:
    with pytest.raises(RequestError, match=r"image_url\[16\]: is one picture too many"):
        pictures([picture()] * 17)
    with pytest.raises(RequestError, match=r"image_url\[1\]: has 8000 x 8000 pixels"):
        pictures([picture(), picture(size=(8000, 8000))])
