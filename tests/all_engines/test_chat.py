"""chat and generate."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine_plugin.host import events
from tests.patience import LIMIT

from .world import World, text_of

pytestmark = pytest.mark.asyncio(loop_scope="package")

DONE = b"data: [DONE]\n\n"


def pieces(told: list[dict[str, Any]], index: int = 0) -> str:
    """Return the text of one choice in a chat's events."""
    deltas = [choice["delta"] for event in told for choice in event["choices"] if choice["index"] == index]
    return "".join(delta.get("content") or "" for delta in deltas)


async def test_answer_has_the_openai_format(world: World) -> None:
    answer = await world.plugin.invoke("chat", world.chat())
    assert answer["object"] == "chat.completion"
    assert answer["model"].startswith(world.model("chat").removesuffix(":latest"))
    [choice] = answer["choices"]
    assert (choice["index"], choice["message"]["role"]) == (0, "assistant")
    assert choice["finish_reason"] in ("stop", "length")
    assert text_of(answer)
    usage = answer["usage"]
    assert 0 < usage["completion_tokens"] <= 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


async def test_stream_has_the_same_text_as_the_whole_answer(world: World) -> None:
    request = world.chat(seed=7)
    whole = await world.plugin.invoke("chat", request)
    told = await world.streamed("chat", request | {"stream_options": {"include_usage": True}})
    assert {event["object"] for event in told} == {"chat.completion.chunk"}
    assert len({event["id"] for event in told}) == 1
    assert pieces(told) == text_of(whole)
    reasons = [choice.get("finish_reason") for event in told for choice in event["choices"]]
    assert [reason for reason in reasons if reason] == [whole["choices"][0]["finish_reason"]]
    assert reasons[-1] is not None
    last = told[-1]
    assert last["usage"] == whole["usage"]


async def test_stream_ends_with_a_single_done(world: World) -> None:
    raw = await world.raw("chat", world.chat())
    assert raw.endswith(DONE)
    assert raw.count(DONE) == 1
    assert raw.startswith(b"data: {")


async def test_max_tokens_ends_an_answer_with_finish_reason_length(world: World) -> None:
    answer = await world.plugin.invoke("chat", world.chat("Count to one hundred", max_tokens=2))
    assert answer["usage"]["completion_tokens"] <= 2
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_stop_word_ends_an_answer_before_it(world: World) -> None:
    whole = text_of(await world.plugin.invoke("chat", world.chat(seed=7)))
    word = whole.split()[-1]
    answer = await world.plugin.invoke("chat", world.chat(seed=7, stop=[word]))
    assert text_of(answer) == whole[: whole.index(word)]
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_long_chat_with_several_roles_is_answered(world: World) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Héllo, wörld! 你好 🎉"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "And again?"}]},
    ]
    answer = await world.plugin.invoke("chat", world.request("chat", messages=messages, max_tokens=8))
    assert answer["choices"][0]["message"]["role"] == "assistant"


async def test_concurrent_streams_do_not_mix(world: World) -> None:
    prompts = [f"Say {word}" for word in ("one", "two", "three", "four", "five", "six")]

    async def text(prompt: str) -> str:
        return pieces(await world.streamed("chat", world.chat(prompt, seed=1)))

    alone = [await text(prompt) for prompt in prompts]
    async with asyncio.timeout(LIMIT):
        together = await asyncio.gather(*map(text, prompts))
    assert together == alone


async def test_abandoned_stream_does_not_block_the_others(world: World) -> None:
    async with asyncio.timeout(LIMIT):
        for _ in range(12):  # more than an engine answers at once
            async with world.plugin.stream("chat", world.chat(max_tokens=900)) as chunks:
                async for event in events(chunks):
                    assert "error" not in event
                    break
        assert text_of(await world.plugin.invoke("chat", world.chat()))


async def test_generate_continues_a_prompt(world: World) -> None:
    request = world.request("generate", prompt="Once upon a time", max_tokens=6, temperature=0, seed=3)
    answer = await world.plugin.invoke("generate", request)
    assert answer["object"] == "text_completion"
    [choice] = answer["choices"]
    assert choice["text"]
    assert 0 < answer["usage"]["completion_tokens"] <= 6
    told = await world.streamed("generate", request)
    assert "".join(choice["text"] for event in told for choice in event["choices"]) == choice["text"]


async def test_each_of_several_prompts_gets_a_choice(world: World) -> None:
    request = world.request("generate", prompt=["one", "two"], max_tokens=3, temperature=0)
    answer = await world.plugin.invoke("generate", request)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
